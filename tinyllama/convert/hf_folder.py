"""Write our weights as a folder that transformers' LlamaForCausalLM and AutoTokenizer load."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards

from tinyllama.convert import folder, layout, tensor_file
from tinyllama.convert.tokenizer_files import pad_id, separator, write_tokenizer
from tinyllama.convert.weights import Weights
from tinyllama.tokenizer import Tokenizer

SHARD_BYTES = 5 * 10**9  # most weights in one file; larger models get several files and an index


def write(
    output: Path,
    weights: Weights,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
    check: Callable[[Path], None] | None = None,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write ``weights`` as a Hugging Face folder, completely or not at all; it replaces an earlier export.

    All of them are in memory for the while. ``more`` are texts of further files by name. ``check`` is called with the
    complete folder before it gets its name, which it does not if ``check`` raises. Raises InputError for an ``output``
    that cannot be written or has files that no export wrote, for a model that is not transformers' Llama, and for a
    sentencepiece model that a tokenizer.json cannot express.
    """
    config, metadata = weights.config, weights.metadata
    layout.check_model(config)
    folder.check_name(output.resolve(), "give another folder")
    first, bos_id = (tokenizer.eos_id, tokenizer.bos_id) if tokenizer else (metadata["eos_id"], metadata["bos_id"])
    eos_ids = metadata["eos_ids"]
    eos_id = eos_ids if len(eos_ids) > 1 and first in eos_ids else first
    start = separator(metadata["bos"], bos_id, first)  # of a text without a prompt
    generation: dict[str, Any] = {"bos_token_id": start, "eos_token_id": eos_id, "max_length": config.block_size}
    if tokenizer is not None:
        generation["pad_token_id"] = pad_id(tokenizer)
    if config.padded_vocab_size > config.vocab_size:  # the padding rows are not tokens
        generation["suppress_tokens"] = list(range(config.vocab_size, config.padded_vocab_size))
    mark = {key: metadata[key] for key in ("step", "tokens", "bos")} | {"model": asdict(config)}
    if "averaged_steps" in metadata:
        mark["averaged_steps"] = metadata["averaged_steps"]
    mark["tokenizer_sha256"] = tokenizer.sha256 if tokenizer else metadata["tokenizer_sha256"]
    with folder.create(output, weights.path, mark) as partial:
        if tokenizer is not None:  # first, because it can be refused
            write_tokenizer(partial, tokenizer, config.block_size, metadata["bos"])
        folder.write_json(partial / "config.json", layout.hf_config(config, eos_id, bos_id, weights.dtype))
        folder.write_json(partial / "generation_config.json", generation)
        _write_tensors(partial, weights, shard_bytes)
        for name, text in (more or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        if check is not None:
            check(partial)


def _write_tensors(output: Path, weights: Weights, shard_bytes: int) -> None:
    tensors = {
        key: part
        for ours, theirs in layout.keys(weights.config)
        for key, part in layout.to_hf(theirs, weights.read(ours), weights.config).items()
    }
    shards = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=shard_bytes
    )
    for name, keys in shards.filename_to_tensors.items():
        tensor_file.write(output / name, {key: tensors[key] for key in keys}, {})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        folder.write_json(output / "model.safetensors.index.json", index)
