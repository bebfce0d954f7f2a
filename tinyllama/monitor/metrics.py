"""Log a run: metrics of each log interval to metrics.csv, events to events.jsonl, and both to the console."""

import contextlib
import csv
import io
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tinyllama import InputError, atomic
from tinyllama.checkpoint import resume
from tinyllama.checkpoint.names import step_of
from tinyllama.checkpoint.state import TrainState
from tinyllama.config import cli
from tinyllama.model import GPT
from tinyllama.monitor import memory
from tinyllama.monitor.console import Console, batch_job, changes_in_words, end_summary, show_summary
from tinyllama.monitor.environment import environment
from tinyllama.monitor.hook import Hook
from tinyllama.monitor.profile import Trace
from tinyllama.monitor.rows import WAITS, Row, by_source, console_line, is_finite
from tinyllama.monitor.run_files import (
    BY_SOURCE,
    COLUMNS,
    failed_save,
    is_begun_again,
    is_validated_otherwise,
    last_validation,
    read_metrics,
    read_samples,
    read_starts,
    read_until,
    set_aside,
    source_columns,
    tokens_before,
)
from tinyllama.monitor.wandb_logger import Tracker
from tinyllama.train.anomaly import StepResult
from tinyllama.train.collectives import from_rank_zero
from tinyllama.train.evaluate import source_names
from tinyllama.train.preemption import Preemption, is_planned
from tinyllama.train.run import Run

HOOK_EVENTS = {
    "start": "started",
    "stop": "stopped",
    "failure": "failed",
    "done": "finished",
    "skip": "anomaly",
    "checkpoint_failed": "anomaly",
    "metrics_failed": "anomaly",
}
"""What log.on_event is told of the events in events.jsonl; a failure is a stop that was not planned."""


class RunLog:
    """Rank 0's log; that of other ranks does nothing. Use it as a context, which closes what it opened."""

    def __init__(self, run: Run, step: int | None, is_rank_zero: bool) -> None:
        """Collective. Continue after ``step``, or begin a fresh run if it is None, and write config.yaml.

        Rows of later steps, which will be done again, are dropped. What another run has left in the files that a fresh
        run or a new branch rewrites is set aside. Raises InputError on every rank if a file cannot be read or written.
        """
        self._run = run
        self._is_rank_zero = is_rank_zero
        self._seconds = {"training": 0.0, "validation": 0.0, "checkpoints": 0.0}
        self._before = dict(self._seconds)
        self._tracker: Tracker | None = None
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._owners: tuple[GPT, torch.optim.Optimizer] | None = None
        self.trace = Trace(run, self._rank, self.event)
        self._hook: Hook | None = None
        if dist.is_initialized():
            from_rank_zero(lambda: self._open(step))
        elif is_rank_zero:
            self._open(step)

    def _open(self, step: int | None) -> None:
        run = self._run
        self._began = time.perf_counter()
        self._console = Console(run.max_steps, step or 0)
        self._metrics, self._events = run.out_dir / "metrics.csv", run.out_dir / "events.jsonl"
        self._sources = source_columns([source.path for source in run.args.data.sources])
        samples, aside = run.out_dir / "samples.jsonl", []
        config, settings = run.out_dir / "config.yaml", cli.dump(run.resolved())
        self._data = run.data_metadata()
        is_new = step is None or (run.resume is not None and not resume.is_in_run(run.out_dir, run.resume))
        is_other = is_new and not is_begun_again(run.out_dir, settings, self._data, step or 0)
        with _rewriting(self._metrics):
            run.out_dir.mkdir(parents=True, exist_ok=True)
            aside += set_aside(self._metrics) if is_other else []
            rows, damage = ([], "") if is_new or step is None else read_until(self._metrics, step)
            names = [prefix + name for name in source_names([s.path for s in run.validation]) for prefix in BY_SOURCE]
            earlier = rows[0] if rows else ()  # their sources may have had other names
            names += [name for name in earlier if name.startswith(("tokens_", *BY_SOURCE))]
            self._columns = list(dict.fromkeys([*COLUMNS, *self._sources, *names]))
            atomic.write(self._metrics, table := self._csv(rows, header=True))
        if samples.exists():
            with _rewriting(samples):
                aside += set_aside(samples) if is_other else []
                kept = [sample for sample in read_samples(samples) if not is_new and sample["step"] <= (step or 0)]
                atomic.write(samples, "".join(json.dumps(sample) + "\n" for sample in kept).encode())
        with _rewriting(config):
            if is_other and config.is_file() and config.read_bytes() != settings.encode():  # perhaps written by hand
                aside += set_aside(config)
            atomic.write(config, settings.encode())
        self._tail = rows[-1:]  # rows that may change yet, or have found no room, and where they begin in the file
        self._tail_at = table.rfind(b"\n", 0, -1) + 1 if rows else len(table)
        self._is_written = True
        starts, now = read_starts(run.out_dir), self._data["validation"]
        self._validates_other_data = bool(rows and now) and last_validation(starts) not in (None, now)
        validated = [row for row in rows if row.get("val_loss") is not None]
        self._changed = resume.changed(run.resume, run.resolved()) if run.resume else {}
        starts.append({"step": step or 0, "changed": self._changed})  # the one that is to come
        rivals = [row["val_loss"] for row in validated if not is_validated_otherwise(row, starts, now)]
        self._best = min(filter(is_finite, rivals), default=float("inf"))
        if run.args.log.on_event is not None:
            self._hook = Hook(run.args.log.on_event, run.out_dir, self._console.line)
        for text in aside:
            self.event("set_aside", text)
        if damage:
            self.event("metrics_damaged", damage)
        if run.args.log.wandb != "off":
            self._tracker = Tracker(run, -1 if step is None else step, self._console.line)
            for row in rows[:-1]:  # those it missed, if any
                self._tracker.send(row)

    def __enter__(self) -> "RunLog":
        if self._is_rank_zero:
            self._console.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.trace.close(write=kind is None)
        if isinstance(error, torch.OutOfMemoryError) and self._owners:
            text = memory.explain(self._rank, *self._owners, self._run.out_dir / "memory")
            error.add_note(f"error: {text}")  # the last line of the traceback
            self.event("out_of_memory", rank=self._rank, text=text)
        if kind is not None and issubclass(kind, Exception):  # and not a second Ctrl-C, which must not wait
            self.failed(f"{kind.__name__}: {error}")
        if self._is_rank_zero:
            self._console.stop()
        if self._tracker:
            self._tracker.finish()
        if self._hook and kind is None:
            self._hook.wait()

    def failed(self, message: str) -> None:
        """Tell log.on_event of a failure that ends this process, and wait for it."""
        if self._hook:
            self._hook("failed", message)
            self._hook.wait()

    def metadata(self) -> dict[str, Any]:
        """Return what a checkpoint must record for a run that resumes from it."""
        return {"wandb_id": self._tracker.id} if self._tracker else {}

    def watch_memory(self, gpt: GPT, optimizer: torch.optim.Optimizer) -> None:
        """From now on, an error of GPU memory says who holds it; after the first log interval, less precisely."""
        self._owners = gpt, optimizer
        memory.record()

    def row(self, row: Row, seconds_left: float | None = None) -> None:
        """Append ``row`` to metrics.csv, or add it to the last row if that is of the same step, and show it."""
        if "loss" in row:
            memory.stop_recording()
        if not self._is_rank_zero:
            return
        block_size = self._run.config.block_size
        drawn = self._run.mixture.samples_by_source(int(row["tokens"] or 0) // block_size)
        self._append(row | {name: n * block_size for name, n in zip(self._sources, drawn, strict=True)})
        val_loss = row.get("val_loss")
        if val_loss is None:
            self._console.metrics(row, seconds_left)
            return
        if is_finite(val_loss) and val_loss < self._best:
            self._best, best = val_loss, ["the best so far"]
        else:
            best = [f"best {self._best:.4f}"] if is_finite(self._best) else []
        parts = [console_line(row, self._run.max_steps, None), *best, *by_source(row)]
        self._console.line("  ".join(parts), "validation")

    def sample_texts(self, step: int, tokens: int, texts: list[tuple[str, str]]) -> None:
        """Append prompts and their continuations to samples.jsonl."""
        if self._is_rank_zero and texts:
            samples = [{"step": step, "tokens": tokens, "prompt": prompt, "text": text} for prompt, text in texts]
            append_json(self._run.out_dir / "samples.jsonl", *samples)

    def waits(self) -> Row:
        """Return the seconds for which training has waited for checkpoints and validations since the last call."""
        before, self._before = self._before, dict(self._seconds)
        return {name: self._before[what] - before[what] for name, what in WAITS.items() if what in before}

    @contextlib.contextmanager
    def time_spent(self, what: str, step: int, is_background: bool = False) -> Iterator[None]:
        """Count the block's time as ``what`` instead of training, and log a checkpoint as an event of ``step``.

        ``is_background`` says that the checkpoint is not yet complete.
        """
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self._seconds[what] += seconds
        if what == "checkpoints":
            stands = "is being written" if is_background else "is on disk"
            text = f"checkpoint of step {step} {stands}: training waited {seconds:.1f} s for it"
            self.event("checkpoint", text, step=step, seconds=round(seconds, 3))

    def published(self, step_dir: Path | None) -> None:
        """Show that ``step_dir``, if there is one, has been written in the background."""
        if self._is_rank_zero and step_dir is not None:
            self._console.line(f"checkpoint of step {step_of(step_dir)} is on disk", "checkpoint")

    def start(self, step: int) -> None:
        """Log where the run starts, which settings a resumed one changes, and what it was started by and on."""
        if not self._is_rank_zero:
            return
        run = self._run
        lines = [f"start    {run.origin} at step {step}"]
        lines += [f"changed  {changes_in_words(self._changed)}"] if self._changed else []
        if error := failed_save(self._events):
            lines.append(f"before   the last save failed ({error}): check that {run.out_dir} has room")
        if self._validates_other_data:
            lines.append(
                "before   data.validation was other data: do not compare earlier held-out losses with those to come"
            )
        recorded = {"tokens": run.done.tokens, "changed": self._changed, "data": self._data}
        self.event("start", *lines, step=step, **recorded, **environment(run))

    def stop(self, **details: Any) -> None:
        """Write STOPPED, which keeps the run from resuming until a person has read and deleted it."""
        if self._is_rank_zero:
            resume.write_stopped(self._run.out_dir, details)
        file = resume.stopped_file(self._run.out_dir)
        self.event(
            "stop",
            f"stopped for good, see {file}: fix the cause and delete the file, and the same command resumes",
            **details,
        )

    def end(self, state: TrainState, stopped_by: str | None) -> None:
        """Log the end, after its summary: the last step is done, or a signal or setting has stopped the run."""
        if not self._is_rank_zero:
            return
        if self._tracker and self._tail and not stopped_by:
            self._tracker.send(self._tail[-1])
        self._console.stop()
        self._seconds["training"] = time.perf_counter() - self._began - sum(self._seconds.values())
        problems = [self._tracker.problem] if self._tracker and self._tracker.problem else []
        rows = read_metrics(self._metrics)
        before = tokens_before(rows, read_starts(self._run.out_dir))
        summary = end_summary(self._run, rows, self._seconds, state, problems, before)
        show_summary("stopped" if stopped_by else "done", summary)
        if not self._is_written:
            steps = f"from step {self._tail[0]['step']} to {self._tail[-1]['step']}"
            self._console.line(f"error: {self._metrics} lacks the rows {steps}, which are printed above")
        details = {"step": state.step, "seconds": self._seconds}
        if stopped_by:
            again = "unless Slurm requeues the job, sbatch of the same script" if batch_job() else "the same command"
            then = f"{again} resumes from there" if state.step else "there was nothing to save"
            hint = ": raise it" if stopped_by == "train.max_time" and not state.step else ""
            text = f"stopped by {stopped_by} at step {state.step}; {then}{hint}"
            self.event("stop", text, by=stopped_by, **details)
        else:
            self.event("done", f"done: {state.step} steps, {state.tokens:,} tokens, in {self._run.out_dir}", **details)

    def unsaved(self, step: int) -> None:
        """Log an end at ``step`` that could not be saved."""
        hint = "make room, and the same command resumes from the newest checkpoint"
        text = f"error: ended at step {step}, which is not saved: {hint}"
        self.event("stop", text, by=Preemption.NAMES[Preemption.FAILED_SAVE], step=step)

    def record_skips(self, results: list[StepResult]) -> bool:
        """Log skipped steps. If one ends the run, write STOPPED and return True."""
        if results and self._is_rank_zero:
            self._console.reached([result.step for result in results])
        for result in results:
            if not result.skipped:
                continue
            first, last = result.samples
            where = f"step {result.step}, samples {first} to {last}"
            text = f"skipped {where}: loss {result.loss:.4f}, grad_norm {result.grad_norm:.3f}: {result.cause}"
            self.event("skip", text, **asdict(result))
            if result.fatal:
                self.stop(step=result.step, samples=last + 1, reason=f"{result.cause}: {where}")
                return True
        return False

    def event(self, name: str, *lines: str, **details: Any) -> None:
        """Append an event with its details to events.jsonl, and show ``lines``."""
        if self._is_rank_zero:
            append_json(self._events, {"time": round(time.time(), 3), "event": name, **details})
            kind = "failure" if name == "stop" and not is_planned(details.get("by")) else name
            for line in lines:
                self._console.line(line, kind)
            if self._hook and kind in HOOK_EVENTS:
                self._hook(HOOK_EVENTS[kind], "; ".join(lines))

    def _append(self, row: dict[str, Any]) -> None:
        step = row["step"]
        if self._tail and self._tail[-1]["step"] == step:
            self._tail[-1] |= row
        else:
            if self._tail and self._tracker:
                self._tracker.send(self._tail[-1])  # nothing will be added to it any more
            if self._is_written:
                self._tail_at, self._tail = self._tail_at + len(self._csv(self._tail)), []
            self._tail.append(row)
        was_written, error = self._is_written, self._write_tail()
        self._is_written = error is None
        if was_written and error is not None:  # a full disk is for the checkpoint to report, and may pass
            text = f"error: cannot write {self._metrics} ({error}): it lacks the rows from step {step} on"
            self.event("metrics_failed", text, step=step, error=error)
        if self._is_written and not was_written:
            text = f"{self._metrics} can be written again: it has the rows from step {self._tail[0]['step']} on"
            self.event("metrics_written", text, step=step)

    def _write_tail(self) -> str | None:
        """Write the tail to its place; if that fails, leave no half of a row, and return why."""
        try:
            end = min(self._tail_at, self._metrics.stat().st_size)
            os.truncate(self._metrics, end)
            try:
                with self._metrics.open("ab") as file:
                    file.write(self._csv(self._tail))
            except OSError:
                os.truncate(self._metrics, end)
                raise
        except OSError as error:
            return error.strerror
        return None

    def _csv(self, rows: list[dict[str, Any]], header: bool = False) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, extrasaction="ignore")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()


@contextlib.contextmanager
def _rewriting(file: Path) -> Iterator[None]:
    """Turn an OSError of the block, which a temporary file beside ``file`` may have met, into InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot rewrite {file} ({error.strerror}): move it away or make room") from None


def append_json(file: Path, *contents: dict[str, Any]) -> None:
    """Append a line for each of ``contents``; what cannot be written, as on a full disk, is left out."""
    lines = "".join(json.dumps(content) + "\n" for content in contents)
    with contextlib.suppress(OSError), file.open("a+b") as opened:
        opened.seek(max(opened.tell() - 1, 0))
        is_half = opened.read() not in (b"", b"\n")  # of the last line: a kill or a full disk cost the rest
        opened.write(b"\n" * is_half + lines.encode())


def max_memory_gb(device: torch.device) -> float:
    """Return the peak memory so far in GB: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
