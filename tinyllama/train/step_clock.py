"""Time the steps, and name the rank that all others wait for."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tinyllama.model import GPT
from tinyllama.throughput import Meter, flops_per_token, peak_flops
from tinyllama.train.collectives import all_gather
from tinyllama.train.run import Run


class StepClock(Meter):
    """A meter that also measures what keeps a step: the wait for data, and a rank that is slower than the others.

    Ranks exchange weights and gradients, so they end a step together, whoever is slow. What differs is the time in
    which a rank computes alone, and it is measured in the forward pass of the blocks in each step's first micro-batch:
    these hooks run when a block's weights have been gathered and before they are freed. On a GPU events on the
    device measure it, and nobody waits for them.
    """

    def __init__(self, run: Run, gpt: GPT, device: torch.device) -> None:
        super().__init__()
        self._run, self._device, self._num_ranks = run, device, dist.get_world_size()
        self._peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
        self._micro_batches = 0
        self._waited = 0.0
        self._forward: list[tuple[Any, Any]] = []  # when a block's pass began and ended
        for block in gpt.layers if self._num_ranks > 1 else []:
            block.register_forward_pre_hook(self._begin)  # after FSDP's
            block.register_forward_hook(self._end, prepend=True)  # before FSDP's

    def timed(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the micro-batches of the run, counting them and the time for which they are waited for."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self._waited += time.perf_counter() - began
            self._micro_batches += 1
            yield batch

    def times(self, speed: float) -> dict[str, float | None]:
        """Collective. Return where the time of the log interval that has just ended went; the device must be idle.

        ``speed`` is what ``end_interval`` has returned.
        """
        waited, self._waited = self._waited, 0.0
        row: dict[str, float | None] = {"tokens_per_second": speed, "step_seconds": self.step_seconds}
        if self._peak:
            row["mfu"] = speed * flops_per_token(self._run.config) / (self._peak * self._num_ranks)
        if self._num_ranks == 1:
            return row | {"data_seconds": waited}
        forward = sum(self._seconds_between(*pair) for pair in self._forward) / self.steps
        self._forward.clear()
        times = torch.tensor([forward, waited], dtype=torch.float64, device=self._device)
        of_all = torch.empty(2 * self._num_ranks, dtype=torch.float64, device=self._device)
        all_gather(of_all, times)
        forwards, waits = of_all.view(-1, 2).T.tolist()
        row |= {"forward_seconds_median": statistics.median_low(forwards), "forward_seconds_slowest": max(forwards)}
        return row | {"slowest_rank": forwards.index(max(forwards)), "data_seconds": max(waits)}

    def _begin(self, *_: object) -> None:
        if torch.is_grad_enabled() and self._micro_batches % self._run.accumulation == 1 % self._run.accumulation:
            self._forward.append((self._now(), None))

    def _end(self, *_: object) -> None:
        if self._forward and self._forward[-1][1] is None:
            self._forward[-1] = (self._forward[-1][0], self._now())

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds_between(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) / 1000 if self._device.type == "cuda" else ended - began
