"""Print a run's progress: a summary at either end and, between them, a bar in a terminal or else plain lines."""

import json
import os
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console as Terminal
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tinyllama import byte_size, printable, stdio
from tinyllama.checkpoint import resume
from tinyllama.checkpoint.names import step_dir
from tinyllama.checkpoint.state import TrainState
from tinyllama.monitor.profile import PERFETTO
from tinyllama.monitor.rows import Row, console_line, is_finite, last_by_source, mean_speed, numbers
from tinyllama.ops import choice
from tinyllama.throughput import duration
from tinyllama.train.launch import World
from tinyllama.train.run import Run

Summary = Iterator[tuple[str, str]]

WIDTH = 100  # columns of a summary in a file
TO_COPY = ("saved", "next", "")  # keys of a summary whose values are paths and commands: one line each, without a frame
ALARM = "bold red"
STYLES = {
    "start": "bold",
    "validation": "cyan",
    "checkpoint": "green",
    "skip": "yellow",
    "stop": "bold",
    "failure": ALARM,
}


class Console:
    """Shows a run of ``max_steps`` steps that stands at ``step``; in a terminal, with a bar from start to stop."""

    def __init__(self, max_steps: int, step: int) -> None:
        self.step = step
        self._max_steps = max_steps
        self._numbers = ""
        self._seconds_left: float | None = None
        self._first: tuple[int, float] | None = None  # the first step done, and when
        self._pace: float | None = None  # seconds a step
        self._live = None
        if in_terminal():
            self._live = Live(get_renderable=self._render, refresh_per_second=4, console=Terminal(highlight=False))

    @stdio.best_effort()
    def start(self) -> None:
        """Show the bar, if there is one."""
        if self._live:
            self._live.start()

    @stdio.best_effort()
    def stop(self) -> None:
        """Leave the bar as it is now."""
        if self._live:
            self._live.stop()

    @stdio.best_effort()
    def line(self, text: str, kind: str = "") -> None:
        """Print a line that stays; errors and a stop that was not planned are alarms."""
        text = printable(text)
        if self._live:
            style = ALARM if text.startswith("error: ") else STYLES.get(kind, "")
            self._live.console.print(Text(text, style), soft_wrap=True)
        else:
            print(text, flush=True)

    def reached(self, steps: list[int]) -> None:
        """Show that ``steps`` are done, which have just been read; until there is a row, their pace tells what is left.

        It does not count the first one, which compiles. Where two are read at once, the host has waited for the device.
        """
        self.step = steps[-1]
        if self._numbers or len(steps) > 1:
            return
        now = time.perf_counter()
        if self._first is None:
            self._first = self.step, now
        else:
            self._pace = (now - self._first[1]) / (self.step - self._first[0])
            self._seconds_left = self._pace * (self._max_steps - self.step)

    def metrics(self, row: Row, seconds_left: float | None) -> None:
        """Show a row of training: under the bar, or as a line."""
        if self._first and not self._numbers:  # what the caller says counts the first step
            seconds_left = self._pace and self._pace * (self._max_steps - int(row["step"] or 0))
        self.step, self._seconds_left, self._numbers = int(row["step"] or 0), seconds_left, "  ".join(numbers(row))
        if not self._live:
            self.line(console_line(row, self._max_steps, seconds_left))

    def _render(self) -> RenderableType:
        counter = f"step {self.step:,}/{self._max_steps:,}  {self.step / self._max_steps:.1%}"
        if self._seconds_left is not None:
            counter += f"  {duration(self._seconds_left)} left"
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        bar = ProgressBar(self._max_steps, self.step, complete_style="cyan", finished_style="green")
        head.add_row(bar, counter)
        return Group(head, Text(self._numbers, "dim"))


def in_terminal() -> bool:
    """Return whether stdout is a terminal that can move its cursor."""
    return sys.stdout.isatty() and not Terminal().is_dumb_terminal


@stdio.best_effort()
def show_summary(title: str, summary: Summary) -> None:
    """Print a summary: framed in a terminal, but for what is there to copy, else lines of at most WIDTH columns."""
    if not in_terminal():
        for key, value in summary:
            line = f"{key:<8} {printable(value)}"
            if key not in TO_COPY:
                indent = " " * 9
                line = textwrap.fill(
                    line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
                )
            print(line, flush=True)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column(overflow="fold")
    below = []
    for key, value in summary:
        if key in TO_COPY:
            below.append(Text.assemble((f"{key:<8} ", "bold cyan"), printable(value)))
        else:
            table.add_row(key, Text(printable(value)))
    terminal = Terminal(highlight=False)
    terminal.print(Panel(table, title=f"[bold]{title}", title_align="left", border_style="cyan"))
    for text in below:
        terminal.print(text, soft_wrap=True)


def start_summary(run: Run, dtypes: str, hosts: list[str]) -> Summary:
    """Summarize what is about to happen."""
    args, done = run.args, run.done
    samples = done.samples + run.samples_left
    if args.dry_run:  # a run that trains logs both when it starts
        yield "start", f"{run.origin} at step {done.step}"
        if changes := resume.changed(run.resume, run.resolved()) if run.resume else {}:
            yield "changed", changes_in_words(changes)
    yield "model", f"{run.config.name}: {run.config.num_params():,} parameters, context {run.config.block_size:,}"
    for host in hosts:
        yield "ranks", host
    yield "weights", _layout(run.world)
    yield "dtypes", dtypes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and args.train.precision != "fp32":
        yield "slow", "bf16 is made for GPUs; on a CPU --train.precision fp32 can be ten times as fast"
    compiled = args.train.compiles(device)
    yield "ops", f"{choice.describe(run.ops)}, blocks {'compiled' if compiled else 'not compiled'}"
    yield (
        "batch",
        f"{_count(args.train.global_batch_size, 'sample')} a step = {_count(run.world.size, 'rank')} x "
        f"{_count(run.accumulation, 'micro-batch')} x {_count(args.train.micro_batch_size, 'sample')}, "
        f"{run.tokens_per_step:,} tokens",
    )
    yield "length", _length(run, run.max_steps, samples)
    if run.resume:
        yield "done", _length(run, done.step, done.samples)
        yield "left", _length(run, run.steps_left, run.samples_left)
    for dataset, drawn in zip(run.sources, run.mixture.samples_by_source(samples), strict=True):
        epochs = drawn / dataset.num_blocks(run.config.block_size)
        share = drawn / samples
        yield "data", f"{dataset.path}: {dataset.tokens:,} tokens, {share:.2%} of the samples, {epochs:.2f} epochs"
    for dataset in run.validation:
        yield "held out", f"{dataset.path}: {dataset.tokens:,} tokens, every {args.eval.interval:,} steps"
    steps = run.max_steps
    marks = {"start": 0, "warm": max(args.optim.warmup_steps - 1, 0), "half": steps // 2, "end": steps - 1}
    if run.resume:  # at what is done it has been whatever the settings were then
        marks = {"now": done.step} | {name: step for name, step in marks.items() if step > done.step}
    yield "lr", "  ".join(f"{name} (step {step}) {run.lr_at(step):.3e}" for name, step in marks.items())
    yield "saves", _checkpoint_policy(run)
    if traced := run.profiled:
        yield "trace", f"steps {traced.start} to {traced.stop - 1} of every rank, into {run.profile_dir}"
    elif run.args.log.profile:
        yield "trace", f"none: log.profile {run.args.log.profile} was over at step {done.step}"


def changes_in_words(changes: dict[str, list[Any]]) -> str:
    """Return what ``resume.changed`` has found, as a line; values are written as in a YAML file."""

    def value(setting: Any) -> str:
        return setting if isinstance(setting, str) else json.dumps(setting, ensure_ascii=False)

    return ", ".join(f"{key} {value(was)} -> {value(now)}" for key, (was, now) in changes.items())


def _layout(world: World) -> str:
    """Return how many copies of the weights there are, and on how many ranks each lies."""
    if world.size == 1:
        return "1 copy on 1 rank"
    if world.shard == 1:
        return f"{world.replicas} copies, one on each rank"
    copies = "1 copy," if world.replicas == 1 else f"{world.replicas} copies, each"
    return f"{copies} sharded over {world.shard} ranks"


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith('ch') else 's'}"


def _length(run: Run, steps: int, samples: int) -> str:
    tokens = samples * run.config.block_size
    return f"{steps:,} steps, {samples:,} samples, {tokens:,} tokens, {samples / run.num_blocks:.2f} epochs"


def _checkpoint_policy(run: Run) -> str:
    policy = run.args.checkpoint
    size = byte_size(run.args.optim.checkpoint_bytes(run.config))
    kept = "all" if policy.keep_last is None else f"the newest {policy.keep_last}"
    if policy.keep_last is not None and policy.keep_every is not None:
        kept += f" and every {policy.keep_every:,}th step"
    out_dir = run.out_dir.absolute()
    free = shutil.disk_usage(next(folder for folder in (out_dir, *out_dir.parents) if folder.exists())).free
    how = "in the background" if policy.asynchronous else "while training waits"
    return (
        f"every {policy.interval:,} steps, on a signal and at the end, {how}; {kept} kept; {size} each, "
        f"{byte_size(free)} free in {run.args.out_dir}"
    )


def end_summary(
    run: Run,
    rows: list[Row],
    seconds: dict[str, float],
    state: TrainState,
    problems: Sequence[str] = (),
    tokens_before: int = 0,
) -> Summary:
    """Summarize the run from ``rows`` of metrics.csv: its losses, where the time went, and what to do next.

    ``problems`` are what the start of a long log may have hidden; ``tokens_before`` were done before the first row.
    """
    losses = [(row["val_loss"], row["step"]) for row in rows if row.get("val_loss") is not None]
    if losses:
        (last, at), finite = losses[-1], [pair for pair in losses if is_finite(pair[0])]
        best = ", best {:.4f} at step {:,}".format(*min(finite)) if finite else ""
        yield "val_loss", f"{last:.4f} at step {at:,}{best}"
    if bits := [(row["val_bpb"], row["step"]) for row in rows if row.get("val_bpb") is not None]:
        yield "val_bpb", f"{bits[-1][0]:.4f} bits per byte at step {bits[-1][1]:,}"
    if parts := last_by_source(rows):
        yield "sources", ", ".join(parts)
    if trained := [row for row in rows if row.get("loss") is not None]:
        yield "loss", f"{trained[-1]['loss']:.4f} at step {trained[-1]['step']:,}"
        yield "tokens", f"{state.tokens:,} in all; {mean_speed(trained, tokens_before):,.0f} tokens/s on average"
    yield "time", "since this start: " + ", ".join(f"{name} {duration(spent)}" for name, spent in seconds.items())
    if traces := sorted(run.profile_dir.glob("steps-*.json.gz")):
        yield "traces", f"{len(traces)} in {run.profile_dir}, for {PERFETTO}"
    yield from (("problem", problem) for problem in problems)
    saved, out_dir = step_dir(run.out_dir / "checkpoints", state.step), shlex.quote(str(run.out_dir))
    yield "saved", str(saved) if saved.exists() else "nothing, as no step was done"
    if state.step < run.max_steps:
        from_where = f"starts from {run.resume} again" if run.resume else "starts anew"
        from_where = "resumes from there" if saved.exists() else from_where
        if job := batch_job():
            yield "next", f"sbatch ...    # the script of job {job}, unless Slurm requeues it: {from_where}"
        else:
            yield "next", f"{same_command(run.world.launcher)}    # {from_where}"
    else:
        hf = shlex.quote(str(run.out_dir / "hf"))
        yield "next", f"python scripts/convert_lit_checkpoint.py {out_dir} {hf} --tokenizer TOKENIZER"
    if saved.exists():
        yield "", f"python scripts/generate.py {out_dir} --tokenizer TOKENIZER --prompt TEXT"
    if rows:
        yield "", f"python scripts/report.py {out_dir}"


def batch_job() -> str | None:
    """Return the id of the batch job of Slurm that this is part of; None in a shell, even if that is in a job."""
    return os.environ.get("SLURM_JOB_ID") if os.environ.get("ENVIRONMENT") == "BATCH" else None


def same_command(launcher: str | None) -> str:
    """Return the command that started this process, but for its launcher's own flags, which ranks cannot see."""
    started = {None: "python", "torchrun": "torchrun ...", "srun": "srun ... python"}
    return f"{started.get(launcher, 'the same command of your launcher, for python')} {shlex.join(sys.argv)}"
