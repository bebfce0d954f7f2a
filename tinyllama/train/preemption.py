"""Preemption: a signal to any rank, or the end of its time, stops every rank at the same step."""

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from tinyllama import stdio


def is_planned(by: object) -> bool:
    """Return whether ``by`` of a stop event is a signal or train.max_time, after which the same command resumes."""
    return by not in (None, Preemption.NAMES[Preemption.FAILED_SAVE])


class Preemption:
    """Stops every rank at the same step if any rank gets a signal, runs out of time or cannot save.

    Slurm sends SIGTERM before it kills a job, and the signal of ``#SBATCH --signal`` before a time limit. A second
    Ctrl-C is a KeyboardInterrupt.
    """

    MAX_TIME, FAILED_SAVE = 0x100, 0x101  # above every signal's number
    NAMES = {MAX_TIME: "train.max_time", FAILED_SAVE: "checkpoint.on_failure"}
    ONE_PRESS = 2.0  # seconds; one press may arrive twice, from the terminal and forwarded by torchrun

    def __init__(self, max_time: float | None = None) -> None:
        self._requested = 0
        self._until = float("inf") if max_time is None else time.monotonic() + max_time
        self._interrupted: float | None = None  # when Ctrl-C was first pressed
        self._is_rank_zero = dist.get_rank() == 0
        # on the CPU, so that agreeing does not wait for the GPU
        self._group = dist.new_group(backend="gloo")
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._receive)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # in a script's background Ctrl-C is not for this run
            signal.signal(signal.SIGINT, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted is None:
                self._interrupted = time.monotonic()
                if self._is_rank_zero:
                    line = b"interrupted: the run saves after this step and stops; Ctrl-C again stops it at once\n"
                    stdio.write_stderr(line)
            elif time.monotonic() > self._interrupted + self.ONE_PRESS:
                raise KeyboardInterrupt
        self._requested = number

    def request(self, number: int) -> None:
        """Request a stop on any rank, as a signal does."""
        self._requested = self._requested or number

    def agreed_reason(self) -> str | None:
        """Collective. Return the name of the signal or setting that stops the run; None if no rank requests a stop."""
        if time.monotonic() > self._until:
            self.request(self.MAX_TIME)
        number = torch.tensor(self._requested)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        if not (agreed := int(number)):
            return None  # one that has come meanwhile is for the next call
        self._requested = agreed
        return self.NAMES.get(agreed) or signal.Signals(agreed).name
