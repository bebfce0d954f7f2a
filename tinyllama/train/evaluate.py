"""How well a model predicts held-out tokens."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from tinyllama.data.loader import Batch, on_device
from tinyllama.ops.cross_entropy import IGNORE_INDEX


@torch.no_grad()
def loss_sum(
    model: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[Batch],
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> Tensor | None:
    """This rank's sum of losses over ``batches`` and the number of tokens in it, (2,) fp64; None once ``stop`` says so.

    To be summed over the ranks and then divided: a mean of means would weigh ranks, not tokens.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for input_ids, targets in on_device(batches, device):
        if stop():
            return None
        total[0] += model(input_ids, targets)
        total[1] += (targets != IGNORE_INDEX).sum()
    return total


def mean_loss(
    model: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[Batch],
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Collective. Mean loss over the tokens of all ranks' ``batches``, nats; None once all ``stop``."""
    total = loss_sum(model, batches, device, stop)
    if total is None:
        return None
    dist.all_reduce(total)
    loss, num_tokens = total.tolist()
    return loss / num_tokens
