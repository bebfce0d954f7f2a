"""Encode text fast, with exactly the ids of the tokenizer's own library, which is the reference.

gigatoken is about ten times as fast, but young. It is not used for tokenizers that it is known to handle differently;
it must reproduce the ids of ``guards`` before anything is written; and the first of every ``SAMPLED`` documents of a
shard is encoded by both, up to about a hundredth of the text. Since the ids are the same, a dataset does not depend on
the encoder; each shard records which one made it.

Memory is bounded: a document of more than ``CUT`` bytes is encoded in parts, by both encoders alike. It is cut where
that changes no id. With Llama's tokenizer such places are before a blank, a line end or a digit, and between letters
that are adjacent in no piece. With other tokenizers, and where there is no such place, it is cut where the text around
the cut has the same ids with and without it. If none of the places tried in ``WINDOW`` bytes qualifies, as in an
endless run of one letter or of digits, the ids from the cut to the end of that run may differ from those of the whole
document.
"""

import contextlib
import importlib.metadata
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from tinyllama import InputError, printable
from tinyllama.prepare.readers import TextChunk
from tinyllama.tokenizer import Tokenizer
from tinyllama.tokenizer_trial import is_failure, steps

Choice = Literal["auto", "fast", "sentencepiece"]
Encode = Callable[[bytes], np.ndarray]

_MAX_VOCAB, _MAX_PIECE = 1 << 22, 1000  # ids of a tokenizer, letters of an added token that the fast one is tried with
SAMPLED = 1000  # documents (or parts of long ones) of a shard, of which the first is encoded by both
_COMPARED, _SHARE = 1 << 20, 100  # bytes of a worker's text that may be, and after them a hundredth of all its text
CUT = 1 << 20  # bytes; a document of more is cut at the first place behind so many where that changes no id
WINDOW = 1 << 16  # bytes in which such a place is looked for
_CONTEXT = 256  # bytes on either side of a cut whose ids are compared
# places that cuts are tried at, and how many of each kind: before blanks, where the kind of character changes, anywhere
_PLACES = (
    (re.compile(rb"\S(?=\s)"), 16),
    (re.compile(rb"\w(?=[^\w\s])|[^\w\s](?=\w)|[\x80-\xff](?=[\xc0-\xff])|[!-/:-@\[-`{-~](?=[!-/:-@\[-`{-~])"), 32),
    (re.compile(rb"(?s:.)"), 16),
)
_PREFIXES = "\n.,;0aenxZ"  # letters of which one before a part that continues may let it keep its ids
_BATCH = 1 << 22  # bytes of text that are read before they are encoded
_BATCH_CHUNKS = 1 << 15  # and documents or parts of them, each of which takes memory besides its text
_RENEWED = 1 << 24  # ids between two fast encoders: the cache of words in one only grows, by 4 bytes an id and more
_LONG_ID = 8  # bytes of text that count as an id where ids are longer: the cache holds its words' bytes, too
# the normalizers of sentencepiece's blanks, the only ones that gigatoken is tried with
_BLANKS = (
    {"type": "Prepend", "prepend": "\u2581"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
)
# texts on which the fast encoder must return the reference's ids before anything is written
GUARDS = (
    "",
    *" \n\t\0\ufffd\ufeff\u2581",  # each by itself
    *("  ", "\r\n", "<s>", "</s>", "<unk>", "<0x0A>"),
    " \u2581 a\u2581b\u2581",
    "a</s>b <s> <unk><0x0A> [INST] <|endoftext|>",
    "a  b   c\n\n\td  \n",
    "line one\r\nline two\r\n",
    "def f(x):\n\t\treturn x  # tab\n    y = [1, 22, 333]\n",
    "0123456789 ١٢٣ ²",
    "It's the first of 1,024 tests: don't split “quotes”, naïve words or 3.14159 wrongly…",
    "e\u0301 is not \u00e9, \u212b \ufb01 \u00a0 \u3000 \u200b x",
    "漢字かな交じり文、한국어 ภาษาไทย",
    "Ω≈ç√∫˜µ≤≥÷",
    "\U0001f642\U0001f1eb\U0001f1f7 \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0010ffff\ud7ff\ue000\x7f\x1b[0m",
    *("x" * 3000, "word " * 500, "aaabababbbaab" * 30, " " * 1000 + "x"),
    "=" * 80 + "-" * 77 + "#" * 3 + "\n" * 9,
    "https://a.b/c?d=e&f=%20g",
)


class TokenChunk(NamedTuple):
    """The tokens of a document, or of a part of a long one."""

    ids: np.ndarray
    """(n,), without bos and eos"""
    num_bytes: int
    """of the text"""
    subset: str
    """the subset that the document belongs to; "" where none is named"""
    is_last: bool
    """the document ends here"""


class _Lead(NamedTuple):
    """How to begin a part that continues a document, so that the library adds no blank to it."""

    prefix: bytes
    """encoded before the part"""
    dropped: int
    """the ids of the prefix"""
    skipped: int
    """bytes of the part: a blank, if the library put one behind the part before"""


class Mismatch(RuntimeError):
    """The fast encoder returned other ids than the reference: a defect, and a shard that must not be written."""


class Encoder:
    """Encodes documents to ids, uint32 or int32 arrays without bos and eos.

    Raises InputError when ``choice`` is ``fast`` and gigatoken is missing or does not return this tokenizer's ids.
    """

    name: str
    """library and version that encode"""
    fell_back: str = ""
    """why ``auto`` did not take the fast one"""

    def __init__(self, tokenizer: Tokenizer, choice: Choice) -> None:
        self._reference: Encode = tokenizer.encode_utf8
        self._encode: Encode = self._reference
        self._make: Callable[[], Encode] | None = None
        self._seen = self._compared = 0  # bytes of text, and those encoded by both
        self._encoded = self._texts = 0  # ids (or as much text) of the encoder there is, texts of the stream
        self._cuts, known = _cuts(tokenizer)
        # how a part that continues may have to begin
        letters = itertools.islice(_known_letters(tokenizer), 3)
        lead = [_Lead(one.encode(), len(tokenizer.encode(one)), 0) for one in dict.fromkeys((known, "", *letters))]
        self._leads = [*lead, _Lead(b"", 0, 1)]
        self.name = f"{tokenizer.encoder} {tokenizer.encoder_version}"
        if choice != "sentencepiece":
            try:
                self._make, self._encode = _fast(tokenizer)
                self.name = f"gigatoken {importlib.metadata.version('gigatoken')}"
            except InputError as error:
                if choice == "fast":
                    raise
                self.fell_back = str(error)

    def stream(self, chunks: Iterable[TextChunk]) -> Iterator[TokenChunk]:
        """Encode each document, a long one in parts of its own cutting; raises Mismatch."""
        self._texts = 0
        rest, lead = bytearray(), None  # of a long document: what is not encoded yet; None: nothing of it is
        for text, subset, is_last in _batched(chunks):
            if is_last and not rest and len(text) <= CUT:
                yield TokenChunk(self._checked(text), len(text), subset, is_last=True)
                continue
            rest += text
            while cut := self._cut(rest, lead, is_last):
                place, next_lead = cut
                yield TokenChunk(self._checked(bytes(rest[:place]), lead), place, subset, is_last=False)
                del rest[:place]
                lead = next_lead
            if is_last:
                yield TokenChunk(self._checked(bytes(rest), lead), len(rest), subset, is_last=True)
                rest, lead = bytearray(), None

    def _cut(self, text: bytearray, lead: _Lead | None, is_last: bool) -> tuple[int, _Lead] | None:
        """Return where to cut ``text``, which ``lead`` begins, and what begins the rest; None: not yet.

        It is the same however much more of the document is there.
        """
        if self._cuts and (found := self._cuts.search(text, CUT, CUT + WINDOW)):
            return found.end(), self._leads[0]
        if len(text) <= CUT + WINDOW + (0 if is_last else _CONTEXT):
            return None
        for pattern, most in _PLACES:
            for found in itertools.islice(pattern.finditer(text, CUT - 1, CUT + WINDOW), most):
                place = found.end()
                if text[place] & 0xC0 != 0x80 and (kept := self._kept_by(text, place, lead)):
                    return place, kept
        place = CUT
        while text[place] & 0xC0 == 0x80:  # inside a character
            place += 1
        return place, self._leads[0]

    def _kept_by(self, text: bytearray, place: int, lead: _Lead | None) -> _Lead | None:
        """Return what must begin ``text[place:]`` so that the cut changes no id nearby; None: nothing helps.

        The text before the cut is tried from several places, as pieces of a run may depend on where it began.
        """
        end = min(place + _CONTEXT, len(text))
        while end < len(text) and text[end] & 0xC0 == 0x80:
            end += 1
        right, first = bytes(text[place:end]), max(0, place - _CONTEXT)
        starts = [i for i in range(first, min(first + 12, place)) if text[i] & 0xC0 != 0x80][:3] if first else [0]
        leads = [one for one in self._leads if right[: one.skipped].isspace() or not one.skipped]
        try:
            for start in starts:
                left = _begun(bytes(text[start:place]), None if start else lead)
                whole, ahead = self._reference(left + right), self._reference(left)
                if not np.array_equal(whole[: len(ahead)], ahead):
                    return None
                rest = whole[len(ahead) :]
                leads = [
                    one for one in leads if np.array_equal(rest, self._reference(_begun(right, one))[one.dropped :])
                ]
        except InputError:  # of a part that the library fails on
            return None
        return next(iter(leads), None)

    def _checked(self, text: bytes, lead: _Lead | None = None) -> np.ndarray:
        """Ids of ``text``; ``lead``: of which the document has more before it, and how to begin."""
        if self._make and self._encoded > _RENEWED:
            self._encode, self._encoded = self._make(), 0
        text = _begun(text, lead)
        ids = self._encode(text)
        self._encoded += max(len(ids), len(text) // _LONG_ID)
        is_due = self._texts % SAMPLED == 0 and self._compared <= max(_COMPARED, self._seen // _SHARE)
        self._texts += 1
        self._seen += len(text)
        if self._make and is_due:
            self._compared += len(text)
            if not np.array_equal(ids, self._reference(text)):
                raise Mismatch(
                    f"{self.name} gives other ids than the tokenizer's own library for the text {text[:60]!r}...: "
                    "run with --encoder sentencepiece, and tell gigatoken's makers"
                )
        return ids[lead.dropped :] if lead else ids


def _batched(chunks: Iterable[TextChunk]) -> Iterator[TextChunk]:
    """Yield the same chunks, many read before the first is encoded: what each works on is in a core's caches longer."""
    batch: list[TextChunk] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += len(chunk.text)
        if size >= _BATCH or len(batch) >= _BATCH_CHUNKS:
            yield from batch
            batch, size = [], 0
    yield from batch


def _known_letters(tokenizer: Tokenizer) -> Iterator[str]:
    for one in _PREFIXES:
        with contextlib.suppress(InputError):  # of a tokenizer without unk
            if tokenizer.unk_id not in tokenizer.encode(one):
                yield one


def _begun(text: bytes, lead: _Lead | None) -> bytes:
    return lead.prefix + text[lead.skipped :] if lead else text


def _fast(tokenizer: Tokenizer) -> tuple[Callable[[], Encode], Encode]:
    """Return a function that makes fast encoders, and one of them; InputError unless their ids are ``tokenizer``'s."""
    try:
        from gigatoken.gigatoken_rs import load_hf_json
    except ImportError:
        raise InputError("gigatoken is not installed: pip install gigatoken") from None
    other = "use --encoder sentencepiece"
    if tokenizer.vocab_size > _MAX_VOCAB:  # it takes memory for every id, whether there is such a piece or not
        raise InputError(f"gigatoken is not used with {tokenizer.vocab_size:,} ids: {other}")
    if (longest := max(map(len, tokenizer.whole_pieces()), default=0)) > _MAX_PIECE:  # it takes minutes to read them
        raise InputError(f"gigatoken is not used with an added token of {longest:,} characters: {other}")
    try:
        payload = tokenizer.json_for_text()
    except InputError as error:
        raise InputError(f"gigatoken cannot read {tokenizer.path} ({error}): {other}") from None
    if reason := _refused(json.loads(payload)):
        raise InputError(f"gigatoken is not used with {reason} of {tokenizer.path}: {other}")

    def make() -> Encode:
        return load_hf_json(payload).encode

    try:
        encode = make()
        for text in guards(tokenizer):
            if not np.array_equal(encode(text.encode()), tokenizer.encode_utf8(text.encode())):
                raise InputError(f"gigatoken gives other ids than {tokenizer.path} for {text.encode()[:40]!r}: {other}")
    except InputError:
        raise
    except BaseException as error:  # the library's own types for what it does not support, or its panic
        if not is_failure(error):
            raise
        raise InputError(f"gigatoken cannot read {tokenizer.path} ({printable(error, 200)}): {other}") from None
    return make, encode


def _refused(content: dict[str, Any]) -> str:
    """Return what of a tokenizer.json gigatoken does otherwise on texts too rare for guards to find; "": nothing known.

    Its Unicode tables are of another version than those of tokenizers, it looks for added tokens before it normalizes,
    and to it the blanks and letters beside an added token are others.
    """
    for step in steps(content.get("normalizer")):
        if step.get("type") != "Sequence" and step not in _BLANKS:
            return f"the normalizer {printable(step.get('type'), 40)}"
    for token in content["added_tokens"]:
        if flags := [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]:
            return f"{flags[0]} for the added token {printable(repr(token['content']), 40)}"
    return ""


def guards(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield texts on which the fast encoder must have the ids of ``tokenizer`` before anything is written."""
    yield from GUARDS
    yield from tokenizer.hard_texts()


def _cuts(tokenizer: Tokenizer) -> tuple[re.Pattern[bytes] | None, str]:
    """Return a pattern whose matches end at cut points, and a character to put before the part behind a cut.

    At a cut point a document may be cut without changing an id.

    Two characters that stand side by side in no piece are never joined: one can cut between them. A separator is a
    character in no piece but its own: one can cut before it, and the blank that encoding puts before every text stays
    before it. Other characters are looked at only if they are pieces themselves: the rest may be normalized into those,
    or be unknown together with their neighbours. (None, ""): nowhere that this knows of.
    """
    pieces = set(tokenizer.pieces() or ()) if tokenizer.is_plain else set()
    pairs = {piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1)}
    paired, ids = set("".join(pairs)), tokenizer.encode

    def is_separator(one: str) -> bool:
        alone, rest = ids(one)[1:], ids(f"{one}  b")[len(ids(one)) :]  # [0]: the blank
        return bool(alone) and ids(f"a{one}{one}  b") == [*ids("a"), *alone, *alone, *rest]

    separators = [one for one in "\n\t0123456789" if pieces and one not in paired and is_separator(one)]
    if not separators:
        return None, ""
    ways = [f"(?=[{''.join(separators)}])"]
    letters = [one for one in map(chr, range(0x21, 0x7F)) if one in pieces]
    for one in letters:
        followers = [" " if other == "\u2581" else other for other in ["\u2581", *letters] if one + other not in pairs]
        if followers:
            ways.append(f"{re.escape(one)}(?=[{re.escape(''.join(followers))}])")
    return re.compile("|".join(ways).encode()), separators[0]
