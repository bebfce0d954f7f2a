"""Print the progress of a preparation, and format a table of its result."""

import math
import sys
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from tinyllama import printable, stdio
from tinyllama.prepare.inputs import Input
from tinyllama.throughput import duration

Info = dict[str, Any]  # what a shard's NAME.json says

FEW = 100
"""shards of which each has a line; of more, some"""
INTERVAL = 5.0
"""seconds between two lines where there are more"""


class Progress:
    """Shows shards, tokens, tokens/s and the time left: as a bar on a terminal, else in lines.

    Each of a FEW shards has a line. Of more, one every INTERVAL has, and each that is not packed, and the last.
    """

    def __init__(self, todo: Sequence[Input]) -> None:
        self._bytes = sum(one.size for one in todo)
        self._left = self._bytes
        self._shards = len(todo)
        self._done = self._tokens = 0
        self._started = time.monotonic()
        self._printed = -math.inf  # when the last line was
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._bytes, unit="B", unit_scale=True, dynamic_ncols=True)

    @stdio.best_effort()
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
        due = self._started + seconds >= self._printed + INTERVAL or self._done == self._shards
        if self._shards > FEW and not due and not isinstance(outcome, Exception):
            return
        self._printed = self._started + seconds
        result = "not packed" if isinstance(outcome, Exception) else counts(outcome)
        left = f"{duration(seconds * self._left / (self._bytes - self._left or 1))} left"
        name = printable(one.name, 200)
        print(f"[{self._done}/{self._shards}] {name}: {result}; {rate}, {left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def total(infos: Collection[Info]) -> Info:
    """Sum the figures of shards: documents, tokens, what was repaired, left out for each reason, and in each subset."""
    dropped: Counter[str] = Counter()
    subsets: dict[str, dict[str, int]] = {}
    for info in infos:
        dropped.update(info["dropped"])
        for subset, figures in info["subsets"].items():
            known = subsets.setdefault(subset, dict.fromkeys(figures, 0))  # an older shard may record less
            subsets[subset] = {key: known[key] + figures[key] for key in known if key in figures}
    return {key: sum(info[key] for info in infos) for key in ("documents", "tokens", "repaired")} | {
        "dropped": dict(sorted(dropped.items())),
        "subsets": {subset: subsets[subset] for subset in sorted(subsets)},
    }


def counts(info: Info) -> str:
    """Documents and tokens in words, and what was done to some of them."""
    notes = [f"{count:,} {_why(reason)}" for reason, count in info["dropped"].items() if count]
    if info["repaired"]:
        notes.append(f"{info['repaired']:,} with lone surrogates replaced")
    noted = f" ({', '.join(notes)})" if notes else ""
    documents = "1 document" if info["documents"] == 1 else f"{info['documents']:,} documents"
    return f"{documents}{noted}, {info['tokens']:,} tokens"


def table(info: Info) -> str:
    """Documents, tokens and bytes of each subset and of all; below them, what was left out and why.

    Files that are in no folder of the source are the subset ".", which is not listed if it is all there is.
    """
    keys = ("documents", "tokens", "bytes")
    everything = {key: sum(figures[key] for figures in info["subsets"].values()) for key in keys}
    dropped = {_why(reason): {"documents": count} for reason, count in info["dropped"].items()}
    subsets = {printable(subset, 80): figures for subset, figures in info["subsets"].items()}
    if list(subsets) == ["."]:
        subsets = {}
    rows = [*subsets.items(), ("all", everything), *dropped.items()]
    width = max(len(name) for name, _ in [("subset", {}), *rows])
    lines = [f"{'subset':{width}}" + "".join(f"{key:>22}" for key in keys)]
    for name, figures in rows:
        lines.append(f"{name:{width}}" + "".join(f"{figures[key]:>22,}" for key in keys if key in figures))
    return "\n".join(lines)


def _why(reason: str) -> str:
    why = {"fraction": "not drawn", "null": "rows of a column of type null"}
    return why.get(reason) or f"of {printable(reason, 80)} left out"
