"""A model's weights on disk, whatever wrote them, by our names and one tensor at a time."""

import functools
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tinyllama import InputError, checkpoint
from tinyllama.config import ModelConfig
from tinyllama.convert import folder, layout
from tinyllama.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

# of upstream's parameters as plain lit_gpt names them, where ours and its last state have swiglu.w1, w2 and w3
PLAIN_MLP = {".mlp.fc_1.": ".mlp.swiglu.w1.", ".mlp.fc_2.": ".mlp.swiglu.w2.", ".mlp.proj.": ".mlp.swiglu.w3."}


@dataclass(frozen=True)
class Weights:
    """Where a model's tensors are and how to read them."""

    path: Path
    """the step directory, file or folder that holds them"""
    config: ModelConfig
    dtype: torch.dtype
    """of all tensors as read"""
    facts: dict[str, Any]
    """step, tokens, tokenizer_sha256, bos_id and eos_id, None where not known"""
    read: Callable[[str], Tensor]
    """one tensor in full by our name, on the CPU, in memory of its own"""

    def cast(self, dtype: str | torch.dtype | None) -> "Weights":
        """The same, read in another dtype; None: as it is."""
        if dtype is None:
            return self
        to = DTYPES[dtype] if isinstance(dtype, str) else dtype
        return replace(self, dtype=to, read=lambda name: self.read(name).to(to))

    def load(self) -> dict[str, Tensor]:
        """All tensors."""
        return {name: self.read(name) for name in layout.shapes(self.config)}


def open_weights(path: str | Path, config: ModelConfig | None = None) -> Weights:
    """The weights at ``path``: a step directory or run of ours, a Hugging Face folder, or an upstream .pth file.

    An upstream file does not say its sizes: ``config`` does. Only names and shapes are read. Raises InputError for a
    path that is none of these, a file that is not whole or names code, and tensors that are not those of the sizes.
    """
    path = Path(path)
    if path.is_file():
        if config is None:
            raise InputError(
                f"{path} does not say its model's sizes: give them to convert_lit_checkpoint.py, by --model.name "
                "(tinyllama_1.1b) or dotted flags"
            )
        return _open_upstream(path, config)
    if (path / "config.json").is_file():
        return _open_hf(path)
    step_dir = checkpoint.resolve(path)
    entries, read = checkpoint.open_weights(step_dir)
    config = checkpoint.read_model_config(step_dir)
    _check_shapes(step_dir, {name: tuple(entry.size) for name, entry in entries.items()}, layout.shapes(config))
    dtype = _one_dtype(step_dir, entries["transformer.wte.weight"].properties.dtype)
    return Weights(step_dir, config, dtype, checkpoint.read_state(step_dir), read)


@torch.no_grad()
def copy_into(model: nn.Module, weights: Weights) -> None:
    """Fill a model, sharded or not, on any device; a rank reads all tensors, one at a time, and keeps its shards."""
    for name, parameter in model.named_parameters():
        full = weights.read(name).to(parameter.dtype)
        if isinstance(parameter, DTensor):
            full = distribute_tensor(
                full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        parameter.copy_(full)


def _open_hf(path: Path) -> Weights:
    hf = _json(path / "config.json")
    said = folder.read_mark(path)
    has_tokenizer = any((path / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    pieces = Tokenizer(path).vocab_size if has_tokenizer else None
    config = layout.config_of(hf, str(path / "config.json"), pieces)
    if "model" in said:  # it is an export of ours, which knows what is padding
        config = replace(config, **{key: said["model"][key] for key in ("name", "vocab_size", "padding_multiple")})
    tensors = _hf_tensors(path)
    expected = layout.hf_shapes(config)
    ignored = {key for key in tensors if key.endswith("rotary_emb.inv_freq")}  # older versions saved this table
    if config.tie_embeddings:
        ignored.add("lm_head.weight")
    found = {key: tensor.shape for key, tensor in tensors.items() if key not in ignored or key in expected}
    _check_shapes(path, found, expected)
    dtype = _one_dtype(path, tensors["model.embed_tokens.weight"].dtype)
    parts = dict(layout.keys(config))

    def read(name: str) -> Tensor:
        return layout.from_hf([tensors[key].read().to(dtype) for key in parts[name]], config)

    eos_id, bos_id = (
        value[0] if isinstance(value, list) and value else value
        for value in (hf.get("eos_token_id"), hf.get("bos_token_id"))
    )
    facts = {"step": said.get("step") or 0, "tokens": said.get("tokens") or 0, "eos_id": eos_id, "bos_id": bos_id}
    return Weights(path, config, dtype, facts | {"tokenizer_sha256": said.get("tokenizer_sha256")}, read)


def _open_upstream(path: Path, config: ModelConfig) -> Weights:
    content = _unpickle(path)
    state = content.get("model", content) if isinstance(content, dict) else {}
    tensors = {}
    for name, tensor in state.items() if isinstance(state, Mapping) else ():
        if isinstance(tensor, Tensor):
            for plain, fused in PLAIN_MLP.items():
                name = name.replace(plain, fused)
            tensors[name] = tensor
    _check_shapes(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, layout.shapes(config))
    dtype = _one_dtype(path, tensors["transformer.wte.weight"].dtype)
    step = content.get("step_count", 0)
    # upstream trained with Llama's tokenizer, and its files do not say how many tokens
    facts = {"step": step if isinstance(step, int) else 0, "tokens": None, "tokenizer_sha256": None}
    read = lambda name: tensors[name].to(dtype, copy=True)  # noqa: E731
    return Weights(path, config, dtype, facts | {"eos_id": 2, "bos_id": 1}, read)


@dataclass(frozen=True)
class _Stored:
    """A tensor of a Hugging Face folder."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def _hf_tensors(path: Path) -> dict[str, _Stored]:
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, _Stored] = {}
    for file in _hf_files(path):
        if file.suffix == ".bin":
            content = _unpickle(file)
            if not (isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())):
                raise InputError(f"{file} is no state dict: give a file of tensors by name")
            for key, tensor in content.items():
                tensors[key] = _Stored(tuple(tensor.shape), tensor.dtype, tensor.clone)
            continue
        try:
            opened = safe_open(file, framework="pt")
            for key in opened.keys():  # noqa: SIM118 (it is no dict)
                part = opened.get_slice(key)
                dtype = _SAFETENSORS.get(part.get_dtype(), torch.uint8)
                read = functools.partial(_read_safetensors, file, key)
                tensors[key] = _Stored(tuple(part.get_shape()), dtype, read)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read ({error}): fetch it whole (git lfs pull)") from None
    return tensors


def _read_safetensors(file: Path, key: str) -> Tensor:
    from safetensors import safe_open

    # opened for each tensor, so that the mapped pages of the whole file do not add up in memory
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(key)


_SAFETENSORS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _hf_files(path: Path) -> list[Path]:
    for single, index in zip(("model.safetensors", "pytorch_model.bin"), INDEXES, strict=True):
        if (path / single).is_file():
            return [path / single]
        if (path / index).is_file():
            names = _json(path / index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise InputError(f"{path / index} has no weight_map: fetch the folder again")
            files = [path / Path(name).name for name in sorted(set(names.values()))]
            if missing := [str(file) for file in files if not file.is_file()]:
                raise InputError(f"{missing[0]} is missing, which {index} names: fetch the folder again")
            return files
    raise InputError(f"{path} has no model.safetensors, pytorch_model.bin or an index of them: fetch the folder again")


def _unpickle(path: Path) -> Any:
    """The content of a file that torch.save wrote; nothing in it is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "Weights only load failed" in str(error):
            reason = "it holds more than tensors and plain values, and is not executed"
        raise InputError(f"{path} cannot be loaded ({reason}): give a file of plain tensors, whole") from None


def _check_shapes(path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    faults = [f"{key} is missing" for key in expected if key not in found]
    faults += [f"{key} is not of such a model" for key in found if key not in expected]
    faults += [
        f"{key} has shape {list(shape)}, the model's sizes make {list(expected[key])}"
        for key, shape in found.items()
        if key in expected and tuple(shape) != tuple(expected[key])
    ]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise InputError(f"{path}: {'; '.join(faults[:3])}{more}: give weights and sizes of one model")


def _one_dtype(path: Path, dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES.values():
        raise InputError(f"{path} holds {dtype} weights: give float32, bfloat16 or float16 ones")
    return dtype


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
        reason = "it is no object"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise InputError(f"{path} cannot be read as JSON ({reason}): fetch the folder again")
