"""Read a checkpoint's .metadata, a pickle of torch.distributed.checkpoint (DCP), without executing or trusting it."""

import functools
import io
import math
import pickle
import pickletools
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

MOST_OVERHEAD = 2**16
"""Largest number of bytes that torch.save may add to those of a tensor; it adds 1.3 kB."""


@functools.lru_cache(maxsize=1)
def read(payload: bytes) -> Metadata:
    """Unpickle ``payload``. Raises ValueError if it is damaged or names anything but DCP's metadata.

    With 512 ranks that takes some 20 s, so the last result is kept: a start reads its step to find it and to load it.
    Who has loaded it calls ``forget``, for 3 million objects slow down Python's garbage collector.
    """
    try:
        for opcode, argument, _ in pickletools.genops(payload):  # which refuses lengths beyond the end
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(payload):
                raise ValueError("it declares more entries than it has bytes")  # the unpickler would allocate them
        return _Unpickler(io.BytesIO(payload)).load()
    except Exception as error:  # whatever damaged bytes make a pickle raise
        raise ValueError(f".metadata is not the metadata of a checkpoint of ours: {error}") from error


def forget() -> None:
    """Release what ``read`` has kept."""
    read.cache_clear()


@functools.lru_cache(maxsize=2)  # the steps of a run have the same, until it goes on with other ranks
def file_sizes(payload: bytes) -> dict[str, int]:
    """Check that ``payload`` has every tensor in full; return the bytes of each file that holds them, by its name.

    Raises ValueError, or what the wrong types in a damaged pickle make Python raise.
    """
    metadata: Any = read(payload)
    _require(type(metadata) is Metadata, "it is not metadata")
    for name, tensor in metadata.state_dict_metadata.items():
        _require(type(name) is str and type(tensor) is TensorStorageMetadata, f"{name!r} is not a tensor")
        _check_rows(name, tensor)
        for chunk in tensor.chunks:
            stored = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            extra = stored.length - math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
            _require(0 <= extra <= MOST_OVERHEAD, f"{name} does not have the bytes of its shape")
            _require(stored.transform_descriptors is None, f"{name} is transformed")
    ends: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        file, offset, length = stored.relative_path, stored.offset, stored.length
        _require(type(file) is str and file != ".." and file == Path(file).name != "", f"it names the file {file!r}")
        _require(type(offset) is type(length) is int and min(offset, length) >= 0, f"{file} has no such part")
        ends[file] = max(ends.get(file, 0), offset + length)
    return ends


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
