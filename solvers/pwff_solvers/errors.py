"""The one error that wrong input raises."""

from __future__ import annotations

__all__ = ["InvalidInputError"]


class InvalidInputError(ValueError):
    """An argument breaks a rule; the message names argument, index, rule and value."""
