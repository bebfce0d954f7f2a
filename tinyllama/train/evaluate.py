"""How well a model predicts held-out tokens."""

from collections.abc import Callable, Iterable

import torch
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
