"""Say in words what rows of metrics.csv hold, for the console and for reports; nothing here imports the trainer."""

import sys
from typing import Any

from tinyllama.throughput import duration

Row = dict[str, Any]
"""of metrics.csv: a value for each column, None where there is none"""

FORMATS = {
    "loss": "loss {:.4f}",
    "val_loss": "val_loss {:.4f}",
    "val_bpb": "val_bpb {:.4f}",
    "lr": "lr {:.3e}",
    "grad_norm": "grad_norm {:.3f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "mfu {:.1%}",
    "max_memory_gb": "memory {:.2f} GB",
}
WAITS = {"data_seconds": "data", "save_seconds": "checkpoints", "validation_seconds": "validation"}
"""columns of metrics.csv of what training waits for, and its name"""
NOTEWORTHY = 1.1
"""slowest over median rank from where the slowest is named"""


def is_finite(cell: Any) -> bool:
    """Return whether ``cell`` is a number that a float can be, and neither infinite nor NaN."""
    return isinstance(cell, int | float) and abs(cell) <= sys.float_info.max


def numbers(row: Row) -> list[str]:
    """Return the values of ``row`` in words, a phrase each."""
    parts = [text.format(row[name]) for name, text in FORMATS.items() if row.get(name) is not None]
    if row.get("skipped"):
        parts.append(f"skipped {row['skipped']}")
    waits = [f"{(row.get(name) or 0):.1f} s for {what}" for name, what in WAITS.items() if (row.get(name) or 0) >= 0.1]
    slowest, median = row.get("forward_seconds_slowest") or 0, row.get("forward_seconds_median") or 0
    if slowest > NOTEWORTHY * median:
        parts.append(f"rank {row['slowest_rank']} {slowest / median - 1:.0%} slower")
    return [*parts, f"waited {', '.join(waits)}"] if waits else parts


def by_source(row: Row) -> list[str]:
    """Return the held-out loss of each validation source in a phrase, if there are several."""
    losses = {name.partition("/")[2]: value for name, value in row.items() if name.startswith("val_loss/")}
    phrases = []
    for name, loss in losses.items():
        if loss is not None:
            bits = row.get(f"val_bpb/{name}")
            phrases.append(f"{name} {loss:.4f}" + ("" if bits is None else f" ({bits:.4f} bpb)"))
    return phrases if len(losses) > 1 else []


def last_by_source(rows: list[Row]) -> list[str]:
    """Return ``by_source`` of the last of ``rows`` that has such losses; [] if none has."""
    return next((parts for row in reversed(rows) if (parts := by_source(row))), [])


def console_line(row: Row, max_steps: int, seconds_left: float | None) -> str:
    """Format ``row`` of a run of ``max_steps`` steps as a line."""
    parts = [f"step {row['step']:>{len(str(max_steps))}.0f}/{max_steps}", *numbers(row)]
    return "  ".join(parts if seconds_left is None else [*parts, f"{duration(seconds_left)} left"])


def mean_speed(rows: list[Row], tokens_before: int = 0) -> float:
    """Return the tokens per second of all ``rows`` that have a speed, each weighed by its tokens.

    ``tokens_before`` were done before the first of them.
    """
    tokens, seconds, before = 0.0, 0.0, float(tokens_before)
    for row in rows:
        if (speed := row.get("tokens_per_second") or 0) > 0:
            tokens += row["tokens"] - before
            seconds += (row["tokens"] - before) / speed
        before = row["tokens"]
    return tokens / seconds if seconds else 0.0
