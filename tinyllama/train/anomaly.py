"""Skip optimizer steps with a loss or gradient that is not finite and, optionally, loss spikes.

The decision is made on the device and handed to the optimizer as its ``found_inf``: a skipped step leaves parameters
and the optimizer's state as they are. The host reads the result one step late, when the device has long had it, so
that no step waits for it.
"""

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tinyllama.checkpoint.state import MOST_RECENT, TrainState
from tinyllama.config.args import TrainArgs

WINDOW = MOST_RECENT
"""Steps whose loss and gradient norm say what is usual; before there are as many, nothing is a spike."""


@dataclass(frozen=True)
class StepResult:
    """What came of one optimizer step."""

    step: int
    """steps done with this one"""
    samples: tuple[int, int]
    """first and last global sample of it"""
    loss: float
    """mean over the step's tokens, all ranks"""
    grad_norm: float
    """before clipping"""
    finite: bool
    """whether both are"""
    skipped: bool
    """whether the weights were left as they were"""
    fatal: bool
    """whether the run must stop for it"""
    ranks: list[int]
    """ranks whose own loss or gradient shard was not finite"""

    @property
    def cause(self) -> str:
        """Why it was skipped, in words."""
        if self.finite:
            return "a spike"
        if not self.ranks:
            return "not finite in the sum over the ranks"
        *others, last = map(str, self.ranks)
        return f"not finite on ranks {', '.join(others)} and {last}" if others else f"not finite on rank {last}"


class Guard:
    """Checks every step, with the same result on every rank; ``state`` carries what it has seen over a restart.

    ``replicas`` is how many ranks hold each shard of the gradients.
    """

    def __init__(
        self, args: TrainArgs, optimizer: torch.optim.Optimizer, state: TrainState, replicas: int, device: torch.device
    ) -> None:
        self._args = args
        self._optimizer = optimizer
        self._state = state
        self._replicas = replicas
        if args.skip_spikes is None:
            state.recent = []  # what was usual when a run last looked says nothing once it looks again
        # losses and gradient norms of the last steps not skipped, the newest last
        self._seen = torch.full((2, WINDOW), torch.nan, device=device)
        if state.recent:
            self._seen[:, -len(state.recent) :] = torch.tensor(state.recent, device=device).T
        self.rejected = torch.tensor(False)  # whether the step last checked must not reach the weights, () bool
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def check(self, step: int, loss_sum: Tensor, num_tokens: int, gradients: list[Tensor]) -> Tensor:
        """Decide about the step that ``optimizer.step`` is about to do, and give the gradient's norm, () fp32.

        ``loss_sum`` is this rank's, ``num_tokens`` the world's, ``gradients`` this rank's shards of all parameters.
        Collective: one all-reduce carries the loss, the norm, and a flag for each rank that is not finite.
        """
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
        report = torch.zeros(2 + dist.get_world_size(), device=loss_sum.device)
        report[0] = loss_sum / num_tokens
        report[1] = squares / self._replicas
        report[2 + dist.get_rank()] = ~(loss_sum.isfinite() & squares.isfinite())
        dist.all_reduce(report)
        pair = torch.stack((report[0], report[1].sqrt()))
        finite = pair.isfinite().all()
        skip = ~finite
        if self._args.skip_spikes is not None:
            mean, std = self._seen.mean(1), self._seen.std(1)  # NaN, and no spike, until the window is full
            skip = skip | (pair > mean + self._args.skip_spikes * std).any()
            self._seen = torch.where(skip, self._seen, torch.cat((self._seen[:, 1:], pair[:, None]), dim=1))
        self.rejected = skip
        self._optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        result = torch.cat((pair, torch.stack((finite, skip)), report[2:]))
        event = None
        if result.is_cuda:
            result = result.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, result, event))
        return pair[1]

    def poll(self, late: int = 1) -> list[StepResult]:
        """Return the results that were not read yet, but for those of the last ``late`` steps; 0 waits for the device.

        The steps that were skipped are counted in the state.
        """
        found = []
        while len(self._pending) > late:
            step, result, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            loss, norm, finite, skipped, *bad = result.tolist()
            ranks = [rank for rank, flag in enumerate(bad) if flag]
            if skipped:
                self._state.skipped += 1
                self._state.skipped_in_a_row += 1
            else:
                self._state.skipped_in_a_row = 0
                if self._args.skip_spikes is not None:
                    self._state.recent = [*self._state.recent, [loss, norm]][-WINDOW:]
            end = self._state.samples - (self._state.step - step) * self._args.global_batch_size
            samples = end - self._args.global_batch_size, end - 1
            fatal = self._state.skipped_in_a_row > self._args.max_skips
            fatal = fatal or (not finite and self._args.on_nonfinite == "stop")
            found.append(StepResult(step, samples, loss, norm, bool(finite), bool(skipped), fatal, ranks))
        return found
