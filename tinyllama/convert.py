"""Our weights to a folder that transformers' LlamaForCausalLM and AutoTokenizer load, and Llama's weights to ours."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama import InputError, __version__, checkpoint, durable
from tinyllama.config import ModelConfig
from tinyllama.model import from_weights
from tinyllama.tokenizer import Tokenizer

# our parameters and transformers'; {} is the layer's number. Both keep the halves of a head in the same order for RoPE.
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

MARK = "export.json"  # in a folder that write() made: what from, and the names of its files

# of verify(): fp32 sums in another order make 2e-4 in 22 layers with logits up to 20, a wrong norm_eps 6e-2
TOLERANCE = 1e-3

# what an exported tokenizer must encode as ours does
TEXTS = (
    "The little llama walked along the river.",
    "  blanks before,  between and after  ",
    "def f(x: int) -> str:\n\treturn str(x ** 2)  # 1234567890\r\n\n\n",
    "Ærøskøbing, Straße, Ελλάδα, 漢字かな, שלום, 🦙\u200d🦙, e\u0301, ﬁ, ①, \u00a0, \x00",
    "▁ stands for a blank",
    "aaaaaaaaaaaaaaa================",
    "",
)


def to_hf_state_dict(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """transformers' LlamaForCausalLM tensors of our ``state``."""
    out: dict[str, Tensor] = {}
    for ours, theirs in _keys(config):
        parts = _split_qkv(state[ours], config) if len(theirs) == 3 else (state[ours],)
        out.update(zip(theirs, parts, strict=True))
    return out


def from_hf_state_dict(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors of a LlamaForCausalLM's ``state``; raises InputError when it has others than ``config`` calls for."""
    keys = dict(_keys(config))
    expected = {key for theirs in keys.values() for key in theirs}
    if odd := expected ^ state.keys():
        what = ", ".join(f"{key} {'missing' if key in expected else 'not expected'}" for key in sorted(odd)[:3])
        raise InputError(f"not a Llama of these sizes: {what} ({len(odd)} in all): mend the model's sizes")
    return {
        ours: _join_qkv([state[key] for key in theirs], config) if len(theirs) == 3 else state[theirs[0]]
        for ours, theirs in keys.items()
    }


def _keys(config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    for ours, theirs in KEYS.items():
        for layer in range(config.n_layer if "{}" in ours else 1):
            yield ours.format(layer), tuple(key.format(layer) for key in theirs)


def _split_qkv(fused: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    queries = config.n_head // config.n_query_groups
    grouped = fused.view(config.n_query_groups, queries + 2, config.head_size, config.n_embd)  # (G, nh/G + 2, hs, C)
    return tuple(part.flatten(0, 2) for part in grouped.split((queries, 1, 1), dim=1))  # (nh or G * hs, C)


def _join_qkv(parts: list[Tensor], config: ModelConfig) -> Tensor:
    shape = (config.n_query_groups, -1, config.head_size, config.n_embd)
    return torch.cat([part.view(shape) for part in parts], dim=1).flatten(0, 2)  # (qkv_size, C)


def hf_config(config: ModelConfig, eos_id: int | None, bos_id: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json. ``vocab_size`` there is the number of rows, ours with its padding."""
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_query_groups,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        # transformers 5 reads the second of each pair, 4 and most other readers of this file the first
        "rope_theta": float(config.rope_base),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.rope_base)},
        "torch_dtype": name,
        "dtype": name,
        "tie_word_embeddings": False,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }


def matching_tokenizer(path: str | Path, trained_with: str | None, config: ModelConfig) -> Tokenizer:
    """The tokenizer at ``path``; raises InputError unless its sha256 is ``trained_with`` (None: not known)."""
    tokenizer = Tokenizer(path)
    if trained_with not in (None, tokenizer.sha256):
        fault = f"has sha256 {tokenizer.sha256}, but the model was trained with {trained_with}"
    elif tokenizer.vocab_size > config.vocab_size:
        fault = f"has {tokenizer.vocab_size} pieces, but the model was trained with {config.vocab_size}"
    else:
        return tokenizer
    raise InputError(f"tokenizer {tokenizer.path} {fault}: give the file that its data was prepared with")


def export(
    step_dir: str | Path, output: str | Path, tokenizer_path: str | Path | None = None, dtype: str | None = None
) -> Path:
    """Convert a checkpoint, a step directory or a run's newest, into the folder ``output``; gives the step directory.

    ``dtype`` is float32 or bfloat16; None keeps the checkpoint's. Raises InputError for a checkpoint or tokenizer that
    is not there, a tokenizer other than the model's, and an ``output`` with files that no export wrote.
    """
    step_dir, output = checkpoint.resolve(step_dir), Path(output)
    _refuse_foreign(output)
    facts, config = checkpoint.read_state(step_dir), checkpoint.read_model_config(step_dir)
    tokenizer = matching_tokenizer(tokenizer_path, facts["tokenizer_sha256"], config) if tokenizer_path else None
    write(output, checkpoint.load_weights(step_dir), config, facts, tokenizer, dtype)
    return step_dir


def write(
    output: Path,
    state: dict[str, Tensor],
    config: ModelConfig,
    facts: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
) -> None:
    """Write our ``state`` as a Hugging Face folder: it appears whole, or not at all; an earlier export is replaced.

    ``facts`` is what state.json says. Raises InputError for an ``output`` that cannot be written or has files that no
    export wrote, and for a sentencepiece model that a tokenizer.json cannot express.
    """
    from safetensors.torch import save_file

    _refuse_foreign(output)
    if dtype is not None:
        state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    tensors = {name: tensor.contiguous() for name, tensor in to_hf_state_dict(state, config).items()}
    eos_id, bos_id = (tokenizer.eos_id, tokenizer.bos_id) if tokenizer else (facts["eos_id"], facts["bos_id"])
    generation: dict[str, Any] = {"bos_token_id": bos_id, "eos_token_id": eos_id}
    if config.padded_vocab_size > config.vocab_size:  # the rows that pad are no tokens
        generation["suppress_tokens"] = list(range(config.vocab_size, config.padded_vocab_size))

    unfinished, replaced = (output.with_name(f".{output.name}.{word}") for word in ("tmp", "replaced"))
    for stale in (unfinished, replaced):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot create {output}: {error.strerror}: give a folder that can be written") from None
    try:
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        _write_json(unfinished / "config.json", hf_config(config, eos_id, bos_id, state["lm_head.weight"].dtype))
        _write_json(unfinished / "generation_config.json", generation)
        if tokenizer is not None:
            _write_tokenizer(unfinished, tokenizer, config.block_size)
        names = sorted([MARK, *(path.name for path in unfinished.iterdir())])
        made_from = {"tinyllama": __version__, "step": facts["step"], "tokens": facts["tokens"]}
        _write_json(unfinished / MARK, made_from | {"files": names})
        for name in names:
            durable.sync(unfinished / name)
        durable.sync(unfinished)
        if output.exists():
            output.rename(replaced)
        unfinished.rename(output)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    durable.sync(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def verify(output: Path, state: dict[str, Tensor], config: ModelConfig) -> float:
    """Load the folder with transformers and compare: the largest |logit difference| to our model, in fp32.

    ``state`` is rounded to the folder's dtype first, so that only the conversion is measured. Raises RuntimeError
    when the folder's tokenizer does not give our ids.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    stored = json.loads((output / "config.json").read_text())["dtype"]
    ours = from_weights(config, {name: tensor.to(getattr(torch, stored)).float() for name, tensor in state.items()})
    theirs = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32)
    ids = torch.randint(config.vocab_size, (2, min(config.block_size, 127)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = (ours(ids) - theirs(ids).logits).abs().max().item()
    if (output / "tokenizer_config.json").exists():
        reference, exported = Tokenizer(output), AutoTokenizer.from_pretrained(output)
        for text in TEXTS:
            if exported(text)["input_ids"] != reference.encode(text):
                raise RuntimeError(f"{output}: AutoTokenizer does not encode {text!r} as {reference.path.name} does")
    return difference


def _refuse_foreign(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file: give a folder that does not exist yet")
    try:
        exported = set(json.loads((output / MARK).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        exported = set()
    if foreign := sorted({path.name for path in output.glob("*")} - exported):
        raise InputError(f"{output} holds {foreign[0]}, which no export wrote: give another folder, or move it away")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """tokenizer.json and tokenizer_config.json, and the .model where there is one.

    As in training there is no bos before a text. A literal ``</s>`` is a token here, as in every Hugging Face folder,
    unless split_special_tokens=True asks for ours: text.
    """
    import tokenizers

    if tokenizer.encoder == "sentencepiece":
        fast = _from_sentencepiece(tokenizer.path)
        shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    else:
        fast = tokenizers.Tokenizer.from_file(str(tokenizer.path))
        fast.post_processor = None
        fast.no_truncation()
        fast.no_padding()
    for text in TEXTS:
        if fast.encode(text).ids != tokenizer.encode(text):
            raise InputError(
                f"tokenizer {tokenizer.path} cannot be written as a tokenizer.json, which encodes {text!r} otherwise: "
                f"export without it, or use a BPE model with Llama's settings (normalizer identity, dummy prefix)"
            )
    fast.save(str(folder / "tokenizer.json"))
    named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is; LlamaTokenizer changes blanks
        **{key: None if token_id is None else fast.id_to_token(token_id) for key, token_id in named.items()},
        "unk_token": getattr(fast.model, "unk_token", None),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _from_sentencepiece(path: Path) -> Any:
    """The tokenizers.Tokenizer of a sentencepiece BPE model with Llama's settings.

    transformers' converter needs protobuf, and merges pieces that the model does not (its bytes and control tokens).
    """
    import sentencepiece
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    special = [i for i in vocab.values() if model.is_control(i) or model.is_unknown(i)]
    merged = {p: i for p, i in vocab.items() if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))}
    # a merge of better score goes first; of the ways to make one piece, that with the shorter left part
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(merged, key=lambda piece: (-model.get_score(merged[piece]), merged[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in merged and piece[cut:] in merged
    ]
    unk, byte_fallback = model.id_to_piece(model.unk_id()), any(model.is_byte(i) for i in vocab.values())
    fast = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback))
    # not Metaspace, which leaves out the prefix of a text that begins with a blank
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(model.id_to_piece(i), normalized=False) for i in special])
    return fast
