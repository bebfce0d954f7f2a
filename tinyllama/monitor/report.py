"""One self-contained page from what runs wrote: report.html, which draws with plotly.js and needs no network.

Everything is read from ``out_dir``: metrics.csv, events.jsonl, config.yaml and, where it is there, eval.csv. The page
itself, with its drawing, is report_page.html; here its data are read, smoothed and thinned out.
"""

import importlib.resources
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import yaml

from tinyllama import InputError, __version__, atomic
from tinyllama.config.model import ModelConfig
from tinyllama.monitor.console import mean_speed
from tinyllama.monitor.metrics import read_metrics, whole_rows
from tinyllama.throughput import duration

BUCKETS = 1000
"""Curves of more points than twice this are thinned out to the lowest and highest in each of as many stretches; the
runs of one page share them."""

Facts = dict[str, Any]


def write(out_dirs: list[Path], output: Path) -> None:
    """Write the page of one run, or of several in comparison; raises InputError where there is no run."""
    runs = [read_run(out_dir, BUCKETS // len(out_dirs)) for out_dir in out_dirs]
    names = [run["name"] for run in runs]
    for run, out_dir in zip(runs, out_dirs, strict=True):
        if names.count(run["name"]) > 1:
            run["name"] = str(out_dir)
    for run, label in zip(runs, short([run["name"] for run in runs]), strict=True):
        run["label"] = label
    from plotly.offline import get_plotlyjs

    data = {"runs": runs, "published": _table(importlib.resources.files("tinyllama.eval") / "published_scores.csv")}
    page = (importlib.resources.files("tinyllama.monitor") / "report_page.html").read_text("utf-8")
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # ends no script
    title = f"{len(runs)} runs" if len(runs) > 1 else runs[0]["name"]
    for mark, content in {"TITLE": _escaped(title), "VERSION": __version__, "DATA": text}.items():
        page = page.replace(f"@{mark}@", content)
    try:
        atomic.write(output, page.replace("@PLOTLY@", get_plotlyjs()).encode())
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}): give another --output") from error


def short(names: list[str], most: int = 24) -> list[str]:
    """``names`` for a legend: if one is longer than ``most``, without what all begin and end with, but a word."""
    if max(map(len, names)) <= most or len(set(names)) < 2:
        return names

    def but_a_word(common: str) -> int:
        return max(common.rstrip("_-").rfind(mark) for mark in "_-") + 1

    begin = but_a_word(os.path.commonprefix(names))
    end = but_a_word(os.path.commonprefix([name[begin:][::-1] for name in names]))
    cut = [name[begin : len(name) - end] for name in names]
    return ["…" * (begin > 0) + name + "…" * (end > 0) for name in cut]


def read_run(out_dir: Path, buckets: int = BUCKETS) -> Facts:
    """All that the page shows of the run in ``out_dir``."""
    rows = [_numbers(row) for row in read_metrics(out_dir / "metrics.csv")]
    if not rows:
        raise InputError(f"{out_dir} has no metrics.csv with a row in it: give the out_dir of a run that has begun")
    try:
        config = yaml.safe_load((out_dir / "config.yaml").read_text("utf-8"))
        tokens_per_step = int(config["train"]["global_batch_size"]) * int(config["model"]["block_size"])
        model = ModelConfig(**config["model"])
        model.num_params()
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        text = f"{out_dir / 'config.yaml'} is not what a run writes there: take that of its newest checkpoint"
        raise InputError(text) from error
    events = read_events(out_dir / "events.jsonl", tokens_per_step)
    smooth(rows)
    thinned = thin(rows, buckets)
    sources = [name for name in rows[0] if name.startswith("tokens_") and name != "tokens_per_second"]
    return {
        "name": out_dir.resolve().name,
        "summary": {"state": state(events, out_dir / "metrics.csv")} | summary(rows, events, model),
        "columns": {name: [row.get(name) for row in thinned] for name in [*rows[0], "smooth"]},
        "sources": sources,
        "events": events,
        "evaluations": _table(out_dir / "eval.csv"),
    }


def state(events: list[Facts], metrics: Path) -> str:
    """Whether the run has ended, as far as its folder tells."""
    ends = {"stop": "stopped", "done": "done"}
    if events and events[-1]["kind"] in ends:
        return ends[events[-1]["kind"]]
    return f"not ended; last row {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(metrics.stat().st_mtime))}"


def summary(rows: list[Facts], events: list[Facts], model: ModelConfig) -> dict[str, str]:
    """The run in a few words, by what they speak of."""
    trained = [row for row in rows if row.get("loss") is not None]
    validated = [(row["val_loss"], row["step"]) for row in rows if row.get("val_loss") is not None]
    facts = {"model": f"{model.name}, {model.num_params():,} parameters"}
    facts["progress"] = f"step {rows[-1]['step']:,.0f}, {rows[-1]['tokens']:,.0f} tokens"
    if validated:
        best, at = min(validated)
        facts["validation loss"] = f"{validated[-1][0]:.4f} (best {best:.4f} at step {at:,.0f})"
    if trained:
        facts["training loss"] = f"{trained[-1]['loss']:.4f}"
        facts["speed"] = f"{mean_speed(trained):,.0f} tokens/s"
        if mfu := [row["mfu"] for row in trained if row.get("mfu") is not None]:
            facts["speed"] += f", MFU {sum(mfu) / len(mfu):.1%}"
        facts["peak memory"] = f"{max(row.get('max_memory_gb') or 0 for row in trained):.2f} GB"
    kinds = [event["kind"] for event in events]
    facts["events"] = ", ".join(
        f"{kinds.count(kind)} {kind}{'' if kinds.count(kind) == 1 else 's'}"
        for kind in ("restart", "checkpoint", "skip")
    )
    if len(events) > 1:
        facts["life"] = duration(events[-1]["time"] - events[0]["time"])
    return facts


def read_events(file: Path, tokens_per_step: int) -> list[Facts]:
    """The events of a run's life: kind, step and tokens it had come to, time (s since 1970), and details in a line."""
    events = []
    step = 0
    started = False
    for line in file.read_text("utf-8", "replace").splitlines() if file.is_file() else []:
        try:
            facts = json.loads(line)
            kind, at, found = str(facts.pop("event")), float(facts.pop("time")), facts.pop("step", None)
            found = step if found is None else int(found)
            details = ", ".join(f"{key} {value}" for key, value in facts.items() if value not in (None, [], {}))
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError):
            continue  # it was being written when the process was killed, or was damaged
        if not (0 <= at < 1e12 and 0 <= found < 2**63):  # no date, no step
            continue
        step = found
        if kind == "start":
            kind, started = "restart" if started else "start", True
        events.append({"kind": kind, "step": step, "tokens": step * tokens_per_step, "time": at, "details": details})
    return events


def smooth(rows: list[Facts]) -> None:
    """Add ``smooth``, the exponential mean of the training loss so far, to each row that has a loss.

    Its memory is a two-hundredth of the run's rows, but two at least; the start is not pulled towards 0.
    """
    trained = [row for row in rows if row.get("loss") is not None and math.isfinite(row["loss"])]
    keep = 1 - 1 / max(len(trained) / 200, 2)
    total = weight = 0.0
    for row in trained:
        total, weight = keep * total + row["loss"], keep * weight + 1
        row["smooth"] = total / weight


def thin(rows: list[Facts], buckets: int = BUCKETS) -> list[Facts]:
    """``rows``, or of a long run those with the lowest and highest loss in each stretch and those with a validation."""
    if len(rows) <= 2 * buckets:
        return rows
    size = -(-len(rows) // buckets)
    kept = {0, len(rows) - 1}
    for first in range(0, len(rows), size):
        stretch = range(first, min(first + size, len(rows)))
        with_loss = [i for i in stretch if rows[i].get("loss") is not None]
        if with_loss:
            kept |= {min(with_loss, key=lambda i: rows[i]["loss"]), max(with_loss, key=lambda i: rows[i]["loss"])}
        kept |= {i for i in stretch if rows[i].get("val_loss") is not None}
    return [rows[i] for i in sorted(kept)]


def picture(rows: list[dict[str, str]], width: int = 68, height: int = 12) -> list[str]:
    """The loss over the tokens, for a terminal: lines of braille dots with the axes' ends; training and validation."""
    points: list[tuple[float, float]] = []
    for name in ("loss", "val_loss"):
        cells = [(float(row["tokens"]), float(row[name])) for row in rows if row.get(name)]
        series = [(x, y) for x, y in cells if math.isfinite(y)]
        points += series
        for (x0, y0), (x1, y1) in itertools.pairwise(series if name == "loss" else []):  # joined by a line
            points += [(x0 + (x1 - x0) * k / width, y0 + (y1 - y0) * k / width) for k in range(width)]
    if not points:
        return []
    right, (low, high) = max(x for x, _ in points) or 1, (min(y for _, y in points), max(y for _, y in points))
    span = (high - low) or 1
    dots = [[0] * width for _ in range(height)]
    for x, y in points:
        column, row = round(x / right * (2 * width - 1)), round((high - y) / span * (4 * height - 1))
        dot = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))[column % 2][row % 4]
        dots[row // 4][column // 2] |= dot
    labels = {0: f"{high:.3f}", height - 1: f"{low:.3f}"}
    lines = [f"{labels.get(i, ''):>8} │" + "".join(chr(0x2800 + c) for c in row) for i, row in enumerate(dots)]
    lines[height // 2] = f"{'loss':>8} │" + lines[height // 2][10:]
    return [*lines, " " * 8 + " └" + "─" * width, " " * 10 + f"0{f'{right:,.0f} tokens':>{width - 1}}"]


def _numbers(row: dict[str, str]) -> Facts:
    """A row's cells as numbers; None for none, and for one that JSON has no number for."""
    numbers: Facts = {}
    for name, cell in row.items():
        try:
            numbers[name] = float(cell) if cell and math.isfinite(float(cell)) else None
        except (TypeError, ValueError):
            numbers[name] = None
    return numbers


def _table(file: Any) -> list[Facts]:
    """The rows of a CSV of evaluations with their numbers as such; [] where there is none."""
    if not file.is_file():
        return []
    rows = []
    for row in whole_rows(file.read_text("utf-8", "replace")):
        numbers = _numbers({name: row.get(name, "") for name in ("tokens", "value")})
        if None not in numbers.values():  # else it was damaged
            rows.append(row | numbers)
    return rows


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
