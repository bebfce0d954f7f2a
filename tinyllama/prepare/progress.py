"""Print the progress of a preparation, and format a table of its result."""

import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from tinyllama.prepare.inputs import Input
from tinyllama.throughput import duration

Info = dict[str, Any]  # what a shard's NAME.json says


class Progress:
    """Shards, tokens, tokens/s and time left: a bar on a terminal, else a line for each shard."""

    def __init__(self, todo: Sequence[Input]) -> None:
        self._bytes = sum(one.size for one in todo)
        self._left = self._bytes
        self._shards = len(todo)
        self._done = self._tokens = 0
        self._started = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._bytes, unit="B", unit_scale=True, dynamic_ncols=True)

    def add(self, one: Input, outcome: Info | Exception) -> None:
        """Count ``one`` as ended and show the progress."""
        self._done += 1
        self._left -= one.size
        if not isinstance(outcome, Exception):
            self._tokens += outcome["tokens"]
        seconds = time.monotonic() - self._started
        rate = f"{self._tokens / seconds:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._done:,}/{self._shards:,} shards, {self._tokens:,} tokens, {rate}")
            self._bar.update(one.size)
            return
        result = "not packed" if isinstance(outcome, Exception) else counts([outcome])
        left = f"{duration(seconds * self._left / (self._bytes - self._left or 1))} left"
        print(f"[{self._done}/{self._shards}] {one.name}: {result}; {rate}, {left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def subsets_of(infos: Collection[Info]) -> dict[str, dict[str, int]]:
    """Documents, tokens and bytes of text of each subset, over all shards."""
    total: dict[str, Counter[str]] = {}
    for info in infos:
        for subset, figures in info["subsets"].items():
            total.setdefault(subset, Counter()).update(figures)
    return {subset: dict(total[subset]) for subset in sorted(total)}


def dropped_of(infos: Collection[Info]) -> dict[str, int]:
    """Documents left out for each reason, over all shards."""
    total: Counter[str] = Counter()
    for info in infos:
        total.update(info["dropped"])
    return dict(sorted(total.items()))


def counts(infos: Collection[Info]) -> str:
    """Documents and tokens of shards in words, and what was done to some of them."""
    repaired = sum(info["repaired"] for info in infos)
    notes = [f"{count:,} {_why(reason)}" for reason, count in dropped_of(infos).items()]
    notes += [f"{repaired:,} with lone surrogates replaced"] * bool(repaired)
    documents, tokens = (sum(info[key] for info in infos) for key in ("documents", "tokens"))
    noted = f" ({', '.join(notes)})" if notes else ""
    return f"{documents:,} documents{noted}, {tokens:,} tokens"


def table(infos: Collection[Info]) -> str:
    """Documents, tokens and bytes of each subset and of all; below them, what was left out and why."""
    subsets = subsets_of(infos)
    keys = ("documents", "tokens", "bytes")
    total = {key: sum(figures[key] for figures in subsets.values()) for key in keys}
    rows = [(name, figures) for name, figures in subsets.items()] + [("all", total)]
    dropped = [(f"{_why(reason)}", {"documents": count}) for reason, count in dropped_of(infos).items()]
    width = max(len(name) for name, _ in [("subset", {}), *rows, *dropped])
    lines = [f"{'subset':{width}}" + "".join(f"{key:>22}" for key in keys)]
    lines += [
        f"{name:{width}}" + "".join(f"{figures[key]:>22,}" if key in figures else "" for key in keys)
        for name, figures in rows + dropped
    ]
    return "\n".join(lines)


def _why(reason: str) -> str:
    return "not of the fraction" if reason == "fraction" else f"of {reason} left out"
