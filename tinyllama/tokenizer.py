"""Text to token ids and back, by sentencepiece (the reference) or a Hugging Face tokenizer.json; no torch."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama import InputError, printable

# what tokenizers of this family call the ends of a document, where no tokenizer_config.json says so
BOS_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
EOS_TOKENS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")


class Tokenizer:
    """A sentencepiece ``.model`` or a ``tokenizer.json``, given as the file or its folder (both: the ``.model``).

    Raises InputError when there is no such file or it cannot be read.
    """

    path: Path
    """the file"""
    sha256: str
    """of the file, hexadecimal"""
    vocab_size: int
    """every id is below this"""
    bos_id: int | None
    """begins a document; None: the tokenizer has no such token"""
    eos_id: int | None
    """ends a document; None: the tokenizer has no such token"""
    unk_id: int | None
    """stands for what the vocabulary lacks; None: the tokenizer has no such token"""
    encoder: str
    """the library, sentencepiece or tokenizers"""
    encoder_version: str
    """its version"""

    def __init__(self, path: str | Path) -> None:
        self.path = _find(Path(path))
        try:
            payload = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"tokenizer {self.path}: {error.strerror}: give a file that can be read") from None
        self.sha256 = hashlib.sha256(payload).hexdigest()
        self._processor: Any = None  # sentencepiece's
        self._bare: dict[str, Any] | None = None  # the tokenizer.json that encodes
        self._encode: Callable[[str], list[int]]
        self._decode: Callable[[list[int]], str]
        if self.path.suffix == ".json":
            self._load_json(payload)
        else:
            self._load_model(payload)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no bos, no eos, and a literal ``</s>`` is text like any other; empty text has none.

        Raises InputError for a lone surrogate, which no encoder takes: readers of sources must replace or refuse it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text has the lone surrogate {text[error.start]!a} at character {error.start}: repair its \\u escapes"
            ) from None
        return self._encode(text)

    def encode_utf8(self, text: bytes) -> np.ndarray:
        """``encode`` of UTF-8 into an array, without an object for each id."""
        if self._processor:
            return self._processor.encode(text, return_type="numpy")
        return np.array(self._encode(text.decode()), dtype=np.uint32)

    def pieces(self) -> list[str] | None:
        """Return every piece of a sentencepiece model that text can become, bytes left out; None for another format."""
        return _text_pieces(self._processor) if self._processor else None

    def control_pieces(self) -> list[str]:
        """Return the pieces of a sentencepiece model that no text becomes: unk, bos, eos and other controls."""
        p = self._processor
        return [p.id_to_piece(i) for i in range(self.vocab_size) if p.is_control(i) or p.is_unknown(i)]

    def json_without_added_tokens(self) -> str:
        """Return a tokenizer.json that encodes text as this does, for libraries that read no other format.

        A sentencepiece model is taken for one with Llama's settings; only comparing ids can tell whether it is.
        """
        return json.dumps(self._bare or _bpe_of_sentencepiece(self._processor))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids below vocab_size; bos, eos and other control tokens give nothing."""
        return self._decode([int(i) for i in ids])

    def _load_model(self, payload: bytes) -> None:
        import sentencepiece

        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=payload)
        except (RuntimeError, ValueError):  # a message of its own that is not UTF-8
            processor = None
        if re.match(rb"[\w+/]+=* \d+\r?\n", payload):
            raise InputError(f"{self.path} is a tiktoken file: give the tokenizer.json of the same model")
        if not payload or processor is None:  # sentencepiece takes an empty file for a model without pieces
            raise self._unreadable("a sentencepiece model")
        self.encoder, self.encoder_version = "sentencepiece", sentencepiece.__version__
        self.vocab_size = processor.vocab_size()
        ids = (processor.bos_id(), processor.eos_id(), processor.unk_id())
        self.bos_id, self.eos_id, self.unk_id = (i if i >= 0 else None for i in ids)
        self._processor = processor
        self._encode, self._decode = processor.encode, processor.decode

    def _load_json(self, payload: bytes) -> None:
        import tokenizers

        try:
            whole = tokenizers.Tokenizer.from_buffer(payload)
            content = json.loads(payload)
        except Exception as error:  # the library has one type for every error
            raise self._unreadable("a tokenizer.json", error) from None
        # Added tokens would turn a literal </s> of a text into id 2, a post-processor would add bos, and a truncation
        # that came with a fine-tuned model would cut documents: encode without them, decode with.
        removed: dict[str, object] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._bare = content | removed
        bare = tokenizers.Tokenizer.from_str(json.dumps(self._bare))
        vocab = whole.get_vocab(with_added_tokens=True)
        self.encoder, self.encoder_version = "tokenizers", tokenizers.__version__
        if not vocab:
            raise self._unreadable("a tokenizer.json with a vocabulary")
        self.vocab_size = max(vocab.values()) + 1
        self.bos_id = self._special_id("bos_token", BOS_TOKENS, vocab)
        self.eos_id = self._special_id("eos_token", EOS_TOKENS, vocab)
        self.unk_id = vocab.get(getattr(whole.model, "unk_token", None) or "")
        self._encode, self._decode = lambda text: bare.encode(text).ids, whole.decode

    def _special_id(self, key: str, usual: tuple[str, ...], vocab: dict[str, int]) -> int | None:
        config = self.path.with_name("tokenizer_config.json")
        try:
            settings = json.loads(config.read_bytes()) if config.exists() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{config} is not JSON ({error}): repair or remove it") from None
        if not isinstance(settings, dict):
            raise InputError(f"{config} is not a JSON object: repair or remove it")
        token = settings.get(key, next(filter(vocab.__contains__, usual), None))
        if isinstance(token, dict):
            token = token.get("content", token)
        if token is not None and not (isinstance(token, str) and token in vocab):
            shown = printable(repr(token), 80)
            raise InputError(f"{config}: {key} {shown} is not in {self.path.name}: take both from the same model")
        return None if token is None else vocab[token]

    def _unreadable(self, kind: str, error: Exception | None = None) -> InputError:
        reason = f" ({printable(error, 200)})" if error else ""
        return InputError(f"{self.path} is not {kind}{reason}: fetch it whole (a git-lfs pointer needs git lfs pull)")


def _text_pieces(processor: Any) -> list[str]:
    kinds = (processor.is_control, processor.is_byte, processor.is_unknown, processor.is_unused)
    return [processor.id_to_piece(i) for i in range(processor.vocab_size()) if not any(kind(i) for kind in kinds)]


def _bpe_of_sentencepiece(processor: Any) -> dict[str, Any]:
    """Return the tokenizer.json of a sentencepiece BPE model with Llama's settings, without special tokens and decoder.

    A merge into a piece of better score goes first: not of lower id, as Llama 2 gave its runs of blanks low ids and the
    lowest scores. The ways to merge into one piece have one score, and sentencepiece takes the leftmost in the text,
    which a list of merges cannot say; they are in the order of their halves' ids, and the ids of a text have not been
    seen to depend on it. transformers' converter needs protobuf, and merges bytes and control tokens, as the model
    does not.
    """
    ids = list(range(processor.vocab_size()))
    vocab = dict(zip(processor.id_to_piece(ids), ids, strict=True))
    mergeable = set(_text_pieces(processor))
    merges = []
    for piece in mergeable:
        rank = (-processor.get_score(vocab[piece]), vocab[piece])
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in mergeable and right in mergeable:
                merges.append((*rank, vocab[left], vocab[right], [left, right]))
    bpe = {
        "type": "BPE",
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "fuse_unk": True,
        "byte_fallback": any(processor.is_byte(ids)),
        "vocab": vocab,
        "merges": [halves for *_, halves in sorted(merges)],
    }
    blanks = [  # not Metaspace, which leaves out the prefix of a text that begins with a blank
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ]
    normalizer = {"type": "Sequence", "normalizers": blanks}
    return {"version": "1.0", "added_tokens": [], "normalizer": normalizer, "model": bpe}


def _find(path: Path) -> Path:
    names = ("tokenizer.model", "tokenizer.json")
    tried = [path / name for name in names] if path.is_dir() else [path]
    for candidate in tried:
        if candidate.is_file():
            return candidate
    raise InputError(
        f"no tokenizer at {' or '.join(map(str, tried))}: give a sentencepiece .model, a tokenizer.json or their folder"
    )
