"""Compare runs by their held-out loss: at equal tokens, and what one needs to reach the loss that another ends with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama import InputError, printable
from tinyllama.checkpoint import reader
from tinyllama.checkpoint.names import run_dir, step_of
from tinyllama.checkpoint.resume import leaves
from tinyllama.data.packed import open_packed
from tinyllama.monitor.rows import Row, is_finite
from tinyllama.monitor.run_files import (
    branched_from,
    is_validated_otherwise,
    last_validation,
    parse_metrics,
    read_events,
    read_starts,
)
from tinyllama.throughput import duration

WIDTH = 100
"""columns of a printed line"""
FINGERPRINTS = "fingerprint of data.validation"
"""the key of what the run recorded of its validation data, as its folders may hold other data today"""
POINTS = 10
"""The losses are printed at no more token counts than this, those of validations."""
VAL_LOSS = "val_loss"
"""the column of the held-out loss; that of a validation source is val_loss/NAME"""
OF_THE_FOLDER = {"out_dir", "train.resume"}
"""settings that differ between any two runs"""


@dataclass(frozen=True)
class Curve:
    """The held-out loss of a run since the first step of its history, whichever folders hold it."""

    out_dir: Path
    settings: dict[str, Any]
    """by dotted keys"""
    branched_from: Path | None
    """the step directory of another run that it continues"""
    is_done: bool
    tokens: list[int]
    """tokens at each validation"""
    losses: list[float]
    by_source: dict[str, tuple[list[int], list[float]]]
    """tokens at each validation and the loss then, of each validation source that has losses of its own"""
    clock: tuple[list[int], list[float]] | None
    """tokens, and the seconds of training until then; None where part of the history is missing"""

    def loss_at(self, tokens: float) -> float:
        """Return the loss at ``tokens``, interpolated between validations."""
        return float(np.interp(tokens, self.tokens, self.losses))

    def seconds_at(self, tokens: float) -> float | None:
        """Return the seconds of training until ``tokens``; None where part of the history is missing."""
        return None if self.clock is None else float(np.interp(tokens, *self.clock))

    def tokens_to(self, loss: float) -> float | None:
        """Return the tokens after which the loss is ``loss`` for the first time, interpolated; None if it never is."""
        for i, found in enumerate(self.losses):
            if found <= loss:
                if i == 0:
                    return float(self.tokens[0])
                before, at = self.losses[i - 1], self.tokens[i - 1]
                return at + (before - loss) / (before - found) * (self.tokens[i] - at)
        return None


def read_curves(out_dirs: Sequence[Path]) -> list[Curve]:
    """Read the runs; raises InputError for a single one, one twice, and held-out losses of different data."""
    if len(out_dirs) < 2:
        raise InputError(f"{out_dirs[0]} alone cannot be compared: give the out_dir of another run, too")
    folders = [out_dir.resolve() for out_dir in out_dirs]
    if twice := [out_dir for out_dir, folder in zip(out_dirs, folders, strict=True) if folders.count(folder) > 1]:
        raise InputError(f"{twice[-1]} is given twice: give each run once")
    curves = [read_curve(out_dir) for out_dir in out_dirs]
    first, *others = [validation_of(out_dir) for out_dir in out_dirs]
    for out_dir, other in zip(out_dirs[1:], others, strict=True):
        if differing := different(first, other):
            raise InputError(
                f"{out_dir} and {out_dirs[0]} have held-out losses of another {differing} ({other[differing]}, "
                f"{first[differing]}): compare runs that were validated alike"
            )
    return curves


def read_curve(out_dir: Path) -> Curve:
    """Read the run in ``out_dir`` and its history.

    Raises InputError for a run without a held-out loss, a damaged metrics.csv, and settings of no run.
    """
    if not (out_dir / "metrics.csv").is_file():  # before its settings, which then are not there either
        raise InputError(f"{out_dir / 'metrics.csv'} is not there: give the out_dir of a run that has begun")
    rows, is_whole = history(out_dir, validation_of(out_dir))
    tokens, losses = validations(rows, VAL_LOSS)
    if not losses:
        hint = "compare runs with data.validation, after a validation"
        raise InputError(f"{out_dir / 'metrics.csv'} has no held-out loss (val_loss): {hint}")
    sources = dict.fromkeys(
        name[len(VAL_LOSS) + 1 :] for row in rows for name in row if name.startswith(f"{VAL_LOSS}/")
    )
    events = read_events(out_dir / "events.jsonl", {0: 0})
    return Curve(
        out_dir,
        {key: value for key, value in leaves(read_settings(out_dir)).items() if key not in OF_THE_FOLDER},
        branched_from(out_dir),
        bool(events) and events[-1]["kind"] == "done",
        tokens,
        losses,
        {name: found for name in sources if (found := validations(rows, f"{VAL_LOSS}/{name}"))[1]},
        clock(rows) if is_whole else None,
    )


def validations(rows: list[Row], column: str) -> tuple[list[int], list[float]]:
    """Return the tokens and the losses of the rows that have a finite loss in ``column``."""
    having = [row for row in rows if is_finite(row.get(column))]
    return [row["tokens"] for row in having], [row[column] for row in having]


def history(out_dir: Path, validation: Row, later: Sequence[Path] = ()) -> tuple[list[Row], bool]:
    """Return the rows of a run since its first step, and whether all are there: what it was branched from may be gone.

    Rows of a run with another ``validation`` come without its loss, and so do those of this run from before its
    validation data, or what a held-out loss depends on, changed.
    """
    rows, origin = read_rows(out_dir / "metrics.csv"), branched_from(out_dir)
    starts = read_starts(out_dir)
    now = last_validation(starts)
    for row in rows:
        if row.get(VAL_LOSS) is not None and is_validated_otherwise(row, starts, now):
            _forget_losses(row)
    if origin is None:
        return rows, True
    begins, given, seen = step_of(origin) or 0, run_dir(origin), [*later, out_dir.resolve()]
    beside = out_dir.resolve().parent / given.name  # both may have been moved
    found = [path for path in (given, beside) if (path / "metrics.csv").is_file() and path.resolve() not in seen]
    rows = [row for row in rows if row["step"] > begins]
    if not found:
        return rows, False
    earlier, is_whole = history(found[0], validation, seen)
    if different(validation_of(found[0]), validation):
        for row in earlier:
            _forget_losses(row)
    return [row for row in earlier if row["step"] <= begins] + rows, is_whole


def _forget_losses(row: Row) -> None:
    row.update({name: None for name in row if name.startswith(VAL_LOSS)})


def read_rows(file: Path) -> list[Row]:
    """Read metrics.csv as read_metrics does, but raise InputError for a damaged line, which could hide a loss."""
    text = file.read_text(encoding="utf-8", errors="replace")
    header, *lines = text[: text.rfind("\n") + 1].splitlines() or [""]  # the last line may be being written
    rows: list[Row] = []
    for number, line in enumerate(lines, start=2):
        row = next(iter(parse_metrics(f"{header}\n{line}")), None)
        if row is None or (rows and (row["step"] <= rows[-1]["step"] or row["tokens"] < rows[-1]["tokens"])):
            raise InputError(f"{file} is damaged in line {number}: restore the file, or delete that line")
        rows.append(row)
    return rows


def read_settings(out_dir: Path) -> dict[str, Any]:
    """Read config.yaml of a run."""
    try:
        return reader.read_settings(out_dir)
    except (OSError, ValueError) as error:
        text = f"{out_dir / 'config.yaml'} is not what a run writes there: take that of its newest checkpoint"
        raise InputError(text) from error


def validation_of(out_dir: Path) -> Row:
    """Return the settings that a held-out loss depends on: losses are of the same tokens if these are alike."""
    settings = read_settings(out_dir)
    try:
        return {
            "data.validation": [str(source["path"]) for source in settings["data"]["validation"]],
            FINGERPRINTS: last_validation(read_starts(out_dir)),
            "data.document_mask": settings["data"].get("document_mask", False),
            "eval.max_samples": settings["eval"]["max_samples"],
            "model.block_size": settings["model"]["block_size"],
        }
    except (LookupError, TypeError) as error:
        raise InputError(f"{out_dir / 'config.yaml'} does not say what the run was validated on: restore it") from error


def different(one: Row, other: Row) -> str | None:
    """Return the first setting of two validations that differs; data of one fingerprint may be in two folders."""
    folders = "data.validation"
    ignored = FINGERPRINTS if None in (one[FINGERPRINTS], other[FINGERPRINTS]) else folders  # what was recorded decides
    for key, value in one.items():
        if key == ignored or value == other[key]:
            continue
        if key != folders or _fingerprints(value) != _fingerprints(other[key]):
            return key
    return None


def clock(rows: list[Row]) -> tuple[list[int], list[float]] | None:
    """Return tokens, and the seconds of training until then, by the speeds in ``rows``; None if they have none.

    Validations, checkpoints and the time between a stop and a restart do not count.
    """
    tokens, seconds, speed = [0], [0.0], None
    for row in rows:
        if is_finite(row.get("tokens_per_second")) and row["tokens_per_second"] > 0:
            speed = row["tokens_per_second"]
            seconds.append(seconds[-1] + (row["tokens"] - tokens[-1]) / speed)
            tokens.append(row["tokens"])
    if speed is None:
        return None
    if rows[-1]["tokens"] > tokens[-1]:
        seconds.append(seconds[-1] + (rows[-1]["tokens"] - tokens[-1]) / speed)
        tokens.append(rows[-1]["tokens"])
    return tokens, seconds


def compare(curves: Sequence[Curve]) -> dict[str, Any]:
    """Return the whole comparison as plain values, for JSON."""
    runs = [
        {
            "run": str(curve.out_dir),
            "branched_from": None if curve.branched_from is None else str(curve.branched_from),
            "is_done": curve.is_done,
            "tokens": curve.tokens[-1],
            "seconds": curve.seconds_at(curve.tokens[-1]),
            "loss": curve.losses[-1],
            "best_loss": min(curve.losses),
        }
        for curve in curves
    ]
    common = common_tokens(curves)
    losses = [{"tokens": tokens, "losses": [curve.loss_at(tokens) for curve in curves]} for tokens in common]
    by_source = [
        {
            "source": name,
            "tokens": common[-1],
            "losses": [float(np.interp(common[-1], *curve.by_source[name])) for curve in curves],
        }
        for name in curves[0].by_source
        if common and all(name in curve.by_source for curve in curves)
    ]
    reached = [_reached(curve, target) for target in curves for curve in curves if curve is not target]
    settings = different_settings(curves)
    return {"runs": runs, "losses": losses, "by_source": by_source, "reached": reached, "settings": settings}


def common_tokens(curves: Sequence[Curve]) -> list[int]:
    """Return token counts that all runs have come to, at validations of the first; none if there is none."""
    first, last = max(curve.tokens[0] for curve in curves), min(curve.tokens[-1] for curve in curves)
    counts = [tokens for tokens in curves[0].tokens if first <= tokens < last] + [last] * (first <= last)
    if len(counts) <= POINTS:
        return counts
    return [counts[round(i * (len(counts) - 1) / (POINTS - 1))] for i in range(POINTS)]


def different_settings(curves: Sequence[Curve]) -> dict[str, list[Any]]:
    """Return the settings that differ, a value of each run by key; None where a run does not have it."""
    keys = dict.fromkeys(key for curve in curves for key in curve.settings)
    values = {key: [curve.settings.get(key) for curve in curves] for key in keys}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found)}


def _reached(curve: Curve, target: Curve) -> Row:
    """Say what ``curve`` needs to the last loss of ``target``; shares are of what ``target`` has needed."""
    tokens = curve.tokens_to(target.losses[-1])
    seconds = None if tokens is None else curve.seconds_at(tokens)
    whole = target.seconds_at(target.tokens[-1])
    return {
        "run": str(curve.out_dir),
        "target": str(target.out_dir),
        "loss": target.losses[-1],
        "tokens": tokens,
        "share_of_tokens": tokens / target.tokens[-1] if tokens is not None and target.tokens[-1] else None,
        "seconds": seconds,
        "share_of_seconds": seconds / whole if seconds is not None and whole else None,
        "at_most": tokens == curve.tokens[0],  # the first validation has it, and nobody knows what was before
    }


def lines(curves: Sequence[Curve], found: dict[str, Any]) -> Iterator[str]:
    """Yield ``found``, what ``compare`` returns of these runs, as lines of at most WIDTH columns."""
    names = {str(curve.out_dir): _letters(i) for i, curve in enumerate(curves)}
    for curve, name in zip(curves, names.values(), strict=True):
        origin = f", branched from {curve.branched_from}" if curve.branched_from else ""
        yield _cut(f"{name:<4} {curve.out_dir}{origin}{'' if curve.is_done else ', not done'}", WIDTH)

    yield from ("", "Where each run stands")
    yield from _table(
        ["run", "tokens", "training", "held-out loss", "best"],
        [
            [
                names[run["run"]],
                f"{run['tokens']:,}",
                _time(run["seconds"]),
                _loss(run["loss"]),
                _loss(run["best_loss"]),
            ]
            for run in found["runs"]
        ],
    )
    yield from ("", "Held-out loss at equal tokens, interpolated between validations")
    rows = [[f"{row['tokens']:,}", *map(_loss, row["losses"])] for row in found["losses"]]
    yield from _table(["tokens", *names.values()], rows, first=20, column=10)

    if sources := found["by_source"]:
        yield from ("", f"Held-out loss by validation source after {sources[0]['tokens']:,} tokens")
        rows = [[row["source"], *map(_loss, row["losses"])] for row in sources]
        yield from _table(["source", *names.values()], rows, first=40, column=10)

    yield from ("", "What each run needs to reach another's last held-out loss, and as a share of what that run needed")
    rows = []
    for row in found["reached"]:
        name, target = names[row["run"]], names[row["target"]]
        tokens = "never" if row["tokens"] is None else f"{'<= ' if row['at_most'] else ''}{row['tokens']:,.0f}"
        time = "" if row["tokens"] is None else _time(row["seconds"])
        shares = [_share(row["share_of_tokens"]), _share(row["share_of_seconds"])]
        rows.append([name, f"{target}'s {_loss(row['loss'])}", tokens, shares[0], time, shares[1]])
    yield from _table(["run", "loss", "tokens", "share", "training", "share"], rows)

    yield from ("", "Settings that differ")
    rows = [[key, *map(_value, values)] for key, values in found["settings"].items()]
    yield from _table(["", *names.values()], rows, first=34, column=max((WIDTH - 34) // len(curves) - 1, 20))


def _table(head: list[str], rows: list[list[str]], first: int = 4, column: int = 18) -> Iterator[str]:
    """Yield a table whose first column is ``first`` wide and the others ``column``, in blocks that fit into WIDTH."""
    if not rows:
        yield "none"
        return
    at_once = (WIDTH - first) // (column + 1)
    for start in range(1, len(head), at_once):
        for row in [head, *rows]:
            cells = (f"{_cut(cell, column):>{column}}" for cell in row[start : start + at_once])
            yield " ".join([f"{_cut(row[0], first):<{first}}", *cells]).rstrip()


def _cut(text: str, width: int) -> str:
    """Return ``text`` as a line of at most ``width`` columns: its end is kept, as it tells paths apart."""
    line = printable(text)
    return line if len(line) <= width else f"…{line[len(line) - width + 1 :]}"


def _letters(i: int) -> str:
    """Name the runs A to Z, AA to ZZ and so on."""
    return chr(ord("A") + i % 26) * (i // 26 + 1)


def _loss(loss: float) -> str:
    return f"{loss:.4f}" if loss < 1e4 else f"{loss:.3e}"


def _share(share: float | None) -> str:
    return "" if share is None else f"{share:.3f}"


def _time(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration(seconds)


def _value(value: Any) -> str:
    return "" if value is None else str(value)


def _fingerprints(folders: list[str]) -> list[str]:
    """Return the fingerprints of packed folders, or of what cannot be read its path."""
    found = []
    for folder in folders:
        try:
            found.append(open_packed(folder).fingerprint)
        except (InputError, OSError):
            found.append(folder)
    return found
