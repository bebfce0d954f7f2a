"""The JSON beside the tokens: NAME.json of a shard and manifest.json of a dataset, read and checked."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DIGEST_SIZE = 32  # bytes of every blake2b here
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def read_shard_info(directory: Path, name: str) -> dict[str, Any] | None:
    """What NAME.json says, or None when the shard is not done; raises InputError when the shard is damaged."""
    directory = Path(directory)
    remedy = f"delete {name}.json and rerun the prepare command"
    try:
        info = read_json(directory / f"{name}.json", remedy)
    except FileNotFoundError:
        return None
    check_size(directory / f"{name}.bin", info["tokens"] * DTYPES[info["dtype"]].itemsize, remedy)
    if not (directory / f"{name}.idx.npy").exists():
        raise InputError(f"{directory / name}.idx.npy is missing: {remedy}")
    return info


def fingerprint(dtype: str, shards: list[dict[str, Any]]) -> str:
    """Names the token stream: dtype, and length and hash of each shard in order."""
    stream = {"dtype": dtype, "shards": [[shard["tokens"], shard["blake2b"]] for shard in shards]}
    return hashlib.blake2b(to_json(stream), digest_size=DIGEST_SIZE).hexdigest()


def to_json(value: dict[str, Any], indent: int | None = None) -> bytes:
    """The same value, the same bytes."""
    return json.dumps(value, sort_keys=True, indent=indent).encode()


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A NAME.json or manifest.json; raises InputError when it is damaged or of another format."""
    try:
        value = json.loads(path.read_bytes())
        version, dtype = value["format_version"], value["dtype"]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error!r}): {remedy}") from None
    if version != FORMAT_VERSION or dtype not in DTYPES:
        raise InputError(
            f"{path}: format version {version} with {dtype} tokens is not known here: use the TinyLlama that wrote it"
        )
    return value


def check_size(path: Path, expected: int, remedy: str) -> None:
    """Raise InputError unless the file is there with that many bytes."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {remedy}") from None
    if size != expected:
        raise InputError(f"{path} has {size} bytes, not the {expected} it was written with: {remedy}")
