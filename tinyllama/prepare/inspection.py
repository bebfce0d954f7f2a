"""Summarize a packed folder in figures, and check whether its files are still what was written."""

from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinyllama import InputError
from tinyllama.checkpoint.state import is_count
from tinyllama.data.files import read_index
from tinyllama.data.metadata import HINT, hash_file, read_manifest, read_shard_info
from tinyllama.data.packed import PackedDataset, first_outside, open_packed, vocabulary_error
from tinyllama.prepare.workers import cores
from tinyllama.tokenizer import Tokenizer

SAMPLED = 1 << 22  # tokens at most, evenly over the stream, in which the most frequent ones are counted


def inspect_packed(
    path: str | Path, verify: bool = False, tokenizer: Tokenizer | None = None, block_size: int = 2048
) -> dict[str, Any]:
    """Figures of a packed folder by name; with ``verify``, every shard is hashed again and compared with the manifest.

    Lengths are in tokens and count bos and eos; those of more than ``block_size`` are longer than that context. Bytes
    are those of the text in UTF-8. With ``tokenizer``, also the beginning of the stream as text, and the most frequent
    tokens as pieces. Raises InputError when the folder is not whole, with one error for each damaged shard, and when
    ``verify`` has no hashes to compare with.
    """
    if block_size < 1:
        raise InputError(f"--block_size {block_size} is not a context length: give 1 or more")
    dataset = open_packed(path)
    figures: dict[str, Any] = {
        "shards": len(dataset.files),
        "tokens": dataset.tokens,
        "bytes": dataset.tokens * dataset.dtype.itemsize,
        "dtype": str(dataset.dtype),
        "fingerprint": dataset.fingerprint,
    }
    if dataset.documents is None:
        if verify:
            raise InputError(f"{path} holds upstream's chunk files, which carry no hashes: leave --verify out")
        return figures
    manifest = read_manifest(dataset.path)
    with ThreadPoolExecutor(cores()) as threads:  # reading and hashing let go of the interpreter
        checked = list(threads.map(lambda shard: _check(dataset.path, shard, verify, block_size), manifest["shards"]))
    if errors := [error for shard in checked for error in shard.errors]:
        raise InputError(*errors)
    histogram = sum((shard.histogram for shard in checked), np.zeros(64, dtype=np.int64))
    longer, tokens_of_longer = sum(shard.longer for shard in checked), sum(shard.tokens_of_longer for shard in checked)
    figures |= {
        "documents": dataset.documents,
        "mean_document_length": round(dataset.tokens / dataset.documents, 1),
        "max_document_length": max(shard.longest for shard in checked),
        "bytes_of_text": "unknown" if dataset.num_bytes is None else dataset.num_bytes,
        "bytes_per_token": _bytes_per_token(dataset.num_bytes, dataset.tokens),
        f"over {block_size:,} tokens": _shares(longer, dataset.documents, tokens_of_longer, dataset.tokens),
        "vocab_size": dataset.vocab_size,
        "max_token": dataset.max_token,
        "tokenizer_sha256": dataset.tokenizer_sha256,
        "bos": f"{dataset.bos_id} before each document" if dataset.bos else "none",
        "eos": f"{dataset.eos_id} after each document" if dataset.eos else "none",
    }
    for power in np.flatnonzero(histogram).tolist():
        low, high = (0 if power == 0 else 1 << (power - 1)), (1 << power) - 1
        figures[f"documents of {low:,} to {high:,} tokens"] = int(histogram[power])
    for subset, count in manifest["subsets"].items() if list(manifest["subsets"]) != ["."] else ():
        figures[f"share of {subset}"] = f"{count['tokens'] / dataset.tokens:.2%} of the tokens"
        figures[f"bytes_per_token of {subset}"] = _bytes_per_token(count.get("bytes"), count["tokens"])
        keys = (f"documents_over_{block_size}", "documents", f"tokens_over_{block_size}", "tokens")
        recorded = [count.get(key) for key in keys]
        figures[f"over {block_size:,} tokens of {subset}"] = (
            _shares(*recorded) if all(map(is_count, recorded)) else "not recorded"
        )
    return figures | _tokens(dataset, tokenizer)


def _tokens(dataset: PackedDataset, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Count in a sample of the stream: the most frequent tokens, and bos and eos that follow one another."""
    if tokenizer and tokenizer.sha256 != dataset.tokenizer_sha256:
        raise InputError(f"{tokenizer.path} is not what {dataset.path} was made with: give that one")
    count = min(dataset.tokens, 4096)
    starts = np.linspace(0, dataset.tokens - count, max(1, min(SAMPLED, dataset.tokens) // count)).astype(np.int64)
    parts = [dataset.read(int(start), count) for start in starts]
    for start, part in zip(starts.tolist(), parts, strict=True):
        if dataset.vocab_size is not None and (wrong := first_outside(part, dataset.vocab_size)) is not None:
            number = bisect_right(dataset.ends, start + wrong)
            file = dataset.path / dataset.files[number]
            position = start + wrong - (dataset.ends[number - 1] if number else 0)
            hint = f"delete {file.stem}.json and {HINT}"
            raise vocabulary_error(file, part[wrong], position, dataset.vocab_size, hint)
    ids, counts = np.unique(np.concatenate(parts), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:10]
    names = [f"{tokenizer.decode([i])!r}" if tokenizer else str(i) for i in ids[order].tolist()]
    shares = counts[order] / counts.sum()
    figures = {"most_frequent": ", ".join(f"{name} {share:.1%}" for name, share in zip(names, shares, strict=True))}
    for name, token in (("bos", dataset.bos_id), ("eos", dataset.eos_id)):
        pairs = sum(int(((part[:-1] == token) & (part[1:] == token)).sum()) for part in parts)
        figures[f"{name} twice in a row"] = f"{pairs:,} times in a sample of {sum(map(len, parts)):,} tokens"
    if tokenizer:
        figures["begins"] = repr(tokenizer.decode(dataset.read(0, min(100, dataset.tokens)).tolist()))
    return figures


def _bytes_per_token(num_bytes: Any, tokens: int) -> float | str:
    return "unknown" if not is_count(num_bytes) or not tokens else round(num_bytes / tokens, 3)


def _shares(longer: int, documents: int, tokens_of_longer: int, tokens: int) -> str:
    of_documents, of_tokens = longer / max(1, documents), tokens_of_longer / max(1, tokens)
    return f"{of_documents:.2%} of the documents, {of_tokens:.2%} of the tokens"


class _Shard(NamedTuple):
    """What the index of a shard says."""

    histogram: np.ndarray
    """(64,) documents of 0, 1, 2-3, 4-7 ... tokens"""
    longest: int
    longer: int
    """documents longer than the context"""
    tokens_of_longer: int
    errors: list[str]


def _check(folder: Path, shard: dict[str, Any], verify: bool, block_size: int) -> _Shard:
    """Read the index of a shard and, with ``verify``, its tokens; what is damaged is among the result."""
    errors = []
    ends = read_index(folder / f"{shard['name']}.idx.npy", shard["documents"], shard["tokens"])
    if ends is None:
        errors.append(".idx.npy is missing or does not fit its .bin")
    if verify and hash_file(folder / f"{shard['name']}.bin") != shard["blake2b"]:
        errors.append(".bin is not what was written, its hash differs")
    lengths = np.diff(ends if ends is not None else [], prepend=0)
    powers = np.frexp(lengths.astype(np.float64))[1]  # exact: a power of two is the first of its class
    hint = f"delete {shard['name']}.json and {HINT}"
    errors = [f"{folder / shard['name']}{error}: {hint}" for error in errors]
    if verify and not errors:
        index = folder / f"{shard['name']}.idx.npy"
        try:
            info = read_shard_info(folder, shard["name"]) or {}
            recorded = info.get("index_blake2b")  # None: written before there was one
            if recorded is not None and recorded != hash_file(index):
                errors.append(f"{index} is not what was written, its hash differs: {hint}")
        except InputError as error:
            errors.append(str(error))
    longer = lengths[lengths > block_size]
    histogram, longest = np.bincount(powers, minlength=64), int(lengths.max(initial=0))
    return _Shard(histogram, longest, len(longer), int(longer.sum()), errors)
