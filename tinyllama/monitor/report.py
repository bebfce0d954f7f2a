"""Write report.html from what runs have written: one self-contained page below 2 MB, drawn by plotly.js, offline.

Everything is read from ``out_dir``: metrics.csv, events.jsonl, config.yaml and, if present, samples.jsonl and eval.csv.
The page itself, with its drawing, is report_page.html; its data are read, smoothed and thinned out here.
"""

import contextlib
import importlib.resources
import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama import InputError, printable
from tinyllama.checkpoint import reader
from tinyllama.checkpoint.resume import leaves
from tinyllama.checkpoint.state import is_count
from tinyllama.config.model import ModelConfig
from tinyllama.monitor import page
from tinyllama.monitor.rows import WAITS, Row, is_finite, last_by_source, mean_speed
from tinyllama.monitor.run_files import (
    TOO_LARGE,
    branched_from,
    complete_rows,
    read_events,
    read_metrics,
    read_samples,
    read_starts,
    tokens_before,
)
from tinyllama.throughput import duration

BUCKETS = 600
"""A curve of more than twice as many points is thinned out to the lowest and the highest in each of as many buckets,
which the runs of a page share."""
TIME_BUCKETS = 60
"""At most as many buckets of a run, again shared by the runs of a page, have their time divided among its uses."""


def write(out_dirs: list[Path], output: Path) -> None:
    """Write the page of one run, or of several in comparison; raises InputError where there is no run.

    An ``output`` that is there must be a report: a run's own files, and those of others, are not replaced.
    """
    runs = [read_run(out_dir, len(out_dirs)) for out_dir in out_dirs]
    names = [run["name"] for run in runs]
    for run, out_dir in zip(runs, out_dirs, strict=True):
        if names.count(run["name"]) > 1:
            run["name"] = str(out_dir)
    for run, label in zip(runs, short([run["name"] for run in runs]), strict=True):
        run["label"] = label
    data = {"runs": runs, "published": _table(importlib.resources.files("tinyllama.eval") / "published_scores.csv")}
    title = f"{len(runs)} runs" if len(runs) > 1 else runs[0]["name"]
    page.write(output, title, data)


def short(names: list[str], most: int = 24) -> list[str]:
    """Shorten names for a legend: if one is longer than ``most``, all lose the words that they share at both ends."""
    if max(map(len, names)) <= most or len(set(names)) < 2:
        return names

    def shared(names: list[str]) -> int:  # but for the last word of it
        common = os.path.commonprefix(names).rstrip("_-")
        return max(common.rfind(mark) for mark in "_-") + 1

    begin = shared(names)
    end = shared([name[begin:][::-1] for name in names])
    return ["…" * (begin > 0) + name[begin : len(name) - end] + "…" * (end > 0) for name in names]


def read_run(out_dir: Path, num_runs: int = 1) -> dict[str, Any]:
    """Read all that a page of ``num_runs`` runs shows of the run in ``out_dir``."""
    rows: list[Row] = [  # without text, and numbers that JSON does not have
        {name: cell if is_finite(cell) else None for name, cell in row.items()}
        for row in read_metrics(out_dir / "metrics.csv")
    ]
    if not rows:
        raise InputError(f"{out_dir} has no metrics.csv with a row in it: give the out_dir of a run that has begun")
    try:
        config = reader.read_settings(out_dir)
        tokens_per_step = int(config["train"]["global_batch_size"]) * int(config["model"]["block_size"])
        model = ModelConfig(**config["model"])
        if not (0 < tokens_per_step < 2**63 and isinstance(model.name, str)):
            raise ValueError("not the settings of a run")
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, *TOO_LARGE) as error:
        text = f"{out_dir / 'config.yaml'} is not what a run writes there: take that of its newest checkpoint"
        raise InputError(text) from error
    # the batch may have changed during the run: tokens are those of the rows, and today's batch counts after the last
    counts: dict[float, float] = {0: 0} | {row["step"]: row["tokens"] for row in rows}
    last, far = max(counts), 10**9
    counts[last + far] = counts[last] + far * tokens_per_step
    events = read_events(out_dir / "events.jsonl", counts)
    window = smooth(rows)
    thinned = thin(rows, BUCKETS // num_runs)
    branch = {"branched from": printable(origin)} if (origin := branched_from(out_dir)) else {}
    starts = read_starts(out_dir)
    found = progress(rows, starts, tokens_per_step, events) | summary(rows, events, model, starts)
    found |= surroundings(starts)
    return {
        "name": out_dir.resolve().name,
        "summary": {"state": state(events, out_dir / "metrics.csv")} | branch | found,
        "window": window,
        "settings": {key: _setting(value) for key, value in leaves(config).items()},
        "columns": {name: [_rounded(row.get(name)) for row in thinned] for name in [*rows[0], "smooth"]},
        "sources": [name for name in rows[0] if name.startswith("tokens_") and name != "tokens_per_second"],
        "time": where_time_goes(rows, max(TIME_BUCKETS // num_runs, 1)),
        "events": events,
        "samples": thin_samples(read_samples(out_dir / "samples.jsonl")),
        "evaluations": _table(out_dir / "eval.csv"),
    }


def thin_samples(samples: list[Row], most: int = 12) -> list[Row]:
    """Return the sample texts of at most ``most`` evenly spread steps, including the last."""
    steps = sorted({sample["step"] for sample in samples})
    chosen = {steps[round(i)] for i in np.linspace(0, len(steps) - 1, most)} if steps else set()
    return [sample for sample in samples if sample["step"] in chosen]


def state(events: list[Row], metrics: Path) -> str:
    """Say whether the run has ended, as far as its folder tells."""
    ends = {"failure": "failed", "done": "done"}
    if events and events[-1]["kind"] == "stop":
        return f"stopped {events[-1]['details'].partition(',')[0]}; the same command resumes"
    if events and events[-1]["kind"] in ends:
        return ends[events[-1]["kind"]]
    return f"not ended; last row {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(metrics.stat().st_mtime))}"


def summary(rows: list[Row], events: list[Row], model: ModelConfig, starts: Sequence[Row] = ()) -> dict[str, str]:
    """Summarize the run in one phrase for each quantity that its files have."""
    found = {"model": f"{printable(model.name)}, {model.num_params():,} parameters"}
    if validated := [(row["val_loss"], row["step"]) for row in rows if row.get("val_loss") is not None]:
        best, at = min(validated)
        found["validation loss"] = f"{_loss(validated[-1][0])} (best {_loss(best)} at step {at:,.0f})"
        perplexity = math.exp(min(validated[-1][0], 700))
        found["perplexity"] = f"{perplexity:,.2f}" if perplexity < 1e6 else f"{perplexity:.1e}"
    if bits := [row["val_bpb"] for row in rows if row.get("val_bpb") is not None]:
        found["bits per byte"] = _loss(bits[-1])
    if parts := last_by_source(rows):
        found["by source"] = ", ".join(parts)
    if trained := [row for row in rows if row.get("loss") is not None]:
        found["training loss"] = _loss(trained[-1]["loss"])
        found["speed"] = f"{mean_speed(trained, tokens_before(rows, starts)):,.0f} tokens/s"
        if mfu := [row["mfu"] for row in trained if row.get("mfu") is not None]:
            found["speed"] += f", MFU {sum(mfu) / len(mfu):.1%}"
        found["peak memory"] = f"{max(row.get('max_memory_gb') or 0 for row in trained):.2f} GB"
    counts = [(kind, sum(event["kind"] == kind for event in events)) for kind in ("restart", "checkpoint", "skip")]
    found["events"] = ", ".join(f"{count} {kind}{'s' * (count != 1)}" for kind, count in counts)
    if len(events) > 1:
        times = [event["time"] for event in events]
        found["elapsed"] = duration(max(times) - min(times))
    return found


def progress(rows: list[Row], starts: list[Row], tokens_per_step: int, events: Sequence[Row] = ()) -> dict[str, str]:
    """Say how far the run is, what that has taken and, if its last start recorded ``max_steps``, what is left."""
    step, tokens = max((at["step"], at["tokens"]) for at in (rows[-1], *events[-1:]))  # it may end between two rows
    found = {"progress": f"step {step:,.0f}, {tokens:,.0f} tokens"}
    known = starts[-1] if starts else {}
    max_steps, speed = known.get("max_steps"), next((s for r in rows[::-1] if (s := r.get("tokens_per_second"))), 0)
    if is_count(max_steps) and max_steps:
        found["progress"] = f"step {step:,.0f} of {max_steps:,} ({step / max_steps:.1%}), {tokens:,.0f} tokens"
        if speed > 0 and step < max_steps:
            seconds = (max_steps - step) * tokens_per_step / speed
            found["time left"] = f"{duration(seconds)}, without validations and saves"
    hours, before = 0.0, tokens_before(rows, starts)
    for row in rows:  # the ranks of a step are those of the last start before it
        ranks = next((s["world_size"] for s in starts[::-1] if s["step"] < row["step"]), 0)
        if (speed := row.get("tokens_per_second") or 0) > 0:  # and not of a validation between two of these
            hours += ranks * (row["tokens"] - before) / speed / 3600
            before = row["tokens"]
    if hours:
        what = "CPU" if str(known.get("device", "")).startswith("CPU") else "GPU"
        found[f"{what}-hours"] = (f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}") + " in steps"
    return found


def surroundings(starts: list[Row]) -> dict[str, str]:
    """Return the hardware, versions, commit and command of the last of ``starts``; earlier versions recorded none."""
    known = starts[-1] if starts else {}
    found = {}
    if device := known.get("device"):
        nodes = known.get("nodes")
        found["hardware"] = f"{known['world_size']} x {device}" + (f" on {nodes} nodes" if nodes != 1 else "")
    if isinstance(versions := known.get("versions"), dict):
        found["software"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    found |= {key: known[key] for key in ("commit", "command") if known.get(key)}
    return {key: printable(text, 1000) for key, text in found.items()}


def smooth(rows: list[Row]) -> int:
    """Add ``smooth``, the mean training loss of the rows around it, to each row that has a loss; return its steps.

    The window is centered, so that the mean does not lag: a fiftieth of the run's rows, but at least five. It shrinks
    towards the ends, where fewer rows are left on one side.
    """
    trained = [row for row in rows if is_finite(row.get("loss"))]
    losses = np.array([row["loss"] for row in trained], dtype=np.float64)
    half = max(len(trained) // 100, 2)
    scale = max(np.abs(losses).max(initial=0), 1e-300)  # a sum of the largest losses could overflow
    sums = np.concatenate([[0.0], np.cumsum(losses / scale)])
    at = np.arange(len(trained))
    reach = np.minimum(np.minimum(at, at[::-1]), half)
    means = (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1) * scale
    for row, mean in zip(trained, means.tolist(), strict=True):
        row["smooth"] = mean
    apart = (trained[-1]["step"] - trained[0]["step"]) / (len(trained) - 1) if len(trained) > 1 else 1
    return round((2 * half + 1) * apart)


def thin(rows: list[Row], buckets: int = BUCKETS) -> list[Row]:
    """Return ``rows``, of a long run only those with the lowest and the highest training loss of each bucket.

    The same is done for validations, in a fourth as many buckets.
    """
    if len(rows) <= 2 * buckets:
        return rows
    kept = {0, len(rows) - 1}
    for name, most in (("loss", buckets), ("val_loss", max(buckets // 4, 1))):
        having = [i for i, row in enumerate(rows) if row.get(name) is not None]
        size = -(-len(having) // most) if len(having) > 2 * most else 1
        for first in range(0, len(having), size):
            bucket = [(rows[i][name], i) for i in having[first : first + size]]
            kept |= {min(bucket)[1], max(bucket)[1]}
    return [rows[i] for i in sorted(kept)]


def where_time_goes(rows: list[Row], buckets: int = TIME_BUCKETS) -> list[Row]:
    """Divide a run into at most as many ``buckets``, and return which share of each one's time each wait took.

    A bucket has the step and the tokens at its end; the first is there twice, with those at its beginning as well.
    What the slowest rank costs the others is estimated: it is taken to be as slow in all of a step as in the forward
    pass that is timed.
    """
    table, before = [], rows[0]["step"]
    for row in rows:
        in_steps = (row["step"] - before) * _seconds(row, "step_seconds")
        if in_steps <= 0:
            continue
        before = row["step"]
        seconds = {what: _seconds(row, column) for column, what in WAITS.items()}
        seconds["data"] = min(seconds["data"], in_steps)
        median, slowest = (_seconds(row, f"forward_seconds_{which}") for which in ("median", "slowest"))
        share_lost = 1 - median / slowest if slowest > median else 0.0
        seconds["slowest rank, estimated"] = (in_steps - seconds["data"]) * share_lost
        total = in_steps + seconds["checkpoints"] + seconds["validation"]
        table.append({"step": row["step"], "tokens": row["tokens"], "total": total} | seconds)
    size = -(-len(table) // buckets) or 1
    found = []
    for first in range(0, len(table), size):
        bucket = table[first : first + size]
        total = sum(interval["total"] for interval in bucket)
        shares = {what: sum(interval[what] for interval in bucket) / total for what in list(table[0])[3:]}
        found.append({"step": bucket[-1]["step"], "tokens": bucket[-1]["tokens"]} | shares)
    return [found[0] | {"step": rows[0]["step"], "tokens": rows[0]["tokens"]}, *found] if found else []


def picture(rows: list[Row], width: int = 68, height: int = 12) -> list[str]:
    """Draw training and validation loss over the tokens for a terminal, as lines of braille dots."""
    curves = [[(row["tokens"], row[name]) for row in rows if is_finite(row.get(name))] for name in ("loss", "val_loss")]
    losses = [loss for curve in curves for _, loss in curve]
    if not losses:
        return []
    low, high, right = min(losses), max(losses), max(tokens for curve in curves for tokens, _ in curve) or 1
    scale = max(abs(low), abs(high)) or 1  # a difference of the largest numbers could overflow
    span = high / scale - low / scale or 1
    training, points = ([(x / right, (high / scale - y / scale) / span) for x, y in curve] for curve in curves)
    points += training[-1:]
    for (x0, y0), (x1, y1) in itertools.pairwise(training):  # joined by a line
        points += [(x0 + (x1 - x0) * k / width, y0 + (y1 - y0) * k / width) for k in range(width)]
    dots = [[0] * width for _ in range(height)]
    for x, y in points:
        column, row = round(x * (2 * width - 1)), round(y * (4 * height - 1))
        dot = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))[column % 2][row % 4]
        dots[row // 4][column // 2] |= dot
    labels = {0: _loss(high, 3), height - 1: _loss(low, 3), height // 2: "loss"}
    lines = [f"{labels.get(i, ''):>8} │" + "".join(chr(0x2800 + c) for c in row) for i, row in enumerate(dots)]
    return [*lines, " " * 8 + " └" + "─" * width, " " * 10 + f"0{f'{right:,.0f} tokens':>{width - 1}}"]


def _seconds(row: Row, column: str) -> float:
    """Return the seconds in a cell, 0 for those that no run can have taken."""
    value = row.get(column)
    return float(value) if value is not None and 0 < value < 1e9 else 0.0


def _setting(value: Any) -> str:
    """Return a setting's value as YAML has it."""
    return printable(value if isinstance(value, str) else json.dumps(value, default=str), 200)


def _loss(loss: float, digits: int = 4) -> str:
    """Format a loss; one far from those of language models as a power of ten."""
    is_usual = loss == 0 or 1e-3 <= abs(loss) < 1e4
    return f"{loss:.{digits}f}" if is_usual else f"{loss:.1e}"


def _rounded(value: Any) -> Any:
    """Return ``value``, a float with six digits: more would not be visible, but double the size of the page."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _table(file: Any) -> list[Row]:
    """Read the rows of a CSV of evaluations, ``tokens`` and ``value`` as numbers; [] if there is no file."""
    rows = []
    for row in complete_rows(file.read_text("utf-8", "replace")) if file.is_file() else []:
        with contextlib.suppress(KeyError, ValueError):
            numbers = {name: float(row[name]) for name in ("tokens", "value")}
            if all(map(is_finite, numbers.values())):  # else it was damaged
                rows.append(row | numbers)
    return rows
