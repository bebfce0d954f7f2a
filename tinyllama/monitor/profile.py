"""Trace steps of a run for Perfetto (log.profile): what each rank's CPU and GPU did, and when."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from tinyllama.config import cli
from tinyllama.train.run import Run

PERFETTO = "https://ui.perfetto.dev"
"""opens the traces of log.profile"""


class Trace:
    """Traces the steps of ``log.profile`` on this rank; without the setting it does nothing.

    Every rank writes a file of its own, as the one that is slow may be any. The step before them, if there is one,
    warms the profiler up: starting it takes a GPU's tracer seconds. What happens between two traced steps, as a
    validation or a save, is in the trace, too.
    """

    def __init__(self, run: Run, rank: int, event: Callable[..., None]) -> None:
        """``event`` records what was written, in the run's log."""
        self._steps, self._folder, self._rank, self._event = run.profiled, run.profile_dir, rank, event
        self._profiler: profile | None = None
        self._done = run.done.step
        self._mark = ExitStack()  # of the step that is being traced
        self.after(run.done.step)

    def after(self, step: int) -> None:
        """Begin, continue or end the trace, as is due after ``step`` steps of the run are done."""
        if not self._steps or step >= self._steps.stop:
            return
        first, self._done = self._steps.start, step
        self._mark.close()
        if step + 1 >= first - 1 and self._profiler is None:
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.prepare_trace()
        if step + 1 == first and self._profiler:
            self._profiler.start_trace()
        if step + 1 == self._steps.stop:
            self.close()
        elif step + 1 >= first:
            self._mark.enter_context(record_function(f"step {step + 1}"))

    def close(self, write: bool = True) -> None:
        """End the trace, which may be sooner than it was to end, and ``write`` it."""
        profiler, self._profiler = self._profiler, None
        self._mark.close()
        if profiler is None:
            return
        first, last = self._steps.start, self._done
        if last + 1 < first:
            profiler.start_trace()  # what was only prepared has no end
        profiler.stop_trace()
        if write and last >= first:
            self._write(profiler, f"steps-{first}-{last}-rank-{self._rank:05d}.json.gz")

    def _write(self, profiler: profile, name: str) -> None:
        """Write the file; a disk that is full costs the trace and not the run."""
        unfinished = self._folder / f"unfinished-{name}"
        try:
            self._folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(unfinished))
            unfinished.replace(self._folder / name)
        except OSError as error:
            cli.print_error(f"cannot write the trace {self._folder / name} ({error.strerror}): the run continues")
            return
        steps = f"steps {self._steps.start} to {self._done}"
        text = f"traced {steps} of every rank, in {self._folder}: open the files in {PERFETTO}"
        self._event("profile", text, step=self._done, file=name)
