"""Batches: one rank's micro-batches of the training order, read ahead by a thread, and the fixed blocks of validation.

B is the micro-batch size, T the block size; a block is T + 1 tokens, so that each position has a next token to predict.
"""

import itertools
import queue
import shlex
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import PackedDataset, first_outside, vocabulary_error
from tinyllama.ops.cross_entropy import IGNORE_INDEX

_PREFETCHED = 4  # reads ready and waiting
_READ = 64  # samples read and handed over at once, or one micro-batch if that is more: far less than a step's time
_LOCATED = 16  # reads whose samples are located at once, 1,024 as a rule: well below a millisecond


class Batch(NamedTuple):
    """One micro-batch of one rank in its packed dtype; ``on_device`` turns it into input ids and targets."""

    tokens: torch.Tensor
    """(B, T + 1) of the datasets' dtype; in pinned memory where there is a GPU to copy it to"""
    samples: np.ndarray
    """(B,) int64, global sample numbers; -1 in the last rows of a validation batch, where they only fill it up"""
    source: int = 0
    """of a validation batch, the number of the dataset that all its rows are from"""


class Loader:
    """This rank's micro-batches from global sample ``start_sample`` on, without end, read ahead by one thread.

    The n-th step from there takes the samples from start_sample + n * global_batch_size on; each rank has one
    contiguous share of them, cut into micro-batches. So what a step trains on is the same for every world size and
    micro-batch. The sizes must divide. Iterating raises InputError for a token id outside the vocabulary.
    """

    def __init__(
        self,
        datasets: Sequence[PackedDataset],
        mixture: Mixture,
        *,
        block_size: int,
        vocab_size: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_sample: int,
    ):
        self._datasets = datasets
        self._mixture = mixture
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._share = global_batch_size // world_size  # of each step, in samples
        self._first_sample = start_sample + rank * self._share
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._taken: Iterator[Batch] = iter(())  # what is left of one read
        self._ready: queue.Queue[Iterator[Batch] | BaseException] = queue.Queue(_PREFETCHED)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        while not self._closed.is_set():
            if batch := next(self._taken, None):
                return batch
            item = self._ready.get()
            if isinstance(item, BaseException):
                self.close()
                raise item
            self._taken = item
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the thread and drop what it has read; iterating stops."""
        self._closed.set()
        # The thread looks at _closed after each put, so once there is room for that one put it cannot block again.
        while not self._ready.empty():
            self._ready.get()
        self._thread.join()

    def _work(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # a new thread starts on GPU 0, and pinning would wake that one
            for read in self._reads():
                self._ready.put(read)
                if self._closed.is_set():
                    return
        except BaseException as error:  # every one, or the consumer would wait for ever
            self._ready.put(error)

    def _reads(self) -> Iterator[Iterator[Batch]]:
        size = self._micro_batch_size * max(1, _READ // self._micro_batch_size)
        for first in itertools.count(0, _LOCATED * size):  # first numbers this rank's own samples
            step, place = np.divmod(np.arange(first, first + _LOCATED * size), self._share)
            samples = self._first_sample + step * self._global_batch_size + place
            source, _, block = self._mixture.locate(samples)
            for start in range(0, len(samples), size):
                rows = slice(start, start + size)
                tokens = _tensor(_read(self._datasets, source[rows], block[rows], self._block_size, self._vocab_size))
                micro_batches = range(0, len(tokens), self._micro_batch_size)
                parts = np.split(samples[rows], micro_batches[1:])
                yield map(Batch, tokens.split(self._micro_batch_size), parts)


def validation_batches(
    datasets: Sequence[PackedDataset],
    *,
    block_size: int,
    vocab_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    max_samples: int | None,
) -> Iterator[Batch]:
    """Yield one pass of this rank over a fixed set of blocks: all, or ``max_samples`` spread evenly over the datasets.

    The datasets come one after another, and no batch holds rows of two. Sample i of the set belongs to rank
    i % world_size. Every rank gets the same number of batches of the same shape, as collectives need; rows beyond the
    set have targets IGNORE_INDEX throughout, so the sum of losses over all ranks by the number of other targets is the
    same for every world size and micro-batch. Raises InputError for a token outside the vocabulary of ``vocab_size``;
    that each dataset holds a block is for check_datasets to see.
    """
    ends = list(itertools.accumulate(dataset.num_blocks(block_size) for dataset in datasets))
    total = ends[-1]
    num_samples = total if max_samples is None else min(max_samples, total)
    bounds = [0, *(-(-end * num_samples // total) for end in ends)]  # samples before and up to each dataset's end
    for source, (first, last) in enumerate(itertools.pairwise(bounds)):
        own = first + (rank - first) % world_size  # the first sample of this rank
        for start in range(0, last - first, world_size * micro_batch_size):
            places = own + start + world_size * np.arange(micro_batch_size)
            samples = np.where(places < last, places, -1)
            index = samples[samples >= 0] * total // num_samples  # in the concatenation of all datasets' blocks
            block = index - (ends[source - 1] if source else 0)
            tokens = _read(datasets, np.full_like(block, source), block, block_size, vocab_size)
            fill = np.zeros((micro_batch_size - len(tokens), block_size + 1), tokens.dtype)
            yield Batch(_tensor(np.concatenate([tokens, fill])), samples, source)


def _read(
    datasets: Sequence[PackedDataset], source: np.ndarray, block: np.ndarray, block_size: int, vocab_size: int
) -> np.ndarray:
    """Read the blocks (B,) of the sources (B,) -> (B, T + 1), in a dtype that holds the tokens of all datasets."""
    tokens = np.empty((len(block), block_size + 1), np.result_type(*(dataset.dtype for dataset in datasets)))
    for k in np.unique(source):
        rows = np.flatnonzero(source == k)
        tokens[rows] = found = datasets[k].blocks(block[rows], block_size)
        if (wrong := first_outside(found, vocab_size)) is not None:
            row, column = divmod(wrong, block_size + 1)
            position = block[rows[row]] * (block_size + 1) + column
            path = datasets[k].path
            hint = "prepare the folder again with this model's tokenizer, or correct model.vocab_size"
            if datasets[k].vocab_size == vocab_size:
                command = f"python scripts/inspect_packed.py {shlex.quote(str(path))} --verify"
                hint = f"its manifest says so too, so bytes are damaged: {command} says where"
            raise vocabulary_error(path, found[row, column], position, vocab_size, hint)
    return tokens


def _tensor(tokens: np.ndarray) -> torch.Tensor:
    """Return a tensor, in pinned memory if there is a GPU, so that it can be copied while the GPU computes."""
    tensor = torch.from_numpy(tokens)
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield input ids and targets (the next tokens) of each batch, (B, T) int64 each, on ``device``.

    Tokens are copied in their packed dtype, 2 or 4 bytes each, and widened there. A GPU's are copied on a stream of
    their own while the previous batch is used. Rows that only fill a batch up have targets IGNORE_INDEX throughout.
    """
    if device.type != "cuda":
        yield from (_widened(batch, device) for batch in batches)
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
