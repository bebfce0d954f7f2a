"""A tokenizer as the files that transformers' AutoTokenizer reads."""

import shutil
from pathlib import Path

from tinyllama import InputError
from tinyllama.config.model import ModelConfig
from tinyllama.convert.folder import write_json
from tinyllama.tokenizer import Tokenizer

# texts that an exported tokenizer must encode as ours does
TEXTS = (
    "The little llama walked along the river.",
    "  blanks before,  between and after  ",
    "def f(x: int) -> str:\n\treturn str(x ** 2)  # 1234567890\r\n\n\n",
    "Ærøskøbing, Straße, Ελλάδα, 漢字かな, שלום, 🦙\u200d🦙, e\u0301, ﬁ, ①, \u00a0, \x00",
    "▁ stands for a blank",
    "aaaaaaaaaaaaaaa================",
    "",
)


def matching_tokenizer(path: str | Path, trained_with: str | None, config: ModelConfig) -> Tokenizer:
    """Return the tokenizer at ``path``; raises InputError unless its sha256 is ``trained_with`` (None: not known)."""
    tokenizer = Tokenizer(path)
    if trained_with not in (None, tokenizer.sha256):
        problem = f"has sha256 {tokenizer.sha256}, but the model was trained with {trained_with}"
    elif tokenizer.vocab_size > config.vocab_size:
        problem = f"has {tokenizer.vocab_size} pieces, but the model was trained with {config.vocab_size}"
    else:
        return tokenizer
    raise InputError(f"tokenizer {tokenizer.path} {problem}: give the file that its data was prepared with")


def pad_id(tokenizer: Tokenizer) -> int | None:
    """Return the id that fills up shorter texts of a batch: unk or, without one, eos or bos.

    A new token would have no row in the embedding.
    """
    return next((i for i in (tokenizer.unk_id, tokenizer.eos_id, tokenizer.bos_id) if i is not None), None)


def separator(bos: bool | None, bos_id: int | None, eos_id: int | None) -> int | None:
    """Return the token before a document in the training data, on which a text's first token is conditioned.

    It is eos, after the document before, unless documents are known to begin with bos.
    """
    ids = (bos_id, eos_id) if bos else (eos_id, bos_id)
    return next((i for i in ids if i is not None), None)


def _inexact(tokenizer: Tokenizer, reason: str) -> InputError:
    return InputError(
        f"tokenizer {tokenizer.path} cannot be written as a tokenizer.json ({reason}): "
        "export without it, or use a BPE model with Llama's settings (normalizer identity, dummy prefix)"
    )


def write_tokenizer(output: Path, tokenizer: Tokenizer, max_length: int, bos: bool | None = None) -> None:
    """Write tokenizer.json and tokenizer_config.json, and copy the .model where there is one.

    As in training there is no bos before a text. Where documents are not known to begin with ``bos`` the bos that it
    names is eos, as GPT-2's: lm-eval and others condition a text's first token on it, and CTranslate2 needs one. A
    literal ``</s>`` is a token here, as in every Hugging Face folder, unless split_special_tokens=True asks for ours.
    """
    import tokenizers
    from tokenizers import decoders

    is_model = tokenizer.encoder == "sentencepiece"
    try:
        fast = tokenizers.Tokenizer.from_str(tokenizer.json_with_controls())
    except InputError as error:
        raise _inexact(tokenizer, str(error)) from None
    if is_model:
        fast.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        controls = [tokenizers.AddedToken(piece, normalized=False) for piece in tokenizer.control_pieces()]
        fast.add_special_tokens(controls)
    fast.encode_special_tokens = True  # as in training; the file does not hold it
    for text in (*TEXTS, *(tokenizer.hard_texts() if is_model else ())):
        if fast.encode(text).ids != tokenizer.encode(text):
            raise _inexact(tokenizer, f"{text[:60]!r} is encoded otherwise")
    if is_model:
        shutil.copyfile(tokenizer.path, output / "tokenizer.model")
    # not by save, whose error of a full disk is no OSError
    (output / "tokenizer.json").write_text(fast.to_str(pretty=True), encoding="utf-8")
    ids = (separator(bos, tokenizer.bos_id, tokenizer.eos_id), tokenizer.eos_id, pad_id(tokenizer))
    bos_token, eos_token, pad_token = (None if i is None else fast.id_to_token(i) for i in ids)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is; LlamaTokenizer changes blanks
        "bos_token": bos_token,
        "eos_token": eos_token,
        "unk_token": getattr(fast.model, "unk_token", None),
        "pad_token": pad_token,
        "padding_side": "left",  # so that a batch of prompts is continued where each of them ends
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4's default has one that generate refuses
    }
    write_json(output / "tokenizer_config.json", settings)
