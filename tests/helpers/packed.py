"""Packed folders of a few tokens, as a preparation would write them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama.data.packed import ShardWriter, write_manifest
from tinyllama.prepare.prepare import CONTEXTS

POLICY = {
    "tokenizer_sha256": "ab" * 32,
    "encoder": "sentencepiece",
    "bos": False,
    "eos": True,
    "bos_id": 1,
    "eos_id": 2,
}

SHORT = {f"{key}_over_{context}": 0 for context in CONTEXTS for key in ("documents", "tokens")}
"""among the figures of a subset none of whose documents is longer than a context"""


def add(writer: ShardWriter, ids: Sequence[int] | np.ndarray) -> None:
    """Append one document."""
    writer.append(np.asarray(ids, dtype=np.int64), [len(ids)])


def write_shard(folder: Path, name: str, documents: Any, vocab_size: int = 100, **metadata: Any) -> dict[str, Any]:
    """Write a shard of ``documents``, each a list of token ids."""
    with ShardWriter(folder, name, vocab_size) as writer:
        for document in documents:
            add(writer, document)
        return writer.finish(**POLICY | metadata)


def change(path: Path, **changes: Any) -> None:
    """Change keys of a NAME.json or manifest.json, which then is one of before there was a hash of its content."""
    content = json.loads(path.read_bytes()) | changes
    content.pop("metadata_blake2b", None)
    path.write_text(json.dumps(content))


def write_dataset(folder: Path, shards: Mapping[str, Any], vocab_size: int = 100) -> dict[str, Any]:
    """Write shards by name, and their manifest."""
    for name, documents in shards.items():
        write_shard(folder, name, documents, vocab_size)
    return write_manifest(folder, list(shards))
