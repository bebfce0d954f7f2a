"""Input ids and targets on their device before they are asked for."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from tinyllama.data.loader import Batch
from tinyllama.ops.cross_entropy import IGNORE_INDEX


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each batch the input ids and their targets, the token after each: (B, T) int64 both, on ``device``.

    Tokens travel as they are packed, two bytes each, and are widened there. To a GPU they are copied on a stream of
    their own, while the batch before is used. Rows that only fill a batch up have targets IGNORE_INDEX throughout.
    """
    if device.type != "cuda":
        for batch in batches:
            yield _widened(batch, device)
        return
    side = torch.cuda.Stream(device)
    ahead: tuple[Tensor, Tensor] | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            copied = _widened(batch, device)
        if ahead is not None:
            yield _arrived(ahead, side)
        ahead = copied
    if ahead is not None:
        yield _arrived(ahead, side)


def _widened(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    tokens = batch.tokens.to(device, non_blocking=True)  # (B, T + 1)
    input_ids, targets = tokens[:, :-1].to(torch.int64), tokens[:, 1:].to(torch.int64)  # (B, T)
    targets[int((batch.samples >= 0).sum()) :] = IGNORE_INDEX
    return input_ids, targets


def _arrived(pair: tuple[Tensor, Tensor], side: torch.cuda.Stream) -> tuple[Tensor, Tensor]:
    current = torch.cuda.current_stream()
    current.wait_stream(side)  # the copy behind it, begun a batch ago, is long done as well
    for tensor in pair:
        tensor.record_stream(current)  # its memory was the side stream's
    return pair
