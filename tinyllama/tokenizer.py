"""Text to token ids and back, by sentencepiece (the reference) or a Hugging Face tokenizer.json; no torch.

The ids of a text are those of the tokenizer's own library, with nothing put before or behind them, and no control token
among them. A literal control token in a text is text, as in ``a </s> b``: sentencepiece never makes one from text, and
of a tokenizer.json this holds for the tokens marked ``special``, for bos and eos, and for unk, which only stands for
what the vocabulary lacks. All other added tokens, and all user-defined pieces, are ordinary vocabulary.
"""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyllama import InputError, printable, sentencepiece_bpe, tokenizer_trial

# what tokenizers of this family call the ends of a document, where no tokenizer_config.json says so
BOS_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
EOS_TOKENS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")

_MAX_BYTES = 1 << 29  # of a tokenizer's file; the largest in use have 40 MB
_MAX_ID = 2**31 - 2  # so that the size of the vocabulary is an int32, too
_MAX_PIECES = 1 << 13  # of a large vocabulary that are among the hard texts
_ALPHABETS = (
    "aeinst \n",
    " \t\r\nx0",
    "".join(map(chr, range(0x20, 0x7F))),
    "".join(map(chr, range(0x20, 0x600))),
    "".join(map(chr, (*range(0x20, 0xD800), *range(0xE000, 0x11000), *range(0x1F300, 0x1FA00)))),
    "e\u0301\u0327\u200d \u0300a\u00e9",
)


class Tokenizer:
    """A sentencepiece ``.model`` or a ``tokenizer.json``, given as the file or its folder (both: the ``.model``).

    Raises InputError when there is no such file, it cannot be read, or its library aborts, hangs or fails on it. What
    could do so is tried in another process first, but not if the file has ``known_sha256``: it was tried before.
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
    added_tokens: int = 0
    """added tokens of a tokenizer.json that are vocabulary like any other piece, as runs of blanks are"""
    encoder: str
    """the library, sentencepiece or tokenizers"""
    encoder_version: str
    """its version"""

    def __init__(self, path: str | Path, known_sha256: str | None = None) -> None:
        self.path = _find(Path(path))
        try:
            if self.path.stat().st_size > _MAX_BYTES:
                raise InputError(f"tokenizer {self.path} has more than {_MAX_BYTES >> 20} MB: give another file")
            payload = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"tokenizer {self.path}: {error.strerror}: give a file that can be read") from None
        self.sha256 = hashlib.sha256(payload).hexdigest()
        self._processor: Any = None  # sentencepiece's
        self._text_json: dict[str, Any] | None = None  # the tokenizer.json that encodes text
        self._whole_json: dict[str, Any] | None = None  # the same with its control tokens
        self._encode: Callable[[str], list[int]]
        self._decode: Callable[[list[int]], str]
        if self.path.suffix == ".json":
            self._load_json(payload, is_known=self.sha256 == known_sha256)
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
        return self._guard(self._encode, text)

    def encode_utf8(self, text: bytes) -> np.ndarray:
        """Encode UTF-8 into an array of ids, without a Python object for each."""
        if self._processor:
            return self._processor.encode(text, return_type="numpy")
        return np.array(self._guard(self._encode, text.decode()), dtype=np.uint32)

    def pieces(self) -> list[str] | None:
        """Return every piece of a sentencepiece model that text can become, bytes left out; None for another format."""
        return sentencepiece_bpe.text_pieces(self._processor) if self._processor else None

    @property
    def is_plain(self) -> bool:
        """Return whether this is a sentencepiece model that segments text as it is, and can make every piece of it."""
        return self._processor is not None and sentencepiece_bpe.is_plain(self._processor)

    def control_pieces(self) -> list[str]:
        """Return the pieces of a sentencepiece model that no text becomes: unk, bos, eos and other controls."""
        p = self._processor
        return [p.id_to_piece(i) for i in range(self.vocab_size) if p.is_control(i) or p.is_unknown(i)]

    def whole_pieces(self) -> list[str]:
        """Return what is a token as a whole, or looks like one: user-defined, added, control and byte pieces."""
        if self._whole_json is not None:
            vocab = self._whole_json["model"].get("vocab", {})
            likely = [piece for piece in map(_name, vocab) if piece.startswith("<0x")]
            of_bytes = [piece for piece in likely if re.fullmatch("<0x[0-9A-F]{2}>", piece)]
            return [token["content"] for token in self._whole_json["added_tokens"]] + of_bytes
        p = self._processor
        of_bytes = [p.id_to_piece(i) for i in range(self.vocab_size) if p.is_byte(i)]
        return sentencepiece_bpe.user_defined_pieces(p) + self.control_pieces() + of_bytes

    def hard_texts(self) -> Iterator[str]:
        """Yield texts that tell this tokenizer from almost the same: where their ids are right, others are, too.

        They are made of each piece that is a token as a whole (alone, inside a word, doubled, overlapping with itself,
        next to blanks and behind a cut), of every piece of the vocabulary in a random order, and of random characters.
        """
        wholes = dict.fromkeys(form for piece in self.whole_pieces() for form in (piece, piece.replace("\u2581", " ")))
        yield from wholes
        pieces = list(wholes)
        for batch in (pieces[start : start + 16] for start in range(0, len(pieces), 16)):
            around = (f"{one} a{one}b{one}{one} {one}  {one}\n{one},{one[:-1]}{one}{one[1:]}" for one in batch)
            yield "\n" + "".join(around)
            yield "".join(batch)
        rng = random.Random(0)
        ids = rng.sample(range(self.vocab_size), min(self.vocab_size, _MAX_PIECES))
        for start in range(0, len(ids), 64):
            yield self.decode(ids[start : start + 64])
        for alphabet in _ALPHABETS:
            yield from ("".join(rng.choices(alphabet, k=60)) for _ in range(20))

    def json_for_text(self) -> str:
        """Return a tokenizer.json that encodes text as this does, for libraries that read no other format.

        Raises InputError for a sentencepiece model that has no such file. What encodes by it is still to be compared.
        """
        return json.dumps(self._text_json or sentencepiece_bpe.tokenizer_json(self._processor))

    def json_with_controls(self) -> str:
        """Return a tokenizer.json without what cuts, pads or adds to a text; in it a literal ``</s>`` is a token."""
        return json.dumps(self._whole_json or sentencepiece_bpe.tokenizer_json(self._processor))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids below vocab_size; bos, eos and other control tokens give nothing."""
        return self._guard(self._decode, [int(i) for i in ids])

    def _load_model(self, payload: bytes) -> None:
        import sentencepiece

        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=payload)
        except (RuntimeError, ValueError):  # a message of its own that is not UTF-8
            processor = None
        if re.match(rb"[\w+/]+=* \d+\r?\n", payload):
            raise InputError(f"{self.path} is a tiktoken file: give the tokenizer.json of the same model")
        if processor is None and payload.startswith(b"{"):
            hint = "rename a tokenizer.json to end in .json, or fetch the sentencepiece model again"
            raise InputError(f"{self.path} is JSON: {hint}")
        if not payload or processor is None:  # sentencepiece takes an empty file for a model without pieces
            raise self._unreadable("a sentencepiece model")
        self.encoder, self.encoder_version = "sentencepiece", sentencepiece.__version__
        self.vocab_size = processor.vocab_size()
        try:
            processor.id_to_piece(list(range(self.vocab_size)))
        except UnicodeDecodeError:
            raise self._unreadable("a sentencepiece model", "a piece is not UTF-8") from None
        ids = (processor.bos_id(), processor.eos_id(), processor.unk_id())
        self.bos_id, self.eos_id, self.unk_id = (i if i >= 0 else None for i in ids)
        self._processor = processor
        self._encode, self._decode = processor.encode, processor.decode

    def _load_json(self, payload: bytes, is_known: bool) -> None:
        import tokenizers

        try:
            content = json.loads(payload)
            if not isinstance(content, dict):
                raise ValueError("it is no JSON object")
            # a post-processor would add bos, a truncation that came with a fine-tuned model would cut documents, and a
            # dropout, which is for training, would draw the ids
            content |= {"post_processor": None, "truncation": None, "padding": None}
            if isinstance(content.get("model"), dict) and content["model"].get("dropout") is not None:
                content["model"]["dropout"] = None
            if not is_known and (reason := tokenizer_trial.error_of(content, self.sha256)):
                raise ValueError(reason)
            whole = tokenizers.Tokenizer.from_buffer(payload)
        except BaseException as error:  # the library has one type for every error, and panics
            if not tokenizer_trial.is_failure(error):
                raise
            raise self._unreadable("a tokenizer.json", error) from None
        vocab = whole.get_vocab(with_added_tokens=True)
        self.encoder, self.encoder_version = "tokenizers", tokenizers.__version__
        if not vocab:
            raise self._unreadable("a tokenizer.json with a vocabulary")
        self._check_ids(vocab)
        self.vocab_size = max(vocab.values()) + 1
        bos, eos = (
            self._special_token("bos_token", BOS_TOKENS, vocab),
            self._special_token("eos_token", EOS_TOKENS, vocab),
        )
        unk = _unk_token(content["model"])
        self.bos_id, self.eos_id, self.unk_id = (None if one is None else vocab.get(one) for one in (bos, eos, unk))
        added = [token for token in content.get("added_tokens") or [] if token["content"] in vocab]  # "" never is
        # the library numbers them itself; others believe the file
        content["added_tokens"] = [token | {"id": vocab[token["content"]]} for token in added]
        self._whole_json = content
        special = {token["content"] for token in content["added_tokens"] if token["special"]}
        taken_for_text = {*special, bos, eos, unk} - {None}
        self._text_json = _without(content, taken_for_text, self.sha256)
        self.added_tokens = sum(token["content"] not in taken_for_text for token in content["added_tokens"])
        bare = tokenizers.Tokenizer.from_str(json.dumps(self._text_json))
        self._check_added(self._text_json["added_tokens"], bare.normalizer)
        self._encode, self._decode = lambda text: bare.encode(text).ids, whole.decode

    def _check_ids(self, vocab: dict[str, int]) -> None:
        pieces: dict[int, str] = {}
        if max(vocab.values()) <= _MAX_ID and len(set(vocab.values())) == len(vocab):
            return
        for piece, number in sorted(vocab.items()):
            if pieces.setdefault(number, piece) != piece:
                same = printable(f"{pieces[number]!r} and {piece!r}", 100)
                raise self._unreadable("a tokenizer.json", f"{same} have the id {number}")
        last = max(pieces)
        raise self._unreadable("a tokenizer.json", f"{printable(repr(pieces[last]), 50)} has the id {last}")

    def _check_added(self, added: list[dict[str, Any]], normalizer: Any) -> None:
        """Refuse added tokens that the library confuses once they are normalized.

        Of two that are the same it finds the one or the other, as it happens, each time it loads the file; one that is
        nothing it finds everywhere, until it panics or has taken all memory.
        """
        found: dict[str, str] = {}
        for token in (token["content"] for token in added if token["normalized"] and normalizer):
            text = self._guard(normalizer.normalize_str, token)
            shown = printable(repr(token), 50)
            if not text:
                raise InputError(f"{self.path}: the added token {shown} is nothing once normalized: remove it")
            if (other := found.setdefault(text, token)) != token:
                both = f"{printable(repr(other), 50)} and {shown}"
                raise InputError(f"{self.path}: the added tokens {both} are the same once normalized: remove one")

    def _special_token(self, key: str, usual: tuple[str, ...], vocab: dict[str, int]) -> str | None:
        config = self.path.with_name("tokenizer_config.json")
        try:
            if config.exists() and not (config.is_file() or config.is_dir()):
                raise ValueError("a pipe or a device")
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
        return token

    def _guard(self, call: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return call(argument)
        except BaseException as error:
            if not tokenizer_trial.is_failure(error):
                raise
            shown = f"{printable(repr(argument), 60)}: {printable(error, 200)}"
            raise InputError(f"tokenizer {self.path} fails on {shown}: use another tokenizer") from None

    def _unreadable(self, kind: str, error: BaseException | str | None = None) -> InputError:
        reason = f" ({printable(error, 200)})" if error else ""
        return InputError(f"{self.path} is not {kind}{reason}: fetch it whole (a git-lfs pointer needs git lfs pull)")


def _name(entry: Any) -> str:
    """Return the piece of an entry of a vocabulary, a Unigram model's being a list of pieces with their scores."""
    return entry if isinstance(entry, str) else entry[0]


def _unk_token(model: dict[str, Any]) -> str | None:
    unk_id = model.get("unk_id")
    return model.get("unk_token") if unk_id is None else model["vocab"][unk_id][0]


def _without(content: dict[str, Any], controls: set[str], salt: str) -> dict[str, Any]:
    """Return a tokenizer.json with the same ids, in which no text becomes one of ``controls``.

    Added tokens that are controls are left out. Where others remain, or the model itself makes a control token of text,
    as a Unigram model does of any piece of its vocabulary, controls get names that no text has, by ``salt``: the
    library numbers added tokens by their order. A single letter keeps its name in the model, as it is of the alphabet.
    """
    model = content["model"]
    vocab = model["vocab"]
    letters = {one for one in map(_name, vocab) if len(one) == 1}
    controls = controls - letters
    added = [token for token in content["added_tokens"] if token["content"] not in letters or not token["special"]]
    prefix = model.get("continuing_subword_prefix") or ""
    merges = [one.split(" ") if isinstance(one, str) else one for one in model.get("merges", [])]
    kept = [
        [left, right]
        for left, right in merges
        if left not in controls and right not in controls and left + right.removeprefix(prefix) not in controls
    ]
    may_make_controls = "merges" not in model or model.get("ignore_merges") or len(kept) < len(merges)
    if not may_make_controls and controls.issuperset(token["content"] for token in added):
        return content | {"added_tokens": []}
    names = {one: f"<control-{hashlib.sha256((salt + one).encode()).hexdigest()}>" for one in controls}
    if isinstance(vocab, dict):
        changes: dict[str, Any] = {"vocab": {names.get(piece, piece): number for piece, number in vocab.items()}}
    else:
        changes = {"vocab": [[names.get(piece, piece), score] for piece, score in vocab]}
    if "merges" in model:
        changes["merges"] = kept
    if model.get("unk_token") in names:
        changes["unk_token"] = names[model["unk_token"]]
    unused = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        token | unused | {"content": names[token["content"]]} if token["content"] in names else token for token in added
    ]
    return content | {"model": model | changes, "added_tokens": added}


def _find(path: Path) -> Path:
    names = ("tokenizer.model", "tokenizer.json")
    try:
        tried = [path / name for name in names] if path.is_dir() else [path]
        for candidate in tried:
            if candidate.is_file():
                return candidate
        if tried[0].exists():
            raise InputError(f"tokenizer {tried[0]} is not a file: give a sentencepiece .model or a tokenizer.json")
    except OSError as error:
        raise InputError(f"tokenizer {path}: {error.strerror}: give a file that can be read") from None
    raise InputError(
        f"no tokenizer at {' or '.join(map(str, tried))}: give a sentencepiece .model, a tokenizer.json or their folder"
    )
