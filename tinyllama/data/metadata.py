"""The JSON beside the tokens: NAME.json of a shard and manifest.json of a dataset, read and checked.

Each holds a hash of its own content, ``metadata_blake2b``, so that damage of any kind is found; files from before there
was one are checked as far as their fields contradict each other.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama import InputError, printable
from tinyllama.checkpoint.state import is_count
from tinyllama.data.files import check_size, open_index, open_regular

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
HINT = "rerun the prepare command"
DIGEST_SIZE = 32  # bytes of every blake2b here
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_OWN_HASH = "metadata_blake2b"
_MOST_BYTES = 2**28  # of a manifest, which has 300 bytes a shard


def dtype_of(vocab_size: int) -> str:
    """Return the name of the smallest of ``DTYPES`` that holds every id below ``vocab_size``."""
    return "uint16" if vocab_size < 65536 else "uint32"


def is_text(value: Any) -> bool:
    """Return whether ``value`` is a text of the length that a name or a hash may have."""
    return isinstance(value, str) and len(value) <= 4096


def _is_name(value: Any) -> bool:
    """Return whether ``value`` is the name of a file in this folder and in no other."""
    try:
        encoded = os.fsencode(value)
    except (TypeError, UnicodeEncodeError):
        return False
    plain = value not in ("", ".", "..") and not {b"/"[0], 0} & set(encoded)
    return isinstance(value, str) and plain and len(encoded) <= 255


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 2 * DIGEST_SIZE and set(value) <= set("0123456789abcdef")


def _is_token_or_none(value: Any) -> bool:
    return (is_count(value) and value < 2**32) or (type(value) is int and value == -1)


def _is_vocab_size(value: Any) -> bool:
    return is_count(value) and 0 < value <= 2**32


def _or_null(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


# What must be there: a predicate, [what each item is], {key: what it is} or {str: what each value is}
_COUNTS = {"tokens": is_count, "documents": is_count, "max_token": _is_token_or_none}
_SHARD = _COUNTS | {"name": _is_name, "blake2b": _is_digest}
_POLICY = {
    "vocab_size": _is_vocab_size,
    "tokenizer_sha256": _or_null(is_text),
    "encoder": _or_null(is_text),
    "bos": _or_null(lambda value: type(value) is bool),
    "eos": _or_null(lambda value: type(value) is bool),
    "bos_id": _or_null(is_count),
    "eos_id": _or_null(is_count),
}
_MANIFEST = {
    **_COUNTS,
    **_POLICY,
    "fingerprint": _is_digest,
    "shards": [_SHARD],
    "subsets": {str: {"tokens": is_count}},
}


def read_shard_info(directory: Path, name: str, more: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Return the content of NAME.json, or None when the shard is not done; raises InputError when the shard is damaged.

    ``more`` are keys it must have besides those of every shard, and what they hold.
    """
    directory = Path(directory)
    hint = f"delete {name}.json and {HINT}"
    path, index = directory / f"{name}.json", directory / f"{name}.idx.npy"
    try:
        info = _read_json(path, _SHARD | _POLICY | (more or {}), hint)
    except FileNotFoundError:
        return None
    if info["name"] != name:
        raise InputError(f"{path} is damaged (it is of the shard {printable(info['name'], 300)}): {hint}")
    check_size(directory / f"{name}.bin", info["tokens"] * DTYPES[info["dtype"]].itemsize, hint)
    try:
        file = open_index(index, info["documents"])
    except FileNotFoundError:
        raise InputError(f"{index} is missing: {hint}") from None
    if file is None:
        raise InputError(f"{index} does not fit its .bin: {hint}")
    file.close()
    return info


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the content of manifest.json; raises InputError when it is missing or damaged."""
    path = directory / MANIFEST
    try:
        return _read_json(path, _MANIFEST, HINT, subsets={})
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {HINT}") from None


def fingerprint(dtype: str, shards: list[dict[str, Any]]) -> str:
    """Return the hash that names the token stream: of dtype, and length and hash of each shard in order."""
    return _blake2b({"dtype": dtype, "shards": [[shard["tokens"], shard["blake2b"]] for shard in shards]})


def hash_file(path: Path) -> str:
    """Return the hash of a file's bytes, in hexadecimal; raises OSError if it cannot be read."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_SIZE)).hexdigest()


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """Return ``value`` with the hash of its content added."""
    return value | {_OWN_HASH: _blake2b(value)}


def to_json(value: dict[str, Any], indent: int | None = None) -> bytes:
    """Return ``value`` as JSON: the same value, the same bytes."""
    return json.dumps(value, sort_keys=True, indent=indent).encode()


def _blake2b(value: dict[str, Any]) -> str:
    return hashlib.blake2b(to_json(value), digest_size=DIGEST_SIZE).hexdigest()


def _read_json(path: Path, kind: dict[str, Any], hint: str, **absent: Any) -> dict[str, Any]:
    """Read a NAME.json or manifest.json; ``absent`` stands for keys it lacks. InputError if it has another format."""
    try:
        with open_regular(path) as file:
            payload = file.read(_MOST_BYTES + 1)
        if len(payload) > _MOST_BYTES:
            raise InputError(f"{path} is damaged (it has more than {_MOST_BYTES:,} bytes): {hint}")
        value = json.loads(payload)
        version, dtype = value["format_version"], value["dtype"]
        whole = value.get(_OWN_HASH, "") == _blake2b({key: value[key] for key in value if key != _OWN_HASH})
    except (FileNotFoundError, InputError):
        raise
    except OSError as error:
        raise InputError(f"{path} is damaged ({error.strerror}): {hint}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = printable(f"{type(error).__name__}: {error}", 200)  # the repr of some has all of the file
        raise InputError(f"{path} is damaged ({reason}): {hint}") from None
    if type(version) is not int or version != FORMAT_VERSION or str(dtype) not in DTYPES:
        found = f"format version {printable(version, 40)} with {printable(dtype, 40)} tokens"
        raise InputError(f"{path}: {found} is not known here: use the TinyLlama that wrote it")
    if _OWN_HASH in value and not whole:
        raise InputError(f"{path} is damaged (it does not match its hash): {hint}")
    if (wrong := _misfit(absent | value, kind)) is not None:
        what = f"{printable(wrong.lstrip('.'), 300)} is missing or of a wrong type or value"
        raise InputError(f"{path} is damaged ({what}): {hint}")
    for contradiction in _contradictions(value):
        raise InputError(f"{path} is damaged ({contradiction}): {hint}")
    return absent | value


def _misfit(value: Any, kind: Any) -> str | None:
    """Where in ``value`` something is not of its ``kind``, as in ``.shards[3].tokens``; None: nowhere."""
    if callable(kind):
        return None if kind(value) else ""
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


def _contradictions(value: dict[str, Any]) -> Iterator[str]:
    """Yield what cannot be in a NAME.json or manifest.json whose fields are each of their kind."""
    vocab_size, shards = value["vocab_size"], value.get("shards")
    if value["dtype"] != dtype_of(vocab_size):
        yield f"a vocabulary of {vocab_size} is not stored as {value['dtype']}"
    for name in ("bos", "eos"):
        if value.get(name) and value.get(f"{name}_id") is None:
            yield f"{name}_id is null, and documents have {name}"
        if (value.get(f"{name}_id") or 0) >= vocab_size:
            yield f"{name}_id {value[f'{name}_id']} is outside the vocabulary of {vocab_size}"
    for counts in (value, *(shards or ())):
        if counts["max_token"] >= vocab_size:
            yield f"max_token {counts['max_token']} is outside the vocabulary of {vocab_size}"
        if (counts["tokens"] == 0) != (counts["max_token"] == -1) or (counts["tokens"] and not counts["documents"]):
            yield f"{counts['tokens']} tokens in {counts['documents']} documents, the largest {counts['max_token']}"
    if shards is None:
        return
    if not shards:
        yield "it lists no shards"
    if value["fingerprint"] != fingerprint(value["dtype"], shards):
        yield "its fingerprint is not that of its shards"
    if not all(one["name"] < other["name"] for one, other in pairwise(shards)):
        yield "its shards are not in the order of their names"
    for key, whole in (("tokens", sum), ("documents", sum), ("max_token", max)):
        if value[key] != whole(shard[key] for shard in shards):
            yield f"{key} {value[key]} is not that of its shards"
