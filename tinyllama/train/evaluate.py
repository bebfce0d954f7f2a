"""Measure the loss on held-out tokens, in nats per token and bits per byte."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from tinyllama import printable
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
    """Return this rank's sum of losses over ``batches`` and its number of tokens, (2,) fp64; None if ``stop`` ended it.

    The caller sums both over the ranks and then divides: a mean of means would weigh ranks, not tokens.
    """
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for input_ids, targets in on_device(batches, device):
        if stop():
            return None
        total[0] += model(input_ids, targets)
        total[1] += (targets != IGNORE_INDEX).sum()
    return total


def held_out_losses(
    model: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[Batch],
    datasets: Sequence[PackedDataset],
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float | None] | None:
    """Collective. Return the cells of metrics.csv of a validation over all ranks' ``batches``; None once all ``stop``.

    ``val_loss`` is the mean over the tokens of all ``datasets``, in nats, and ``val_bpb`` the same in bits a byte.
    Each dataset has both of its own, as ``val_loss/NAME`` and ``val_bpb/NAME``; they are None where nothing of it was
    scored.
    """
    totals = torch.zeros(len(datasets), 2, dtype=torch.float64, device=device)
    for source, part in itertools.groupby(batches, lambda batch: batch.source):
        total = loss_sum(model, part, device, stop)
        if total is None:
            return None
        totals[source] = total
    dist.all_reduce(totals)
    names = source_names([dataset.path for dataset in datasets])
    parts = {f"/{name}": (total, [dataset]) for name, total, dataset in zip(names, totals, datasets, strict=True)}
    cells: dict[str, float | None] = {}
    for suffix, (total, scored) in ({"": (totals.sum(0), datasets)} | parts).items():
        loss, num_tokens = total.tolist()
        mean = loss / num_tokens if num_tokens else None
        cells[f"val_loss{suffix}"] = mean
        cells[f"val_bpb{suffix}"] = None if mean is None else bits_per_byte(mean, scored)
    return cells


def source_names(paths: Sequence[str | Path]) -> list[str]:
    """Return for each folder the shortest end of its path that no other has; equal paths get a number.

    So a name depends on the set of folders, not on their order, and stays with its folder when a run is resumed.
    """
    parts = [Path(os.path.normpath(path)).parts or (".",) for path in paths]
    names: list[str] = []
    for i, own in enumerate(parts):
        others = [other for j, other in enumerate(parts) if j != i and other != own]
        lengths = range(1, len(own))
        length = next((n for n in lengths if all(other[-n:] != own[-n:] for other in others)), len(own))
        name = numbered = printable(Path(*own[-length:]))
        number = 0
        while numbered in names:
            number += 1
            numbered = f"{name}_{number}"
        names.append(numbered)
    return names


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
