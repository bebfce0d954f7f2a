"""How well a model predicts held-out tokens."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tinyllama.data.loader import Batch, on_device
from tinyllama.data.packed import PackedDataset
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


def bits_per_byte(loss: float, datasets: Sequence[PackedDataset]) -> float | None:
    """Return a mean loss in nats a token as bits a byte of text, which compares across tokenizers; None: not known.

    loss / ln 2 * tokens / bytes, where tokens and bytes are those of the whole ``datasets``, however many of their
    blocks were scored. A bos or eos is a token with a loss of its own and has no bytes, so that the end of a document
    costs bits, too. The bytes are those of the documents in UTF-8, as prepared; upstream's chunk files do not record
    them.
    """
    num_bytes = [dataset.num_bytes for dataset in datasets]
    if None in num_bytes or not any(num_bytes):
        return None
    tokens = sum(dataset.tokens for dataset in datasets)
    return loss / math.log(2) * tokens / sum(filter(None, num_bytes))
