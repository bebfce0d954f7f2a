"""The JSON beside the tokens: NAME.json of a shard and manifest.json of a dataset, read and checked."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from tinyllama import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
HINT = "rerun the prepare command"
DIGEST_SIZE = 32  # bytes of every blake2b here
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


# What must be there: a type, [what each item is], {key: what it is} or {str: what each value is}
_SHARD = {"name": str, "tokens": int, "documents": int, "max_token": int, "blake2b": str}
_MANIFEST = {
    "fingerprint": str,
    "vocab_size": int,
    "tokenizer_sha256": str | None,
    "max_token": int,
    "bos": bool | None,
    "eos": bool | None,
    "bos_id": int | None,
    "eos_id": int | None,
    "shards": [_SHARD],
    "subsets": {str: {"tokens": int}},
}


def read_shard_info(directory: Path, name: str, more: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the content of NAME.json, or None when the shard is not done; raises InputError when the shard is damaged.

    ``more`` are keys it must have besides those of every shard, and what they hold.
    """
    directory = Path(directory)
    hint = f"delete {name}.json and {HINT}"
    try:
        info = _read_json(directory / f"{name}.json", _SHARD | (more or {}), hint)
    except FileNotFoundError:
        return None
    check_size(directory / f"{name}.bin", info["tokens"] * DTYPES[info["dtype"]].itemsize, hint)
    if not (directory / f"{name}.idx.npy").exists():
        raise InputError(f"{directory / name}.idx.npy is missing: {hint}")
    return info


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the content of manifest.json; raises InputError when it is damaged."""
    return _read_json(directory / MANIFEST, _MANIFEST, HINT, subsets={})


def fingerprint(dtype: str, shards: list[dict[str, Any]]) -> str:
    """Return the hash that names the token stream: of dtype, and length and hash of each shard in order."""
    stream = {"dtype": dtype, "shards": [[shard["tokens"], shard["blake2b"]] for shard in shards]}
    return hashlib.blake2b(to_json(stream), digest_size=DIGEST_SIZE).hexdigest()


def to_json(value: dict[str, Any], indent: int | None = None) -> bytes:
    """Return ``value`` as JSON: the same value, the same bytes."""
    return json.dumps(value, sort_keys=True, indent=indent).encode()


def _read_json(path: Path, kind: dict[str, Any], hint: str, **absent: Any) -> dict[str, Any]:
    """A NAME.json or manifest.json, with ``absent`` for keys it lacks; InputError when damaged or of another format."""
    try:
        value = absent | json.loads(path.read_bytes())
        version, dtype = value["format_version"], value["dtype"]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error!r}): {hint}") from None
    if version != FORMAT_VERSION or str(dtype) not in DTYPES:
        raise InputError(
            f"{path}: format version {version} with {dtype} tokens is not known here: use the TinyLlama that wrote it"
        )
    if (wrong := _misfit(value, kind)) is not None:
        raise InputError(f"{path} is damaged ({wrong.lstrip('.')} is missing or of a wrong type): {hint}")
    return value


def _misfit(value: Any, kind: Any) -> str | None:
    """Where in ``value`` something is not of its ``kind``, as in ``.shards[3].tokens``; None: nowhere."""
    if isinstance(kind, type | UnionType):
        return None if isinstance(value, kind) else ""
    if not isinstance(value, type(kind)):
        return ""
    inner: Iterable[tuple[Any, Any, Any]]
    if isinstance(kind, list):
        inner = ((i, item, kind[0]) for i, item in enumerate(value))
    elif str in kind:
        inner = ((key, item, kind[str]) for key, item in value.items())
    else:
        inner = ((key, value.get(key), wanted) for key, wanted in kind.items())
    for key, item, wanted in inner:
        if (below := _misfit(item, wanted)) is not None:
            return (f"[{key}]" if isinstance(kind, list) else f".{key}") + below
    return None


def check_size(path: Path, expected: int, hint: str) -> None:
    """Raise InputError unless the file is there with that many bytes."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {hint}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {hint}") from None
    if size != expected:
        raise InputError(f"{path} has {size} bytes, not the {expected} it was written with: {hint}")
