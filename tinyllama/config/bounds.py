"""Bounds of numeric settings, each written in the type of its field: ``max_steps: Count = 10``."""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Bound:
    """The numbers that a field may hold."""

    rule: str
    """completes the sentence "it must" """
    holds: Callable[[float], bool]


def _above_0(most: float) -> Bound:
    return Bound(f"be greater than 0, at most {most:,}", lambda x: 0 < x <= most)


MOST = 10**15  # larger numbers are typing errors
_NOT_NEGATIVE = Bound(f"not be negative, at most {MOST:,}", lambda x: 0 <= x <= MOST)
_FINITE = Bound("be greater than 0", lambda x: 0 < x < math.inf)

Count = Annotated[int, _above_0(MOST)]
CountOrZero = Annotated[int, _NOT_NEGATIVE]
Positive = Annotated[float, _above_0(MOST)]
NotNegative = Annotated[float, _NOT_NEGATIVE]
Seconds = Annotated[float, _above_0(10**9)]
Decay = Annotated[float, Bound("be in [0, 1)", lambda x: 0 <= x < 1)]
Weight = Annotated[float, Bound("be finite and not negative", lambda x: 0 <= x < math.inf)]
Seed = Annotated[int, Bound("fit into 64 bits", lambda x: -(2**63) <= x < 2**64)]
# sizes of a model have no largest value of their own, because their number of parameters has one
Size = Annotated[int, _FINITE]
Factor = Annotated[float, _FINITE]


def bounds(cls: type) -> Iterator[tuple[str, type, Bound | None]]:
    """Yield name, int or float, and bound of every numeric field of the dataclass ``cls``."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        # int, int | None, or a word or int
        for option in (hint,) if typing.get_origin(hint) is Annotated else (hint, *typing.get_args(hint)):
            kind, bound = typing.get_args(option) if typing.get_origin(option) is Annotated else (option, None)
            if kind in (int, float):
                yield name, kind, bound


def bound_errors(settings: Any, prefix: str) -> Iterator[str]:
    """Yield an error for each number in the dataclass ``settings`` that is out of its bounds, or not whole."""
    for name, kind, bound in bounds(type(settings)):
        value = getattr(settings, name)
        if not isinstance(value, int | float) or bound is None:
            continue  # null, or one of the words that may stand for a number
        if not bound.holds(value):
            yield f"{prefix}{name} is {value}: it must {bound.rule}"
        elif kind is int and type(value) is not int:
            yield f"{prefix}{name} is {value}: it must be a whole number"
