"""Batches on their device before they are asked for."""

from collections.abc import Iterable, Iterator

import torch

from tinyllama.data.loader import Batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """``batches`` on ``device``; to a GPU each is copied on a stream of its own, while the one before it is used."""
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)
    ahead: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            copied = batch._replace(
                input_ids=batch.input_ids.to(device, non_blocking=True),
                targets=batch.targets.to(device, non_blocking=True),
            )
        if ahead is not None:
            yield _arrived(ahead, side)
        ahead = copied
    if ahead is not None:
        yield _arrived(ahead, side)


def _arrived(batch: Batch, side: torch.cuda.Stream) -> Batch:
    current = torch.cuda.current_stream()
    current.wait_stream(side)  # the copy behind it, begun a batch ago, is long done as well
    for tensor in (batch.input_ids, batch.targets):
        tensor.record_stream(current)  # its memory was the side stream's
    return batch
