"""Write files in the safetensors format.

By hand, because safetensors' own writer (0.8) makes files that only their owner may read, and hides the error of a
full disk in one of its own.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinyllama import InputError, __version__, atomic
from tinyllama.convert import folder
from tinyllama.convert.weights import Weights

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the length of a JSON header, the header, and the bytes of ``tensors`` in their order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors after it
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def export(weights: Weights, file: Path) -> None:
    """Write all ``weights`` by our names into ``file``, completely or not at all; it replaces an earlier export.

    Its metadata has step, tokens, the steps of a mean, our version and the model's sizes as JSON. Raises InputError for
    a ``file`` that cannot be written, belongs to the weights, or has content that no export wrote.
    """
    if weights.path.resolve() in (file.resolve(), *file.resolve().parents):
        raise InputError(f"{file} is part of {weights.path}, which is to be exported: give another file")
    metadata = {"tinyllama": __version__, "model": json.dumps(asdict(weights.config))}
    keys = ("step", "tokens", "averaged_steps")
    metadata |= {key: str(weights.metadata[key]) for key in keys if key in weights.metadata}
    try:
        if not file.name or (file.exists() and not file.is_file()):
            raise InputError(f"{file} is a folder or a device, not a file: give a file, such as model.safetensors")
        folder.check_name(file, "give another file")
        if _is_foreign(file):
            raise InputError(f"{file} is there and is not an export, and is left as it is: give another file")
        target = atomic.behind_link(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(target) as partial:
            write(partial, weights.load(), metadata)
    except OSError as error:
        raise InputError(
            f"cannot write {file} ({folder.why(error)}): give a file in a folder that can be written"
        ) from None


def _is_foreign(file: Path) -> bool:
    """Return whether ``file`` has content that ``export`` did not write."""
    if not file.is_file() or not file.stat().st_size:
        return False
    try:
        with safe_open(file, "pt") as opened:
            return "tinyllama" not in (opened.metadata() or {})
    except SafetensorError:
        return True
