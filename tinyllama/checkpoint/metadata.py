"""Read the .metadata of a step, a pickle of torch.distributed.checkpoint (DCP), without executing or trusting it."""

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

# all that DCP's pickled .metadata of tensors is made of
METADATA_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}

OVERHEAD = 2**16
"""Bytes that torch.save may add to those of a tensor; it adds 1.3 kB."""


def read(payload: bytes) -> Metadata:
    """Unpickle ``payload``; raises some exception if it is damaged or names anything but DCP's metadata."""
    for opcode, argument, _ in pickletools.genops(payload):  # which refuses lengths beyond the end
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(payload):
            raise ValueError("it declares more entries than it has bytes")  # the unpickler would allocate them
    return _Unpickler(io.BytesIO(payload)).load()


def check(metadata: Any, size_of: Callable[[str], int]) -> None:
    """Check that the files of a step hold every tensor in full; ``size_of`` returns the bytes of a file by its name.

    Raises ValueError, or what the wrong types in a damaged pickle make Python raise.
    """
    _require(type(metadata) is Metadata, "it is no metadata")
    for name, tensor in metadata.state_dict_metadata.items():
        _require(type(name) is str and type(tensor) is TensorStorageMetadata, f"{name!r} is no tensor")
        _check_rows(name, tensor)
        for chunk in tensor.chunks:
            stored = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            extra = stored.length - math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
            _require(0 <= extra <= OVERHEAD, f"{name} does not have the bytes of its shape")
            _require(stored.transform_descriptors is None, f"{name} is transformed")
    ends: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        file, offset, length = stored.relative_path, stored.offset, stored.length
        _require(type(file) is str and file != ".." and file == Path(file).name != "", f"it names the file {file!r}")
        _require(type(offset) is type(length) is int and min(offset, length) >= 0, f"{file} has no such part")
        ends[file] = max(ends.get(file, 0), offset + length)
    for file, end in ends.items():
        size = size_of(file)
        _require(size >= end, f"{file} is missing or cut short")
        _require(size == end, f"{file} is longer than its tensors")


def _check_rows(name: str, tensor: TensorStorageMetadata) -> None:
    """Check that the chunks of ``tensor`` are its rows from the first to the last, as FSDP shards them."""
    _require(type(tensor.size) is torch.Size and type(tensor.properties.dtype) is torch.dtype, f"{name} has no shape")
    if not tensor.size:
        chunk = ChunkStorageMetadata(torch.Size(), torch.Size())
        _require(tensor.chunks == [chunk], f"{name} is not one number")
        return
    rows = 0
    for chunk in sorted(tensor.chunks, key=lambda chunk: (chunk.offsets, chunk.sizes)):
        _require(type(chunk.offsets) is type(chunk.sizes) is torch.Size, f"{name} has a chunk without a shape")
        _require(chunk.offsets == (rows, *(0 for _ in tensor.size[1:])), f"{name} lacks rows")
        _require(chunk.sizes[0] >= 0 and chunk.sizes[1:] == tensor.size[1:], f"{name} lacks columns")
        rows += chunk.sizes[0]
    _require(rows == tensor.size[0], f"{name} lacks rows")


def _require(holds: object, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


class _Unpickler(pickle.Unpickler):
    """Reads DCP's own metadata and refuses everything else that a pickle could name."""

    def find_class(self, module: str, name: str) -> Any:
        if name in METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _memory_format(cls: Any, name: Any) -> _MEM_FORMAT_ENCODING:
    """Replace getattr: early releases of Python 3.11 pickle an enum member as getattr(its class, its name)."""
    if cls is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"it names getattr({cls}, {name!r})")
    return _MEM_FORMAT_ENCODING[name]
