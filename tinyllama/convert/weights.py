"""Read a model's weights from any supported format, by our names and one tensor at a time."""

import functools
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tinyllama import InputError, printable
from tinyllama.checkpoint import reader
from tinyllama.checkpoint.state import is_count
from tinyllama.config.model import ModelConfig
from tinyllama.convert import folder, layout
from tinyllama.model import assign_full
from tinyllama.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

# older lit_gpt's names of the MLP's parameters; ours and its latest version's are swiglu.w1, w2 and w3
PLAIN_MLP = {".mlp.fc_1.": ".mlp.swiglu.w1.", ".mlp.fc_2.": ".mlp.swiglu.w2.", ".mlp.proj.": ".mlp.swiglu.w3."}

# what compiling or wrapping a model puts into the names of its parameters
WRAPPERS = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")

EMBEDDING = "transformer.wte.weight"

COUNTS = ("step", "tokens", "eos_id", "bos_id")


@dataclass(frozen=True)
class Weights:
    """A model's weights, read one tensor at a time."""

    path: Path
    """step directory, file or folder that holds them"""
    config: ModelConfig
    dtype: torch.dtype
    """of all tensors as read"""
    metadata: dict[str, Any]
    """step, tokens, tokenizer_sha256, bos_id, eos_id, and bos, whether documents begin with bos_id; None where unknown;
    eos_ids are all that end a text, eos_id among them; averaged_steps only of a mean, which steps it is of"""
    read: Callable[[str], Tensor]
    """returns one full tensor by our name, on the CPU, in its own memory"""

    def cast(self, dtype: str | torch.dtype | None) -> "Weights":
        """Return the same weights, read in another dtype; None keeps theirs."""
        if dtype is None:
            return self
        to = DTYPES[dtype] if isinstance(dtype, str) else dtype
        return replace(self, dtype=to, read=lambda name: self.read(name).to(to))

    def load(self) -> dict[str, Tensor]:
        """Read all tensors."""
        return {name: self.read(name) for name in layout.shapes(self.config)}


def open_weights(path: str | Path, config: ModelConfig | None = None) -> Weights:
    """Open the weights at ``path``: one of our step directories or runs, a Hugging Face folder or upstream's .pth file.

    Upstream's file lacks the model's sizes, so ``config`` must provide them. Only names and shapes are read. Raises
    InputError for any other path, a file that is truncated or contains code, and tensors that do not fit the sizes.
    """
    path = locate(path)
    if path.is_file():
        if config is None:
            raise InputError(
                f"{path} does not say its model's sizes: give them to convert_lit_checkpoint.py, by --model.name "
                "(tinyllama_1.1b) or dotted flags"
            )
        return _open_upstream(path, config)
    if (path / "config.json").is_file():
        return _open_hf(path)
    return _open_step_dir(path)


def locate(path: str | Path, say: Callable[[str], None] = reader.to_stderr) -> Path:
    """Return the file, Hugging Face folder or step directory that ``open_weights`` takes for ``path``.

    ``say`` gets a line for each newer step of a run that is passed over. Raises InputError if there is none.
    """
    path = Path(path)
    return path if path.is_file() or (path / "config.json").is_file() else reader.resolve(path, say)


def read_config(path: Path) -> ModelConfig | None:
    """Return the sizes of the model at ``path``, which is from ``locate``; None for a file, which lacks them."""
    if path.is_file():
        return None
    if (path / "config.json").is_file():
        return _hf_config(path)
    return reader.read_model_config(path)


def copy_into(model: nn.Module, weights: Weights) -> None:
    """Fill a model, sharded or not, on any device; a rank reads all tensors, one at a time, and keeps its shards."""
    for name, parameter in model.named_parameters():
        assign_full(parameter, weights.read(name))


def _open_step_dir(path: Path) -> Weights:
    entries, read = reader.open_weights(path)
    config = reader.read_model_config(path)
    found = {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}
    dtype = _check(path, config, found, layout.shapes)
    return Weights(path, config, dtype, _metadata(reader.read_state(path)), lambda name: read(name).to(dtype))


def _hf_config(path: Path) -> ModelConfig:
    hf, mark = _json(path / "config.json"), folder.read_mark(path)
    has_tokenizer = any((path / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    pieces = Tokenizer(path).vocab_size if has_tokenizer else None
    config = layout.config_of(hf, str(path / "config.json"), pieces)
    if "model" in mark:  # our own export knows which rows are padding
        try:
            known = {key: mark["model"][key] for key in ("name", "vocab_size", "padding_multiple")}
            name, *sizes = known.values()
            if not (isinstance(name, str) and all(type(n) is int and 0 < n <= config.padded_vocab_size for n in sizes)):
                raise TypeError(known)
            config = replace(config, **known)
        except (KeyError, TypeError) as error:
            why = printable(repr(error), 200)
            raise InputError(f"{path / folder.MARK} is not what an export writes ({why}): export again") from None
    return config


def _open_hf(path: Path) -> Weights:
    hf, mark, config = _json(path / "config.json"), folder.read_mark(path), _hf_config(path)
    layout.check_model(config)
    # older versions of transformers saved the RoPE table, and some save tied embeddings twice
    tensors = {key: tensor for key, tensor in hf_tensors(path).items() if not key.endswith("rotary_emb.inv_freq")}
    output, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_embeddings and {output, embedding} <= tensors.keys():
        same = torch.equal(tensors.pop(output).float(), tensors[embedding].float())
        if not same:  # then transformers does not tie them, whatever config.json says
            raise InputError(f"{path} has another {output} than {embedding}: set tie_word_embeddings to false")
    dtype = _check(path, config, _shapes_and_dtypes(tensors), layout.hf_shapes)
    parts = dict(layout.keys(config))

    def read(name: str) -> Tensor:
        return layout.from_hf([tensors[key].to(dtype, copy=True) for key in parts[name]], config)

    file = path / "generation_config.json"
    ends, more = (_listed(content.get("eos_token_id")) for content in (hf, _json(file) if file.is_file() else {}))
    ids = {"bos_id": hf.get("bos_token_id"), "eos_id": next(iter(ends), None), "eos_ids": ends + more}
    return Weights(path, config, dtype, _metadata({"step": 0, "tokens": 0} | mark | ids), read)


def _open_upstream(path: Path, config: ModelConfig) -> Weights:
    content = _unpickle(path)
    state = content.get("model", content) if isinstance(content, dict) else {}
    found = state.items() if isinstance(state, Mapping) else ()
    tensors = {}
    stored = {k: v for k, v in found if isinstance(k, str) and _is_plain(v)}
    nested = [key for key, value in found if isinstance(value, Mapping)]
    if state is content and nested and not stored:
        key = printable(repr(nested[0]), 80)
        raise InputError(f"{path} has its tensors in {key}, not in 'model': save that entry alone")
    for name, tensor in _unwrapped(path, stored).items():
        for plain, fused in PLAIN_MLP.items():
            name = name.replace(plain, fused)
        tensors[name] = tensor
    before, embedding, _ = next((key for key in tensors if key.endswith(EMBEDDING)), "").partition(EMBEDDING)
    if embedding and before:
        prefix = printable(before, 80)
        raise InputError(
            f"{path} has '{prefix}' before its names, as in {prefix}{EMBEDDING}: save it again with names that begin "
            "with transformer and lm_head"
        )
    dtype = _check(path, config, _shapes_and_dtypes(tensors), layout.shapes)
    # upstream trained with Llama's tokenizer; its files lack the number of tokens
    metadata = _metadata({"step": content.get("step_count", 0), "eos_id": 2, "bos_id": 1})
    return Weights(path, config, dtype, metadata, lambda name: tensors[name].to(dtype, copy=True))


def _shapes_and_dtypes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _metadata(content: Mapping[str, Any]) -> dict[str, Any]:
    """Select the metadata of Weights; values of a wrong type count as unknown."""
    metadata = {key: content.get(key) if is_count(content.get(key)) else None for key in COUNTS}
    for key, kind in (("tokenizer_sha256", str), ("bos", bool)):
        metadata[key] = content.get(key) if isinstance(content.get(key), kind) else None
    eos_ids = content.get("eos_ids")
    every = [metadata["eos_id"], *(eos_ids if isinstance(eos_ids, list) else [])]
    return metadata | {"eos_ids": list(dict.fromkeys(filter(is_count, every)))}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def hf_tensors(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a Hugging Face folder by name; those of safetensors are read from the disk when used."""
    tensors: dict[str, Tensor] = {}
    for file in _hf_files(path):
        if file.suffix == ".bin":
            content = _unpickle(file)
            if not (isinstance(content, dict) and all(isinstance(k, str) and _is_plain(v) for k, v in content.items())):
                raise InputError(f"{file} is not a state dict: give a file of plain tensors by name")
        else:
            folder.check_name(file, "rename it")
            try:
                content = load_file(file)
                _check_header(file)
            except (SafetensorError, OSError, ValueError) as error:
                raise InputError(
                    f"{file} cannot be read ({printable(error, 200)}): fetch it whole (git lfs pull)"
                ) from None
        tensors |= _unwrapped(file, content)
    return tensors


def _check_header(file: Path) -> None:
    """Raise ValueError if the header of a safetensors file names a tensor twice: its reader hides the first."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        json.loads(opened.read(size), object_pairs_hook=_unique)


def _unwrapped(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``tensors`` by the names they had before the model was compiled or wrapped."""
    plain = {".".join(part for part in key.split(".") if part not in WRAPPERS): t for key, t in tensors.items()}
    if len(plain) < len(tensors):
        raise InputError(f"{path} has parameters both with and without {', '.join(WRAPPERS)}: give those of one model")
    return plain


def _hf_files(path: Path) -> list[Path]:
    for single, index in zip(("model.safetensors", "pytorch_model.bin"), INDEXES, strict=True):
        if (path / single).is_file():
            return [path / single]
        if (path / index).is_file():
            names = _json(path / index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise InputError(f"{path / index} has no weight_map: fetch the folder again")
            files = [path / Path(name).name for name in sorted(set(names.values()))]
            if missing := [printable(file, 300) for file in files if not os.path.isfile(file)]:  # any name, any length
                raise InputError(f"{missing[0]} is missing, which {index} names: fetch the folder again")
            return files
    raise InputError(f"{path} has no model.safetensors, pytorch_model.bin or an index of them: fetch the folder again")


def _unpickle(path: Path) -> Any:
    """Load a file that torch.save wrote, without executing anything in it."""
    try:
        if is_zip := zipfile.is_zipfile(path):
            _check_archive(path)
        with torch.sparse.check_sparse_tensor_invariants():  # without it, torch 2.11 warns that it does not check
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged or hostile pickle makes torch raise whatever there is
        reason = printable((str(error).strip() or type(error).__name__).splitlines()[0], 200)
        if "Weights only load failed" in str(error):
            reason = "it holds more than tensors and plain values, and is not executed"
        raise InputError(f"{path} cannot be loaded ({reason}): give a complete file of plain tensors") from None


def _check_archive(path: Path) -> None:
    """Raise ValueError if a file in the archive does not have the checksum that torch.save gave it."""
    with zipfile.ZipFile(path) as archive:
        if name := archive.testzip():  # torch.load compares none
            raise ValueError(f"{name} in it does not match its checksum")


def _check(
    path: Path,
    config: ModelConfig,
    found: Mapping[str, tuple[torch.Size, torch.dtype]],
    expected_of: Callable[[ModelConfig], dict[str, tuple[int, ...]]],
) -> torch.dtype:
    """Return the dtype that holds all tensors exactly; raises InputError unless they are those of ``config``."""
    layers = {int(number[1]) for key in found if (number := re.search(r"\.(?:h|layers)\.(\d{1,9})\.", key))}
    if layers and config.n_layer != max(layers) + 1:  # instead of a long list of missing tensors
        raise InputError(f"{path} has {max(layers) + 1} layers, the model's sizes {config.n_layer}: give those of one")
    expected = expected_of(config)
    problems = [f"{key} is missing" for key in expected if key not in found]
    problems += [f"{printable(key, 80)} is not of such a model" for key in found if key not in expected]
    problems += [
        f"{key} has shape {printable(list(shape), 80)}, the model's sizes make {list(expected[key])}"
        for key, (shape, _) in found.items()
        if key in expected and tuple(shape) != expected[key]
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InputError(f"{path}: {'; '.join(problems[:3])}{more}: give weights and sizes of one model")
    for key, (_, dtype) in found.items():
        if dtype not in DTYPES.values():
            raise InputError(f"{path} has {key} in {dtype}: give float32, bfloat16 or float16 weights")
    return functools.reduce(torch.promote_types, (dtype for _, dtype in found.values()))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        if isinstance(content, dict):
            return content
        reason = "it is not an object"
    except (OSError, ValueError, RecursionError) as error:
        reason = printable(error, 200)
    raise InputError(f"{path} cannot be read as JSON ({reason}): fetch the folder again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of ``pairs``; raises ValueError for a key that is there twice, of which JSON keeps the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key} is there twice")
    return content
