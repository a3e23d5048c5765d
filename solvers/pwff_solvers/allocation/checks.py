"""Checks of arguments: one error that names the argument, the place, the rule and the value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pwff_solvers.allocation.elementary import FloatArray
from pwff_solvers.allocation.errors import InvalidInputError

__all__ = ["NOT_NEGATIVE", "POSITIVE", "Rule", "as_array", "check", "filled", "per_instance"]

# rule in words, and what is True where it holds
Rule = tuple[str, Callable[[FloatArray], NDArray[np.bool_]]]
POSITIVE: Rule = ("positive", lambda x: x > 0)
NOT_NEGATIVE: Rule = ("at least 0", lambda x: x >= 0)


def as_array(name: str, value: ArrayLike) -> FloatArray:
    """Return ``value`` as a float array, or say why it is not one."""
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        message = f"{name} must be an array of real numbers, got {value!r}"
        raise InvalidInputError(message) from error


def place(name: str, index: tuple[int, ...]) -> str:
    return f"{name}[{', '.join(str(i) for i in index)}]" if index else name


def check(name: str, array: FloatArray, rule: Rule) -> None:
    """Raise at the first entry that is not finite or breaks the rule."""
    for words, good in (("finite", np.isfinite(array)), (rule[0], rule[1](array))):
        if not good.all():
            index = tuple(int(i) for i in np.argwhere(~good)[0]) if array.ndim else ()
            raise InvalidInputError(f"{place(name, index)} must be {words}, got {array[index]}")


def per_instance(name: str, value: ArrayLike, instances: int) -> FloatArray:
    """Check a positive quantity and broadcast it to [instance]."""
    array = as_array(name, value)
    # of one number in one step, for the sake of the single online decision
    if not (array.size == 1 and 0.0 < array.item() < np.inf):
        check(name, array, POSITIVE)
    if array.ndim > 1 or (array.ndim == 1 and array.size not in (1, instances)):
        raise InvalidInputError(
            f"{name} must have shape [{instances}] or be a scalar, got shape {list(array.shape)}"
        )
    result = np.empty(instances)
    result[:] = array
    return result


def filled(name: str, value: ArrayLike, rule: Rule, shape: tuple[int, ...]) -> FloatArray:
    """Check an argument and broadcast it to [instance] or [instance, device]."""
    array = as_array(name, value)
    check(name, array, rule)
    try:
        return np.broadcast_to(array, shape)
    except ValueError as error:
        axes = "[instance]" if len(shape) == 1 else "[instance, device]"
        raise InvalidInputError(
            f"{name} must broadcast to {axes} = {list(shape)}, got shape {list(array.shape)}"
        ) from error
