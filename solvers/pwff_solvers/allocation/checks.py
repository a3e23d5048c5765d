"""Checks of arguments: one error that names the argument, the place, the rule and the value."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pwff_solvers.compiled.elementary import FloatArray
from pwff_solvers.errors import InvalidInputError

__all__ = [
    "NOT_NEGATIVE",
    "POSITIVE",
    "Rule",
    "as_array",
    "check",
    "each_instance",
    "filled",
    "number",
    "per_instance",
    "rows",
]

# rule in words, and what is True where it holds
Rule = tuple[str, Callable[[FloatArray], NDArray[np.bool_]]]
POSITIVE: Rule = ("positive", lambda x: x > 0)
NOT_NEGATIVE: Rule = ("at least 0", lambda x: x >= 0)
# The smallest normal number, and one whose square is finite: as far as rounds and prices may go.
_LEAST, _MOST = float(np.finfo(np.float64).tiny), 1e150
_IN_RANGE: Rule = (
    f"between {_LEAST:.1e} and {_MOST}",
    lambda x: (x >= _LEAST) & (x <= _MOST),
)
_DOUBLE = np.dtype(np.float64)
_NOT_REAL = (type(None), bool, np.bool_, str, bytes, complex, np.datetime64, np.timedelta64)
_MOST_INT = int(np.finfo(np.float64).max)


def as_array(name: str, value: ArrayLike, wanted: str = "an array of real numbers") -> FloatArray:
    """Return ``value`` as a float array, or say why it is not what is ``wanted``."""
    # the two usual kinds in one step, for the sake of the single online decision
    if type(value) is np.ndarray and value.dtype is _DOUBLE:
        return value
    if type(value) is float:
        return np.array(value)
    try:
        _check_kind(name, value, wanted)
        return np.asarray(value, dtype=np.float64)
    except InvalidInputError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(f"{name} must be {wanted}, got {_shown(value)}") from error


def _check_kind(name: str, value: Any, wanted: str) -> None:
    """Raise for what numpy makes numbers of in silence (masks, booleans, ...), or cannot."""
    listed = isinstance(value, list | tuple)
    for start, part in enumerate(value if listed else (value,)):
        if isinstance(part, np.ma.MaskedArray) and np.ma.is_masked(part):
            inner = tuple(int(i) for i in np.argwhere(np.ma.getmaskarray(part))[0])
            index = (start, *inner) if listed else inner
            raise InvalidInputError(f"{place(name, index)} must not be masked")
    # a list that mixes booleans or strings with numbers shows them only element by element
    array = np.asarray(value, dtype=object if listed else None)
    if array.dtype.kind in "fiu" or (listed and set(map(type, array.ravel().tolist())) <= {float}):
        return
    for index, item in np.ndenumerate(array):
        if isinstance(item, np.ma.MaskedArray):
            raise InvalidInputError(f"{place(name, index)} must not be masked")
        if isinstance(item, _NOT_REAL):
            rule = "a real number" if index else wanted
            item = item.item() if isinstance(item, np.generic) else item
            raise InvalidInputError(f"{place(name, index)} must be {rule}, got {_shown(item)}")
        if isinstance(item, int) and abs(item) > _MOST_INT:
            raise InvalidInputError(f"{place(name, index)} must be finite, got {_shown(item)}")


def _shown(value: object) -> str:
    """Return a short text of any value; Python does not print integers beyond 4300 digits."""
    if isinstance(value, int) and abs(value) > _MOST_INT:
        return f"an integer of {value.bit_length()} bits"
    try:
        return reprlib.repr(value)
    except ValueError:
        return f"a {type(value).__name__}"


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
    if not (array.size == 1 and _LEAST <= array.item() <= _MOST):
        check(name, array, POSITIVE)
        check(name, array, _IN_RANGE)
    return each_instance(name, array, instances)


def each_instance(name: str, array: FloatArray, instances: int) -> FloatArray:
    """Broadcast a number, or one for each instance, to a new array [instance]."""
    if array.ndim > 1 or (array.ndim == 1 and array.size not in (1, instances)):
        many = array.ndim == 1 and instances == 1
        how = f"; ask one cell often with batch.take(np.zeros({array.size}, int))" if many else ""
        raise InvalidInputError(
            f"{name} must have shape [{instances}] or be a scalar, got shape {list(array.shape)}{how}"
        )
    result = np.empty(instances)
    result[:] = array
    return result


def number(name: str, value: ArrayLike, rule: Rule) -> float:
    """Check a single number."""
    array = as_array(name, value, "a real number")
    if array.ndim:
        raise InvalidInputError(f"{name} must be one number, got shape {list(array.shape)}")
    check(name, array, rule)
    return float(array)


def rows(name: str, value: ArrayLike, count: int) -> NDArray[np.bool_ | np.integer]:
    """Check indices into ``count`` rows, in any order and number, or a mask of them."""
    try:
        index = np.asarray(value)
    except ValueError as error:  # lists of unequal lengths
        raise InvalidInputError(f"{name} must be one list, got {_shown(value)}") from error
    if index.ndim != 1:
        raise InvalidInputError(
            f"{name} must be a list of indices, a mask or a slice, got {_shown(value)}"
        )
    if index.dtype == np.bool_:
        if index.size != count:
            raise InvalidInputError(f"{name} must have {count} entries as a mask, got {index.size}")
    elif not index.size:
        index = index.astype(np.int64)  # numpy takes an empty list for one of floats
    elif index.dtype.kind not in "iu":
        raise InvalidInputError(f"{name} must be whole numbers or booleans, got {_shown(value)}")
    else:
        wrong = np.flatnonzero((index < -count) | (index >= count))
        if wrong.size:
            raise InvalidInputError(
                f"{name}[{wrong[0]}] must be at least {-count} and below {count}, "
                f"got {index[wrong[0]]}"
            )
    return index


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
