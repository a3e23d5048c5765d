"""What an allocation may minimise."""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import ArrayLike

__all__ = ["LeastEnergy", "Objective", "Shortest", "Weighted"]


@dataclass(frozen=True, slots=True)
class Shortest:
    """The shortest round [s], whatever it costs; ties go to the least energy."""


@dataclass(frozen=True, slots=True, eq=False)
class LeastEnergy:
    """The least energy [J] of a round that lasts at most ``round_s``.

    Parameters
    ----------
    round_s : float or array of shape [instance]
        Length of the round in seconds, the cell's fixed delay included; positive and finite.
    """

    round_s: ArrayLike


@dataclass(frozen=True, slots=True, eq=False)
class Weighted:
    """The least ``energy + price_of_time_w * round`` [J].

    Parameters
    ----------
    price_of_time_w : float or array of shape [instance]
        What one second of the round is worth in joules (J/s = W); positive and finite.
    """

    price_of_time_w: ArrayLike


Objective = Shortest | LeastEnergy | Weighted
