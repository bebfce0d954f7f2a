"""What a run says: the console, a row a logged step in metrics.csv, and a line an event in events.jsonl."""

import contextlib
import csv
import io
import json
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from tinyllama import durable
from tinyllama.guard import Verdict
from tinyllama.ops import choice
from tinyllama.run import Run

COLUMNS = (
    "step",
    "tokens",
    "loss",
    "val_loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "max_memory_gb",
    "skipped",
)
"""Columns of metrics.csv: optimizer steps and tokens done, training loss of the step and validation loss (nats a
token), learning rate, gradient norm before clipping, tokens a second over the whole world, model FLOPs utilization
(0 to 1), peak memory of rank 0 (GB: of the GPU, else of the process), steps skipped so far. A cell without a value is
empty."""

Row = dict[str, float | None]


class RunLog:
    """Rank 0's words; the other ranks have one that says nothing."""

    def __init__(self, run: Run, step: int | None, speaks: bool) -> None:
        """Go on after ``step``: rows of later steps, which will be done again, are dropped; None: a fresh run."""
        self._run = run
        self._speaks = speaks
        if not speaks:
            return
        run.out_dir.mkdir(parents=True, exist_ok=True)
        self._metrics, self._events = run.out_dir / "metrics.csv", run.out_dir / "events.jsonl"
        rows: list[dict[str, Any]] = []
        if step is not None and self._metrics.exists():
            with self._metrics.open(newline="", errors="replace") as file:
                rows = [row for row in csv.DictReader(file) if (row["step"] or "").isdigit()]
            rows = [row for row in rows if int(row["step"]) <= step]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows[:-1])
        self._last_at = len(text.getvalue().encode())
        writer.writerows(rows[-1:])
        durable.write(self._metrics, text.getvalue().encode())  # with the last row: a kill from here on loses none
        self._last: dict[str, Any] = rows[-1] if rows else {}

    def row(self, row: Row, seconds_left: float | None = None) -> None:
        """Append ``row`` to metrics.csv, or add it to the last row if that is of the same step, and print it."""
        if self._speaks:
            self._append(row)
            print(console_line(row, self._run.max_steps, seconds_left), flush=True)

    def stop(self, **facts: Any) -> None:
        """Write STOPPED: nobody goes on with this run until a person has read and removed it."""
        if self._speaks:
            durable.write(self._run.out_dir / "STOPPED", (json.dumps(facts) + "\n").encode())
        self.event("stop", f"stopped for good, see {self._run.out_dir / 'STOPPED'}", **facts)

    def verdicts(self, verdicts: list[Verdict]) -> bool:
        """Tell what was skipped; whether the run must stop, which STOPPED in its folder then says."""
        for verdict in verdicts:
            if not verdict.skipped:
                continue
            first, last = verdict.samples
            where = f"step {verdict.step}, samples {first} to {last}"
            what = "a spike" if verdict.finite else f"not finite on rank {verdict.ranks}"
            text = f"skipped {where}: loss {verdict.loss:.4f}, grad_norm {verdict.grad_norm:.3f}: {what}"
            self.event("skip", text, **asdict(verdict))
            if verdict.fatal:
                self.stop(step=verdict.step, samples=last + 1, reason=f"{what}: {where}")
                return True
        return False

    def _append(self, row: dict[str, Any]) -> None:
        if self._last and int(self._last["step"]) == int(row["step"]):
            row = self._last | row
            os.truncate(self._metrics, self._last_at)
        end = self._metrics.stat().st_size
        try:
            with self._metrics.open("a", newline="") as file:
                csv.DictWriter(file, COLUMNS, extrasaction="ignore").writerow(row)
            self._last_at, self._last = end, row
        except OSError:  # a full disk is for the checkpoint to report, and may pass; the console has the row
            os.truncate(self._metrics, end)

    def event(self, name: str, text: str, **facts: Any) -> None:
        """Append an event with its facts to events.jsonl, and print ``text``."""
        if self._speaks:
            with contextlib.suppress(OSError), self._events.open("a") as file:  # it is printed all the same
                file.write(json.dumps({"time": round(time.time(), 3), "event": name, **facts}) + "\n")
            print(text, flush=True)


def console_line(row: Row, max_steps: int, seconds_left: float | None) -> str:
    """One line for ``row`` of a run of ``max_steps`` steps."""
    parts = [f"step {row['step']:>{len(str(max_steps))}.0f}/{max_steps}"]
    formats = {
        "loss": "loss {:.4f}",
        "val_loss": "val_loss {:.4f}",
        "lr": "lr {:.3e}",
        "grad_norm": "grad_norm {:.3f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "mfu {:.1%}",
        "max_memory_gb": "memory {:.2f} GB",
    }
    parts += [text.format(row[name]) for name, text in formats.items() if row.get(name) is not None]
    if row.get("skipped"):
        parts.append(f"skipped {row['skipped']}")
    if seconds_left is not None:
        parts.append(f"{duration(seconds_left)} left")
    return "  ".join(parts)


def start_card(run: Run, world_size: int, shard: int, dtypes: str, hosts: list[str]) -> Iterator[str]:
    """What is about to happen, line by line."""
    args, steps = run.args, run.max_steps
    compiled = args.train.compiles("cuda" if torch.cuda.is_available() else "cpu")
    samples = steps * args.train.global_batch_size
    yield f"model    {run.config.name}: {run.config.num_params():,} parameters"
    for host in hosts:
        yield f"ranks    {host}"
    yield f"shards   {shard} ranks share one copy of the weights, {world_size // shard} copies"
    yield f"dtypes   {dtypes}"
    yield f"ops      {choice.describe(run.ops)}, blocks {'compiled' if compiled else 'not compiled'}"
    yield (
        f"batch    {args.train.global_batch_size} samples a step = {world_size} ranks x {run.accumulation} x "
        f"{args.train.micro_batch_size}, {run.tokens_per_step:,} tokens"
    )
    yield f"length   {steps:,} steps, {samples:,} samples, {steps * run.tokens_per_step:,} tokens"
    for dataset, drawn in zip(run.sources, run.mixture.drawn(samples), strict=True):
        epochs = drawn / dataset.num_blocks(run.config.block_size)
        share = drawn / samples
        yield f"data     {dataset.path}: {dataset.tokens:,} tokens, {share:.2%} of the samples, {epochs:.2f} epochs"
    marks = {"start": 0, "warm": max(args.optim.warmup_steps - 1, 0), "half": steps // 2, "end": steps - 1}
    yield "lr       " + "  ".join(f"{name} (step {step}) {run.lr_at(step):.3e}" for name, step in marks.items())


def duration(seconds: float) -> str:
    """``seconds`` in the two largest of days, hours, minutes and seconds."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02d}h"
    if hours:
        return f"{h}h {m:02d}m"
    return f"{m}m {s:02d}s" if minutes else f"{s}s"


def max_memory_gb(device: torch.device) -> float:
    """Peak memory so far, GB: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
