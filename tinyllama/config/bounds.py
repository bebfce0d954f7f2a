"""Bounds of numeric settings, each written in the type of its field: ``max_steps: Count = 10``."""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Bound:
    """The numbers that a field may hold."""

    rule: str
    """completes the sentence "it must" """
    holds: Callable[[float], bool]


def _above_0(most: int) -> Bound:
    return Bound(f"be greater than 0, at most {most:,}", lambda x: 0 < x <= most)


MOST = 10**15  # larger numbers are typing errors
_POSITIVE = _above_0(MOST)
_NOT_NEGATIVE = Bound(f"not be negative, at most {MOST:,}", lambda x: 0 <= x <= MOST)

Count = Annotated[int, _POSITIVE]
CountOrZero = Annotated[int, _NOT_NEGATIVE]
Positive = Annotated[float, _POSITIVE]
NotNegative = Annotated[float, _NOT_NEGATIVE]
Seconds = Annotated[float, _above_0(10**9)]
# torch counts in milliseconds, and ends with a traceback before ranks could have met
StartTimeout = Annotated[float, Bound(f"be at least 1, at most {10**9:,}", lambda x: 1 <= x <= 10**9)]
Decay = Annotated[float, Bound("be in [0, 1)", lambda x: 0 <= x < 1)]
Weight = Annotated[float, Bound("be finite and not negative", lambda x: 0 <= x < math.inf)]
Seed = Annotated[int, Bound("fit into 64 bits", lambda x: -(2**63) <= x < 2**64)]
Layers = Annotated[int, _above_0(1000)]  # each is built, and compiled, in turn
Context = Annotated[int, _above_0(2**24)]  # RoPE's tables have a row for each position


@functools.cache
def bounds(cls: type) -> Sequence[tuple[str, type, Bound | None]]:
    """Return name, int or float, and bound of every numeric field of the dataclass ``cls``."""
    found: list[tuple[str, type, Bound | None]] = []
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        # int, int | None, or a word or int; what is in a list is for check() to see
        for option in (hint,) if typing.get_origin(hint) in (Annotated, list) else (hint, *typing.get_args(hint)):
            kind, bound = typing.get_args(option) if typing.get_origin(option) is Annotated else (option, None)
            if kind in (int, float):
                found.append((name, kind, bound))
    return found


def bound_errors(settings: Any, prefix: str) -> Iterator[str]:
    """Yield an error for each number in the dataclass ``settings`` that is out of its bounds, or not whole."""
    for name, kind, bound in bounds(type(settings)):  # type: ignore[arg-type]
        value = getattr(settings, name)
        if not isinstance(value, int | float) or bound is None:
            continue  # null, or one of the words that may stand for a number
        is_long = isinstance(value, int) and abs(value) >= 10**100  # Python refuses to print those of 4,300 digits
        shown = "a number of more than 100 digits" if is_long else value
        if not bound.holds(value):
            yield f"{prefix}{name} is {shown}: it must {bound.rule}"
        elif kind is int and type(value) is not int:
            yield f"{prefix}{name} is {shown}: it must be a whole number"
