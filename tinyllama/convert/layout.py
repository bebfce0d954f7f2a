"""Map our names of tensors and sizes to transformers' and back."""

from collections.abc import Iterator
from dataclasses import fields
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from tinyllama import InputError, printable
from tinyllama.config.bounds import MOST
from tinyllama.config.model import NAMED_CONFIGS, ModelConfig, named_config
from tinyllama.model import GPT

# our parameters and transformers'; {} is the layer number. Both order the halves of a head for RoPE in the same way.
KEYS: dict[str, tuple[str, ...]] = {
    "transformer.wte.weight": ("model.embed_tokens.weight",),
    "transformer.h.{}.norm_1.weight": ("model.layers.{}.input_layernorm.weight",),
    "transformer.h.{}.attn.attn.weight": (
        "model.layers.{}.self_attn.q_proj.weight",
        "model.layers.{}.self_attn.k_proj.weight",
        "model.layers.{}.self_attn.v_proj.weight",
    ),
    "transformer.h.{}.attn.proj.weight": ("model.layers.{}.self_attn.o_proj.weight",),
    "transformer.h.{}.norm_2.weight": ("model.layers.{}.post_attention_layernorm.weight",),
    "transformer.h.{}.mlp.swiglu.w1.weight": ("model.layers.{}.mlp.gate_proj.weight",),
    "transformer.h.{}.mlp.swiglu.w2.weight": ("model.layers.{}.mlp.up_proj.weight",),
    "transformer.h.{}.mlp.swiglu.w3.weight": ("model.layers.{}.mlp.down_proj.weight",),
    "transformer.ln_f.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}

MOST_SIZE = 2**24  # larger than any vocabulary, width or context; a RoPE table of that length takes gigabytes

# transformers' name in config.json of each size, and ours
SIZES = {
    "hidden_size": "n_embd",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_query_groups",
    "max_position_embeddings": "block_size",
}
# what else config.json says of a model, with transformers' types of it and what to give in place of another
TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "hidden_act": ((str,), "silu"),
    "rms_norm_eps": ((float,), "a number with a point or an exponent, such as 1e-05"),
    **dict.fromkeys(("attention_bias", "mlp_bias"), ((bool,), "false")),
    "tie_word_embeddings": ((bool,), "true or false"),
    **dict.fromkeys(("head_dim", "bos_token_id"), ((int, NoneType), "a whole number or null")),
    "eos_token_id": ((int, list, NoneType), "a whole number, a list of them or null"),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), ((dict, NoneType), "an object or null")),
}
# the fields of ModelConfig that an export writes
EXPORTED = {"name", "vocab_size", "padding_multiple", "norm_eps", "rope_base", "rope_condense_ratio", "tie_embeddings"}
EXPORTED |= set(SIZES.values())


def keys(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each of our parameters with the one or three of transformers' that it consists of."""
    for ours, theirs in KEYS.items():
        if ours == "lm_head.weight" and config.tie_embeddings:
            continue
        for layer in range(config.n_layer if "{}" in ours else 1):
            yield ours.format(layer), tuple(key.format(layer) for key in theirs)


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of our parameters."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of transformers' parameters, as its Llama has them, whatever our model's code is."""
    vocabulary, width, inner = config.padded_vocab_size, config.n_embd, config.intermediate_size
    key_rows = config.n_query_groups * config.head_size
    matrices = {
        **dict.fromkeys(("embed_tokens", "lm_head"), (vocabulary, width)),
        **dict.fromkeys(("q_proj", "o_proj"), (width, width)),
        **dict.fromkeys(("k_proj", "v_proj"), (key_rows, width)),
        **dict.fromkeys(("gate_proj", "up_proj"), (inner, width)),
        "down_proj": (width, inner),
    }
    return {key: matrices.get(key.split(".")[-2], (width,)) for _, theirs in keys(config) for key in theirs}


def check_model(config: ModelConfig) -> None:
    """Raise InputError if model.py or the settings of a model differ from those of transformers' Llama.

    Then an export would lose what has been added, and an import could not fill it.
    """
    theirs = hf_shapes(config)
    expected = {ours: (sum(theirs[key][0] for key in parts), *theirs[parts[0]][1:]) for ours, parts in keys(config)}
    found = shapes(config)
    problems = [f"it has {name}, which a Llama has not" for name in found if name not in expected]
    problems += [f"it lacks {name}" for name in expected if name not in found]
    problems += [
        f"its {name} has shape {list(shape)}, a Llama's {list(expected[name])}"
        for name, shape in found.items()
        if shape != expected.get(name, shape)
    ]
    problems += [
        f"it has model.{field.name} {printable(getattr(config, field.name), 80)}, which a Llama has not"
        for field in fields(config)
        if field.name not in EXPORTED and getattr(config, field.name) != field.default
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InputError(
            f"the model of tinyllama/model.py is not transformers' Llama: {'; '.join(problems[:3])}{more}: "
            "change the table in tinyllama/convert/layout.py too, or write it by our names with export_checkpoint.py"
        )


def to_hf(theirs: tuple[str, ...], tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Split one of our tensors into those of transformers, by their names; no two of them share memory."""
    if len(theirs) == 1:
        return {theirs[0]: tensor}
    queries = config.n_head // config.n_query_groups
    grouped = tensor.view(config.n_query_groups, queries + 2, config.head_size, config.n_embd)  # (G, nh/G + 2, hs, C)
    parts = (part.clone().flatten(0, 2) for part in grouped.split((queries, 1, 1), dim=1))  # (nh or G * hs, C)
    return dict(zip(theirs, parts, strict=True))


def from_hf(parts: list[Tensor], config: ModelConfig) -> Tensor:
    """Join the one or three parts of one of our tensors."""
    if len(parts) == 1:
        return parts[0]
    shape = (config.n_query_groups, -1, config.head_size, config.n_embd)
    return torch.cat([part.view(shape) for part in parts], dim=1).flatten(0, 2)  # (qkv_size, C)


def hf_config(
    config: ModelConfig, eos_id: int | list[int] | None, bos_id: int | None, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the content of config.json; its ``vocab_size`` is the number of rows, padding included."""
    name = str(dtype).removeprefix("torch.")
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_condense_ratio != 1:
        rope = {"rope_type": "linear", "factor": float(config.rope_condense_ratio)}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.padded_vocab_size,
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        # transformers 5 reads rope_parameters and dtype; version 4 and most other readers use the older keys
        "rope_theta": float(config.rope_base),
        "rope_scaling": None if config.rope_condense_ratio == 1 else rope | {"type": "linear"},
        "rope_parameters": rope | {"rope_theta": float(config.rope_base)},
        "torch_dtype": name,
        "dtype": name,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }


def config_of(hf: dict[str, Any], where: str, pieces: int | None) -> ModelConfig:
    """Return our sizes for ``hf``, the content of the config.json at ``where``; ``pieces`` is the vocabulary's size.

    When the number of rows is ``pieces`` rounded up to a multiple of 64 or a larger power of two, the extra rows count
    as padding. Raises InputError with all problems for a model that is not a Llama or needs what our model lacks.
    """
    try:
        optional = ("num_key_value_heads", "rope_theta", "partial_rotary_factor")  # null is as if they were left out
        hf = {key: value for key, value in hf.items() if key not in optional or value is not None}
        hf = {"num_key_value_heads": hf["num_attention_heads"], "max_position_embeddings": 2048} | hf
        if wrong := list(_wrong_values(hf)):
            raise InputError(*wrong)
        # as transformers reads them: an older folder's rope_scaling replaces rope_parameters, its rope_theta included
        rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        rope = {key: hf[key] for key in ("rope_theta", "partial_rotary_factor") if key in hf} | rope
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        base, eps = rope.get("rope_theta", 10000), hf.get("rms_norm_eps", 1e-6)
        tied = hf.get("tie_word_embeddings", False)
        ratio = rope["factor"] if rope_type == "linear" else 1
        problems = list(_unsupported(hf, rope_type, base, rope.get("partial_rotary_factor", 1)))
        for key, value in (("rms_norm_eps", eps), ("the factor of linear RoPE", ratio)):
            if type(value) not in (int, float) or value > MOST:
                problems.append(f"{key} is {printable(repr(value), 40)}: give a number")
        rows = hf["vocab_size"]
        if pieces is not None and pieces > rows:
            problems.append(f"the tokenizer beside it has {pieces} pieces, the model {rows}: take both from one model")
        if problems:
            raise InputError(*problems)
        vocab_size, multiple = rows, 64 if rows % 64 == 0 else 1
        for power in (64, 128, 256, 512, 1024):
            if pieces is not None and -(-pieces // power) * power == rows:
                vocab_size, multiple = pieces, power
                break
        sizes = {ours: hf[theirs] for theirs, ours in SIZES.items()} | {
            "vocab_size": vocab_size,
            "padding_multiple": multiple,
            "norm_eps": eps,
            "rope_base": int(base),
            "rope_condense_ratio": ratio,
            "tie_embeddings": tied,
        }
        known = next((name for name in NAMED_CONFIGS if named_config(name) == ModelConfig(name, **sizes)), "llama")
        return ModelConfig(known, **sizes)
    except InputError as error:
        raise InputError(*(f"{where}: {problem}" for problem in error.args)) from None
    except (KeyError, TypeError, AttributeError) as error:
        why = printable(repr(error), 200)
        raise InputError(f"{where} is not a Llama's config.json ({why}): fetch the folder again") from None


def _wrong_values(hf: dict[str, Any]) -> Iterator[str]:
    """Yield a problem for another architecture, else for each value of a type or range that none may have."""
    architectures = hf.get("architectures") or ["LlamaForCausalLM"]
    if hf.get("model_type") != "llama" or architectures != ["LlamaForCausalLM"]:
        what = f"{printable(architectures[0], 80)} (model_type {printable(hf.get('model_type'), 80)})"
        yield f"architecture {what} is not supported: give a LlamaForCausalLM"
        return  # the other checks would only repeat that
    hints = {
        key: f"a whole number above 0, below {MOST_SIZE:,}"
        for key in ("vocab_size", *SIZES)
        if not (type(hf[key]) is int and 0 < hf[key] < MOST_SIZE)
    }
    hints |= {key: hint for key, (kinds, hint) in TYPES.items() if key in hf and type(hf[key]) not in kinds}
    ends = hf.get("eos_token_id")
    if isinstance(ends, list) and not all(type(end) is int for end in ends):
        hints["eos_token_id"] = TYPES["eos_token_id"][1]
    for key in ("dtype", "torch_dtype"):
        if hf.get(key) is not None and not isinstance(getattr(torch, str(hf[key]), None), torch.dtype):
            hints[key] = "float32, bfloat16 or float16"
    yield from (f"{key} is {printable(repr(hf[key]), 40)}: give {hint}" for key, hint in hints.items())


def _unsupported(hf: dict[str, Any], rope_type: Any, base: Any, rotated: Any) -> Iterator[str]:
    if rope_type not in ("default", "linear"):
        yield f"RoPE type {printable(rope_type, 80)} is not supported: give a model with default or linear RoPE"
    if rotated != 1:
        yield "partial_rotary_factor is not supported: give a model that rotates whole heads"
    if type(base) not in (int, float) or not (base <= MOST and base % 1 == 0):  # nan % 1 is nan
        yield f"rope_theta {printable(base, 40)} is not a whole number up to {MOST:.0e}: our rope_base is one"
    for key, without in (("attention_bias", False), ("mlp_bias", False), ("quantization_config", None)):
        if hf.get(key, without) is not without:
            yield f"{key} is not supported: give a model without"
    if hf.get("hidden_act", "silu") != "silu":
        yield f"hidden_act {printable(hf['hidden_act'], 80)} is not supported: give a model with silu"
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    if (head_dim := hf.get("head_dim")) is not None and head_dim * heads != width:
        yield f"head_dim {printable(head_dim, 40)} x {heads} heads is not hidden_size {width}: not supported"
