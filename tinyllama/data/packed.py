"""Packed tokens on disk, both ways: shards of raw little-endian tokens, a manifest, and reading across them.

A dataset is one flat folder. Each shard is three files: ``NAME.bin`` (tokens, uint16 when the vocabulary is smaller
than 65536, else uint32), ``NAME.idx.npy`` (uint64 document ends, in tokens, within the shard) and ``NAME.json``, its
metadata. Every file appears complete or not at all, ``NAME.json`` last: a shard that has it is done. ``manifest.json``
lists the shards by name; the token stream is their concatenation in that order, and nothing in it is padding.
"""

import functools
import hashlib
import io
import os
import resource
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any, Self

import numpy as np

from tinyllama import InputError, atomic
from tinyllama.checkpoint.state import is_count
from tinyllama.data import lit_chunks
from tinyllama.data.files import check_size, index_bytes, open_regular
from tinyllama.data.metadata import (
    DIGEST_SIZE,
    DTYPES,
    FORMAT_VERSION,
    HINT,
    MANIFEST,
    dtype_of,
    fingerprint,
    read_manifest,
    read_shard_info,
    seal,
    to_json,
)

OPEN_FILES = 32  # of a dataset at a time, however many shards there are
# shards that differ in one of these must not be read as one stream
_AGREED = ("dtype", "vocab_size", "tokenizer_sha256", "encoder", "bos", "eos", "bos_id", "eos_id")
TOKENIZER = ("tokenizer_sha256", "bos", "bos_id", "eos_id")
"""what a run records of the tokenizer of its data"""


class ShardWriter:
    """Writes one shard; leaving the ``with`` block without ``finish`` leaves no file behind.

    Temporary names end in ``.tmp`` and are unique, so two processes that write the same shard do no harm: the last
    rename wins, and both wrote the same bytes.
    """

    def __init__(self, directory: Path, name: str, vocab_size: int) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.dtype = dtype_of(vocab_size)
        self.max_token = -1
        self._folder = Path(directory)
        self._ends = array("Q")
        self._tokens = 0
        self._blake2b = hashlib.blake2b(digest_size=DIGEST_SIZE)
        self._tmp = atomic.temporary(self._folder / f"{name}.bin")
        self._file = open(self._tmp, "xb")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self._tmp.unlink(missing_ok=True)  # finish() has renamed it

    def append(self, ids: np.ndarray, ends: Sequence[int] | np.ndarray) -> None:
        """Append tokens (n,) in which documents end at ``ends``, rising from 0 to n; what is behind the last goes on.

        Raises InputError for an id outside [0, vocab_size).
        """
        if (wrong := first_outside(ids, self.vocab_size)) is not None:
            hint = "prepare with the tokenizer the vocabulary size comes from"
            raise vocabulary_error(self.name, ids[wrong], self._tokens + wrong, self.vocab_size, hint)
        tokens = ids.astype(DTYPES[self.dtype])
        self._file.write(tokens.data)
        self._blake2b.update(tokens.data)
        self._ends.frombytes((np.asarray(ends, dtype=np.uint64) + np.uint64(self._tokens)).tobytes())
        self._tokens += ids.size
        if ids.size:
            self.max_token = max(self.max_token, int(tokens.max()))

    def finish(self, **metadata: Any) -> dict[str, Any]:
        """Publish the shard and return what NAME.json says: counts, the hashes of the other files, and ``metadata``.

        ``metadata`` must be the same for every run on the same input: no times, hosts or process numbers.
        ``max_token`` is -1 in a shard without tokens.
        """
        index = index_bytes(np.array(self._ends, dtype="<u8"))
        counted = dict(
            format_version=FORMAT_VERSION,
            name=self.name,
            dtype=self.dtype,
            vocab_size=self.vocab_size,
            tokens=self._tokens,
            documents=len(self._ends),
            max_token=self.max_token,
            blake2b=self._blake2b.hexdigest(),
            index_blake2b=hashlib.blake2b(index, digest_size=DIGEST_SIZE).hexdigest(),
            **metadata,
        )
        info = seal(counted)
        # an older shard of this name is not done from here on: its json must never describe the new tokens
        (self._folder / f"{self.name}.json").unlink(missing_ok=True)
        atomic.write(self._folder / f"{self.name}.idx.npy", index)
        self._file.close()
        atomic.sync(self._tmp)
        os.replace(self._tmp, self._folder / f"{self.name}.bin")
        atomic.sync(self._folder)
        atomic.write(self._folder / f"{self.name}.json", to_json(info, indent=1))
        return info


def write_manifest(directory: Path, names: list[str], **metadata: Any) -> dict[str, Any]:
    """Write and return manifest.json of these shards, sorted by name, and of ``metadata``.

    Raises InputError when there is none, when one is not done or damaged, or when two differ in tokenizer, encoder,
    dtype or bos/eos policy. ``fingerprint`` names the token stream.
    """
    infos: list[dict[str, Any]] = []
    for name in sorted(names):
        info = read_shard_info(directory, name)
        if info is None:
            raise InputError(f"{directory}: shard {name} is not done: rerun the prepare command, it skips the others")
        infos.append(info)
    if not infos:
        raise InputError(f"{directory}: no shard to list in {MANIFEST}: check --source of the prepare command")
    first = infos[0]
    for info, key in product(infos[1:], _AGREED):
        if info.get(key) != first.get(key):
            raise InputError(
                f"{directory}: {key} is {first.get(key)} in shard {first['name']} and {info.get(key)} in shard "
                f"{info['name']}: prepare each setting into a folder of its own"
            )
    shards = [{key: info[key] for key in ("name", "tokens", "documents", "max_token", "blake2b")} for info in infos]
    content = dict(
        format_version=FORMAT_VERSION,
        fingerprint=fingerprint(first["dtype"], shards),
        **{key: first.get(key) for key in _AGREED},
        tokens=sum(shard["tokens"] for shard in shards),
        documents=sum(shard["documents"] for shard in shards),
        max_token=max(shard["max_token"] for shard in shards),
        shards=shards,
        **metadata,
    )
    manifest = seal(content)
    atomic.write(Path(directory) / MANIFEST, to_json(manifest, indent=1))
    return manifest


@dataclass(eq=False)
class PackedDataset:
    """A stream of tokens over many files, opened by ``open_packed``; a block is block_size + 1 consecutive tokens."""

    path: Path
    fingerprint: str  # hash of what determines the token stream
    dtype: np.dtype  # of the tokens, on disk and as read
    files: list[str]  # names, in the order of the stream
    ends: list[int]  # tokens up to the end of each file
    header: int = 0  # bytes before the first token of each file
    # what manifest.json says besides; upstream's chunk files do not say any of it
    vocab_size: int | None = None
    tokenizer_sha256: str | None = None
    documents: int | None = None
    max_token: int | None = None
    bos: bool | None = None  # each document begins with bos_id
    eos: bool | None = None  # each document ends with eos_id
    bos_id: int | None = None
    eos_id: int | None = None
    num_bytes: int | None = None  # of the documents' text, without bos and eos; None: not recorded

    def __post_init__(self) -> None:
        self.keep_open(OPEN_FILES)

    def keep_open(self, files: int) -> None:
        """Keep at most so many ``files`` open at a time."""
        self._file = functools.lru_cache(maxsize=files)(self._open)

    @property
    def tokens(self) -> int:
        """Tokens of the whole stream."""
        return self.ends[-1]

    def num_blocks(self, block_size: int) -> int:
        """Return the number of complete blocks in the stream; what is left at its end is not used."""
        return self.tokens // (block_size + 1)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return the tokens [start, start + count) of the stream, (count,); raises IndexError outside of it."""
        if not 0 <= start <= start + count <= self.tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of {self.tokens} in {self.path}")
        out = np.empty(count, self.dtype)
        self._fill(out, start)
        return out

    def blocks(self, indices: np.ndarray, block_size: int) -> np.ndarray:
        """Return the blocks with the numbers ``indices`` (n,) -> (n, block_size + 1).

        Block i is the tokens [i * (block_size + 1), (i + 1) * (block_size + 1)).
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.min(initial=0) < 0 or indices.max(initial=-1) >= self.num_blocks(block_size):
            raise IndexError(f"a block outside the {self.num_blocks(block_size)} of {self.path}")
        out = np.empty((len(indices), block_size + 1), self.dtype)
        for row, index in zip(out, indices.tolist(), strict=True):
            self._fill(row, index * (block_size + 1))
        return out

    def _fill(self, out: np.ndarray, start: int) -> None:
        """Put the tokens from ``start`` on into ``out``, from as many files as they lie in.

        Read, not mapped: memory stays what it is, and a file that shrinks or fails is an error, not a SIGBUS.
        """
        while len(out):
            number = bisect_right(self.ends, start)
            part = out[: self.ends[number] - start]
            file = self._file(number)  # held until it is read, though another thread may push it out of the cache
            before = self.ends[number - 1] if number else 0
            place = self.header + (start - before) * self.dtype.itemsize
            count = os.preadv(file.fileno(), [part.data], place) // self.dtype.itemsize
            if not count:
                raise InputError(f"{file.name} has become shorter since it was opened: prepare the folder again")
            out, start = out[count:], start + count

    def _open(self, number: int) -> io.FileIO:
        return open_regular(self.path / self.files[number])


def open_packed(path: str | Path) -> PackedDataset:
    """Open a prepared folder, or one of upstream's LITPKDS chunk files; raises InputError when it is not whole."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: give the --output of a prepare command")
    if (path / MANIFEST).exists():
        dataset = _open_manifest(path)
    elif any(name.endswith((".idx.npy", ".tmp")) for name in os.listdir(path)):
        raise InputError(f"{path / MANIFEST} is missing: rerun the prepare command, it finishes the folder")
    else:
        dataset = PackedDataset(path, **lit_chunks.scan(path))
    if dataset.tokens == 0:
        raise InputError(f"{path} holds no tokens: check the source and the filters of the prepare command")
    return dataset


def open_all(*groups: Sequence[str]) -> list[list[PackedDataset]]:
    """Open groups of folders; raises InputError with every error, so that a user can fix all of them at once."""
    opened: list[list[PackedDataset]] = [[] for _ in groups]
    errors: list[str] = []
    for datasets, paths in zip(opened, groups, strict=True):
        for path in paths:
            try:
                datasets.append(open_packed(path))
            except InputError as error:
                errors += [text for text in error.args if text not in errors]
    if errors:
        raise InputError(*errors)
    every = [dataset for datasets in opened for dataset in datasets]
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)  # of which half is left for checkpoints and connections
    for dataset in every:
        dataset.keep_open(max(min(OPEN_FILES, soft // 2 // len(every)), 1))
    return opened


def first_outside(ids: np.ndarray, vocab_size: int) -> int | None:
    """Return the index in the flattened ``ids`` of the first one outside the vocabulary, or None."""
    if ids.max(initial=0) < vocab_size and (ids.dtype.kind == "u" or ids.min(initial=0) >= 0):
        return None
    return int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])


def vocabulary_error(where: str | Path, token: int, position: int, vocab_size: int, hint: str) -> InputError:
    """Return the error for a token outside the vocabulary; ``position`` counts the tokens before it in ``where``."""
    return InputError(
        f"{where}: token {token} at position {position} is outside the vocabulary of {vocab_size}: {hint}"
    )


def check_datasets(datasets: Sequence[PackedDataset], *, vocab_size: int, block_size: int) -> None:
    """Raise InputError, with every error, unless a model of these sizes can read all ``datasets``.

    They must come from one tokenizer of ``vocab_size`` pieces, with bos and eos set alike (upstream's chunks say
    neither), and hold a block each.
    """
    errors = []
    for dataset in datasets:
        if dataset.vocab_size not in (None, vocab_size):
            errors.append(
                f"{dataset.path} was made with a vocabulary of {dataset.vocab_size} and model.vocab_size is "
                f"{vocab_size}: set --model.vocab_size {dataset.vocab_size} or prepare the folder again"
            )
        if not dataset.num_blocks(block_size):
            errors.append(
                f"{dataset.path} holds {dataset.tokens:,} tokens and a block takes {block_size + 1:,}: "
                "give it more text or lower model.block_size"
            )
    tokenizers = {d.tokenizer_sha256: str(d.path) for d in datasets if d.tokenizer_sha256 is not None}
    if len(tokenizers) > 1:
        errors.append(f"{' and '.join(tokenizers.values())} were made with different tokenizers: prepare them with one")
    policies = {(d.bos, d.eos, d.bos_id, d.eos_id): d for d in datasets if d.bos is not None}
    if len(policies) > 1:
        (bos, eos, *_), one = next(iter(policies.items()))
        other = list(policies.values())[1]
        errors.append(
            f"{one.path} was prepared with bos {bos}, eos {eos} (ids {one.bos_id}, {one.eos_id}) and {other.path} with "
            f"bos {other.bos}, eos {other.eos} (ids {other.bos_id}, {other.eos_id}): prepare them alike"
        )
    if errors:
        raise InputError(*errors)


def tokenizer_of(datasets: Sequence[PackedDataset]) -> dict[str, Any]:
    """Return what ``datasets`` that go together state of their tokenizer, by TOKENIZER; None for what none states.

    Upstream's chunks, which may be among them, state nothing.
    """
    stated = ((name, getattr(dataset, name)) for dataset in reversed(datasets) for name in TOKENIZER)
    return dict.fromkeys(TOKENIZER) | {name: value for name, value in stated if value is not None}


def _open_manifest(path: Path) -> PackedDataset:
    manifest = read_manifest(path)
    shards, dtype = manifest["shards"], DTYPES[manifest["dtype"]]
    files = [f"{shard['name']}.bin" for shard in shards]
    ends = list(accumulate(shard["tokens"] for shard in shards))
    for file, shard in zip(files, shards, strict=True):
        check_size(path / file, shard["tokens"] * dtype.itemsize, f"delete {shard['name']}.json and {HINT}")
    keys = ("fingerprint", "documents", "vocab_size", "tokenizer_sha256", "max_token", "bos", "eos", "bos_id", "eos_id")
    stated: dict[str, Any] = {key: manifest.get(key) for key in keys}
    stated["num_bytes"] = _num_bytes(manifest["subsets"], ends[-1] if ends else 0)
    return PackedDataset(path, dtype=dtype, files=files, ends=ends, **stated)


def _num_bytes(subsets: dict[str, dict[str, Any]], tokens: int) -> int | None:
    """Bytes of text of all subsets; None where some tokens are in none, or in one that does not say its bytes."""
    known = [figures for figures in subsets.values() if is_count(figures.get("bytes"))]
    return sum(figures["bytes"] for figures in known) if sum(f["tokens"] for f in known) == tokens else None
