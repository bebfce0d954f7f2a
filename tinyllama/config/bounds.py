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
    most: float = 10**15
    """larger numbers are typing errors"""

    def error(self, value: float) -> str | None:
        """Say what is wrong with ``value``, if anything is."""
        if not self.holds(value):
            return f"it must {self.rule}"
        return f"it must {self.rule}, at most {self.most:,}" if value > self.most else None


_POSITIVE = Bound("be greater than 0", lambda x: x > 0)
_FINITE = Bound("be greater than 0", lambda x: 0 < x < math.inf, most=math.inf)
_NOT_NEGATIVE = Bound("not be negative", lambda x: x >= 0)

Count = Annotated[int, _POSITIVE]
CountOrZero = Annotated[int, _NOT_NEGATIVE]
Positive = Annotated[float, _POSITIVE]
NotNegative = Annotated[float, _NOT_NEGATIVE]
Seconds = Annotated[float, dataclasses.replace(_POSITIVE, most=10**9)]
Decay = Annotated[float, Bound("be in [0, 1)", lambda x: 0 <= x < 1)]
Weight = Annotated[float, Bound("be finite and not negative", lambda x: 0 <= x < math.inf, most=math.inf)]
Seed = Annotated[int, Bound("fit into 64 bits", lambda x: -(2**63) <= x < 2**64, most=2**64)]
# sizes of a model have no largest value of their own, because their number of parameters has one
Size = Annotated[int, _FINITE]
Factor = Annotated[float, _FINITE]


def bounds(cls: type) -> Iterator[tuple[str, type, Bound | None]]:
    """Yield name, int or float, and bound of every numeric field of the dataclass ``cls``."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        # int, int | None, or a word or int
        for option in (hint,) if typing.get_origin(hint) is Annotated else (hint, *typing.get_args(hint)):
            kind, *extras = typing.get_args(option) if typing.get_origin(option) is Annotated else (option,)
            if kind in (int, float):
                yield name, kind, next((extra for extra in extras if isinstance(extra, Bound)), None)


def bound_errors(settings: Any, prefix: str) -> Iterator[str]:
    """Yield an error for each number in the dataclass ``settings`` that is out of its bounds, or not whole."""
    for name, kind, bound in bounds(type(settings)):
        value = getattr(settings, name)
        if not isinstance(value, int | float) or bound is None:
            continue  # null, or one of the words that may stand for a number
        error = bound.error(value)
        if error is None and kind is int and type(value) is not int:
            error = "it must be a whole number"
        if error is not None:
            yield f"{prefix}{name} is {value}: {error}"
