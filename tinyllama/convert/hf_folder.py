"""Write our weights, a tensor at a time, as a folder that transformers' LlamaForCausalLM and AutoTokenizer load."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tinyllama.convert import folder, layout, tensor_file
from tinyllama.convert.tokenizer_files import write_tokenizer
from tinyllama.convert.weights import Weights
from tinyllama.tokenizer import Tokenizer

SHARD_BYTES = 5 * 10**9  # most weights in one file; larger models get several files and an index


def write(output: Path, weights: Weights, tokenizer: Tokenizer | None = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``weights`` as a Hugging Face folder, completely or not at all; it replaces an earlier export.

    Raises InputError for an ``output`` that cannot be written or has files that no export wrote, and for a
    sentencepiece model that a tokenizer.json cannot express.
    """
    config, metadata = weights.config, weights.facts
    eos_id, bos_id = (tokenizer.eos_id, tokenizer.bos_id) if tokenizer else (metadata["eos_id"], metadata["bos_id"])
    generation: dict[str, Any] = {"bos_token_id": bos_id, "eos_token_id": eos_id}
    if config.padded_vocab_size > config.vocab_size:  # the padding rows are not tokens
        generation["suppress_tokens"] = list(range(config.vocab_size, config.padded_vocab_size))
    mark = {key: metadata[key] for key in ("step", "tokens")} | {"model": asdict(config)}
    mark["tokenizer_sha256"] = tokenizer.sha256 if tokenizer else metadata["tokenizer_sha256"]
    with folder.create(output, weights.path, mark) as partial:
        if tokenizer is not None:  # first, because it can be refused
            write_tokenizer(partial, tokenizer, config.block_size)
        folder.write_json(partial / "config.json", layout.hf_config(config, eos_id, bos_id, weights.dtype))
        folder.write_json(partial / "generation_config.json", generation)
        _write_tensors(partial, weights, shard_bytes)


def _write_tensors(output: Path, weights: Weights, shard_bytes: int) -> None:
    shapes, itemsize = layout.hf_shapes(weights.config), weights.dtype.itemsize
    sizes = {key: torch.Size(shape).numel() * itemsize for key, shape in shapes.items()}
    shards: list[list[tuple[str, tuple[str, ...]]]] = [[]]
    filled = 0
    for ours, theirs in layout.keys(weights.config):  # the parts of one of our tensors stay in one file
        size = sum(sizes[key] for key in theirs)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((ours, theirs))
        filled += size
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        tensors = (
            tensor
            for ours, theirs in shard
            for tensor in layout.to_hf(theirs, weights.read(ours), weights.config).values()
        )
        inside = {key: shapes[key] for _, theirs in shard for key in theirs}
        tensor_file.write(output / name, inside, weights.dtype, tensors, {})
    if len(shards) > 1:
        places = {key: name for name, shard in zip(names, shards, strict=True) for _, theirs in shard for key in theirs}
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        folder.write_json(output / "model.safetensors.index.json", content)
