"""Write files in the safetensors format, one tensor at a time."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama import InputError, __version__, atomic
from tinyllama.convert import layout
from tinyllama.convert.weights import SAFETENSORS_DTYPES, Weights

NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write the length of a JSON header, the header, and the bytes of ``tensors``, in the order of ``shapes``."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors after it
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def export(weights: Weights, file: Path) -> None:
    """Write all ``weights`` by our names into ``file``, completely or not at all; it replaces an existing file.

    Its metadata has step, tokens, our version and the model's sizes as JSON. Raises InputError for a ``file`` that
    cannot be written or belongs to the weights.
    """
    if weights.path.resolve() in (file.resolve(), *file.resolve().parents):
        raise InputError(f"{file} is part of {weights.path}, which is to be exported: give another file")
    config, shapes = weights.config, layout.shapes(weights.config)
    metadata = {"tinyllama": __version__} | {key: str(weights.facts[key]) for key in ("step", "tokens")}
    metadata["model"] = json.dumps(asdict(config))
    partial = None
    try:
        if not file.name or (file.exists() and not file.is_file()):
            raise InputError(f"{file} is no file but a folder or a device: give a file, such as model.safetensors")
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = atomic.temporary(file)
        write(partial, shapes, weights.dtype, map(weights.read, shapes), metadata)
        atomic.sync(partial)
        partial.replace(file)
        atomic.sync(file.parent)
    except OSError as error:
        raise InputError(
            f"cannot write {file} ({error.strerror}): give a file in a folder that can be written"
        ) from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
