"""What a packed folder holds, in figures, and whether its files are still what was written."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama import InputError
from tinyllama.data.packed import DIGEST_SIZE, MANIFEST, open_packed


def inspect_packed(path: str | Path, verify: bool = False) -> dict[str, Any]:
    """Figures of a packed folder by name; with ``verify``, every shard is hashed again and compared with the manifest.

    Lengths are in tokens and count bos and eos. Raises InputError when the folder is not whole, with one fault for each
    damaged shard, and when ``verify`` has no hashes to compare with.
    """
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
    faults: list[str] = []
    longest = 0
    for shard in json.loads((dataset.path / MANIFEST).read_bytes())["shards"]:
        ends = _document_ends(dataset.path, shard)
        if ends is None:
            faults.append(_fault(dataset.path, shard, ".idx.npy is missing or does not fit its .bin"))
        else:
            longest = max(longest, int(np.diff(ends, prepend=0).max(initial=0)))
        if verify and _hash(dataset.path / f"{shard['name']}.bin") != shard["blake2b"]:
            faults.append(_fault(dataset.path, shard, ".bin is not what was written, its hash differs"))
    if faults:
        raise InputError(*faults)
    return figures | {
        "documents": dataset.documents,
        "mean_document_length": round(dataset.tokens / dataset.documents, 1),
        "max_document_length": longest,
        "vocab_size": dataset.vocab_size,
        "max_token": dataset.max_token,
        "tokenizer_sha256": dataset.tokenizer_sha256,
        "bos": f"{dataset.bos_id} before each document" if dataset.bos else "none",
        "eos": f"{dataset.eos_id} after each document" if dataset.eos else "none",
    }


def _document_ends(folder: Path, shard: dict[str, Any]) -> np.ndarray | None:
    try:
        ends = np.load(folder / f"{shard['name']}.idx.npy").astype(np.int64)
    except (OSError, ValueError):
        return None
    whole = ends.shape == (shard["documents"],) and ends.max(initial=0) == shard["tokens"]
    return ends if whole and (np.diff(ends, prepend=0) >= 0).all() else None


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_SIZE)).hexdigest()


def _fault(folder: Path, shard: dict[str, Any], what: str) -> str:
    return f"{folder / shard['name']}{what}: delete {shard['name']}.json and rerun the prepare command"
