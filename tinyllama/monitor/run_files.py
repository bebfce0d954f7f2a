"""Read what a run has written, without what is damaged: metrics.csv, samples.jsonl and the lines of events.jsonl."""

import contextlib
import csv
import json
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama import atomic, printable
from tinyllama.checkpoint import reader
from tinyllama.checkpoint.names import run_dir, step_of
from tinyllama.checkpoint.state import is_count
from tinyllama.monitor.rows import FORMATS, WAITS, Row
from tinyllama.train.preemption import is_planned

TIMES = ("step_seconds", "forward_seconds_median", "forward_seconds_slowest", "slowest_rank")
COLUMNS = ("step", "tokens", *FORMATS, "skipped", *TIMES, *WAITS)
"""Columns of metrics.csv: optimizer steps and tokens done, training loss of the step and validation loss (nats a
token), the latter in bits per byte of text where the validation data record their bytes, learning rate, gradient norm
before clipping, tokens a second over the whole world, model FLOPs utilization (0 to 1), peak memory of rank 0 (GB: of
the GPU, else of the process), steps skipped so far; of the steps since the row before: mean time of one, and of its
first micro-batch's forward pass in the blocks, without waiting for others, on the median rank and on the slowest,
which is named (none of the three on one rank); since then the time for which training waited for data (the rank with
the longest), for checkpoints and for validations, all in seconds. Then, for each source, a column ``tokens_FOLDER``:
tokens drawn from it so far; and for each validation source its own ``val_loss/FOLDER`` and ``val_bpb/FOLDER``. A cell
without a value is empty."""
BY_SOURCE = ("val_loss/", "val_bpb/")
VALIDATED_BY = ("data.document_mask", "eval.max_samples")
"""settings that held-out losses depend on, which may change during a run"""
ENVIRONMENT = {"command", "commit", "device", "nodes", "tokens", "versions", "max_steps"}
"""Keys of a start event that the cards at the top of a report show, so that its timeline need not."""
TOO_LARGE = RecursionError, MemoryError
"""What reading a file raises that is nested too deep or declares too much."""


def source_columns(paths: list[str]) -> list[str]:
    """Return a column's name for each source: its folder's, with a number where another column has it."""
    names: list[str] = []
    for path in paths:
        name = folder = f"tokens_{printable(Path(path).name)}"
        number = len(names)
        while name in (*COLUMNS, *names):
            name, number = f"{folder}_{number}", number + 1
        names.append(name)
    return names


def read_until(file: Path, step: int) -> tuple[list[Row], str]:
    """Read a metrics.csv up to ``step``, and what to say of it if it is damaged, when a copy of it is kept."""
    content = file.read_bytes() if file.is_file() else b""
    rows, damage = read_metrics(file), ""
    lines = content.count(b"\n") - 1  # without the header and an unfinished last line
    if lines > len(rows) or (content and not rows and not content.startswith(b"step,")):
        atomic.write(copy := file.with_name("metrics.csv.damaged"), content)
        damage = f"{max(lines, 1) - len(rows)} lines of {file} cannot be read: {copy} is what it was"
    return [row for row in rows if row["step"] <= step], damage


def is_begun_again(out_dir: Path, settings: str, data: dict[str, Any], step: int) -> bool:
    """Return whether the last start in ``out_dir`` was at ``step``, with these ``settings`` and ``data``, and unsaved.

    Then a fresh run, or a branch, does its steps again: its rows are dropped as those that a resumed run does again.
    """
    start: dict[str, Any] = {}
    for event in read_json_lines(out_dir / "events.jsonl"):
        if event.get("event") in ("start", "checkpoint"):
            start = event if event["event"] == "start" else {}
    config = out_dir / "config.yaml"
    is_same = start.get("step") == step and start.get("data") == data
    return is_same and config.is_file() and config.read_text("utf-8", "replace") == settings


def set_aside(file: Path) -> list[str]:
    """Copy a file of the run that holds more than the header of metrics.csv; return what to say of the copy, if any.

    Each copy has a name of its own: that of a run of weeks survives a start that ends after a few rows.
    """
    content = file.read_bytes() if file.is_file() else b""
    if not (content.partition(b"\n")[2] if content.startswith(b"step,") else content):
        return []
    atomic.write(copy := file.with_name(f"{file.name}.aside-{secrets.token_hex(4)}"), content)
    return [f"set aside: {copy} is what {file} was before this run, which starts anew"]


def read_metrics(file: Path) -> list[Row]:
    """Read the rows of a metrics.csv, numbers as such and empty cells as None; [] if there is no file.

    A row that is, or was when killed, being written is left out, and so is one that was damaged.
    """
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    return parse_metrics(text[: text.rfind("\n") + 1])


def parse_metrics(text: str) -> list[Row]:
    """Return the rows in ``text``, a header and complete lines, without those that were damaged."""
    rows = []
    for cells in complete_rows(text):
        numbers = [name for name in cells if name in COLUMNS or name.startswith(("tokens_", *BY_SOURCE))]
        with contextlib.suppress(ValueError):
            row = cells | {name: _number(cells[name]) for name in numbers}
            if isinstance(row.get("step"), int) and isinstance(row.get("tokens"), int):
                rows.append(row)
    return rows


def complete_rows(text: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a CSV that have a cell for each column; a row is a line, so damage to one costs no other."""
    columns: list[str] | None = None
    for line in text.splitlines():
        try:
            cells = next(csv.reader([line]))
        except csv.Error:  # a cell of more than 131,072 characters
            cells = []
        if columns is None:
            columns = cells
        elif len(cells) == len(columns):
            yield dict(zip(columns, cells, strict=True))


def _number(cell: str) -> float | None:
    """Return what is in ``cell``: a count as an int, any other number as a float, None for nothing."""
    number = float(cell) if cell else None
    return int(cell) if number is not None and cell.isdigit() and number < 2**63 else number


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield what the lines of a file hold, without those that were damaged or half written."""
    for line in file.read_text("utf-8", "replace").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError, *TOO_LARGE):
            content = json.loads(line)
            if isinstance(content, dict):
                yield content


def read_starts(out_dir: Path) -> list[dict[str, Any]]:
    """Return the events of the run's starts that say at which step and on how many ranks.

    Those from before rows were set aside are of another run.
    """
    starts: list[dict[str, Any]] = []
    for event in read_json_lines(out_dir / "events.jsonl"):
        if event.get("event") == "set_aside":
            starts = []
        elif event.get("event") == "start" and is_count(event.get("step")) and is_count(event.get("world_size")):
            starts.append(event)
    return starts


def last_validation(starts: Sequence[dict[str, Any]]) -> list[str] | None:
    """Return the fingerprints of the validation data at the last start; None if an earlier version recorded none."""
    data = starts[-1].get("data") if starts else None
    found = data.get("validation") if isinstance(data, dict) else None
    return found if isinstance(found, list) else None


def is_validated_otherwise(row: Row, starts: Sequence[dict[str, Any]], validation: list[str] | None) -> bool:
    """Return whether the losses of ``row`` cannot be compared with those of the last of ``starts``.

    They are on other data than those with the fingerprints ``validation``, or a later start changed a setting of
    VALIDATED_BY. Data that are unknown (None), as in a run of an earlier version, are taken for the same.
    """
    began = [i for i, start in enumerate(starts) if start["step"] < max(row["step"], 1)]
    num_begun = began[-1] + 1 if began else 0
    changes = [change for start in starts[num_begun:] if isinstance(change := start.get("changed"), dict)]
    if any(key in change for change in changes for key in VALIDATED_BY):
        return True
    return None not in (then := last_validation(starts[:num_begun]), validation) and then != validation


def tokens_before(rows: Sequence[Row], starts: Sequence[dict[str, Any]]) -> int:
    """Return the tokens that were done before the first of ``rows``, which a branch did not do itself.

    They are those of the run's first start; earlier versions recorded none.
    """
    found: Any = next((start.get("tokens") for start in starts if rows and start["step"] <= rows[0]["step"]), 0)
    return int(found) if is_count(found) else 0


def branched_from(out_dir: Path) -> Path | None:
    """Return the step directory of another run that the run in ``out_dir`` continues, as the path it was given by.

    A step that this run has saved is its own, whatever its folder was called then.
    """
    origin: Path | None = None
    saved: set[int] = set()
    for event in read_json_lines(out_dir / "events.jsonl"):
        try:
            if event["event"] == "checkpoint":
                saved.add(event["step"])
            if event["event"] != "start":
                continue
            if "resumed_from" not in event:  # of a version that did not record it
                event |= {"resumed_from": reader.read_settings(out_dir)["train"]["resume"]}
            if event["resumed_from"] is None:
                origin, saved = None, set()
                continue
            step_dir = Path(event["resumed_from"])
            # the latter of a run whose first events are gone
            is_own = event["step"] in saved or run_dir(step_dir).resolve() == out_dir.resolve()
            if not is_own and step_of(step_dir) == event["step"]:
                origin = step_dir
        except (ValueError, KeyError, TypeError, OSError, *TOO_LARGE):
            continue  # it was damaged
    return origin


def read_events(file: Path, counts: dict[float, float]) -> list[dict[str, Any]]:
    """Read the events of a run: kind, step, tokens at that step, time (s since 1970), and details in one line.

    ``counts`` are the tokens at some steps; between those they are interpolated.
    """
    steps, tokens = zip(*sorted(counts.items()), strict=True)
    events: list[dict[str, Any]] = []
    step, kinds = 0, {"start": "start"}
    for event in read_json_lines(file):
        try:
            kind, at, found = str(event.pop("event")), float(event.pop("time")), event.pop("step", None)
            found = step if found is None else int(found)
        except (ValueError, KeyError, TypeError, OverflowError):
            continue  # it was damaged
        if not (0 <= at < 1e12 and 0 <= found < 2**63):  # neither a date nor a step
            continue
        step = found
        if kind == "stop" and not is_planned(event.get("by")):
            kind = "failure"
        shown = {key: value for key, value in event.items() if key not in ENVIRONMENT and value not in (None, [], {})}
        details = ", ".join(f"{key} {value}" for key, value in shown.items())
        done = round(float(np.interp(step, steps, tokens)))
        event = {"kind": printable(kinds.get(kind, kind), 40), "step": step, "tokens": done}
        events.append(event | {"time": at, "details": printable(details, 1000)})
        if kind == "start":
            kinds["start"] = "restart"  # any later one
    return events


def failed_save(file: Path) -> str | None:
    """Return why the last save in events.jsonl failed, if it did."""
    error = None
    for event in read_json_lines(file):
        kind = event.get("event")
        if kind == "checkpoint_failed":
            error = str(event.get("error"))
        elif kind in ("start", "checkpoint", "done"):
            error = None
    return error


def read_samples(file: Path) -> list[dict[str, Any]]:
    """Read samples.jsonl by step; of a step that was done again, what came of it last."""
    kinds = {"step": is_count, "tokens": is_count, "prompt": is_text, "text": is_text}
    found = {
        (sample["step"], sample["prompt"]): {name: sample[name] for name in kinds}
        for sample in read_json_lines(file)
        if all(holds(sample.get(name)) for name, holds in kinds.items())
    }
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


def is_text(value: Any) -> bool:
    """Return whether ``value`` is a text."""
    return isinstance(value, str)
