"""Text to token ids at speed: exactly those of the tokenizer's own library, which stays the reference while it runs.

gigatoken is ten times as fast and young. So it is tried on ``GUARDS`` before anything is written, and one document in
``SAMPLED`` is encoded by both. The tokens being the same, a dataset does not say which one made them; its shards do.

Memory is bounded for every document: one of more than ``CUT`` bytes is encoded in parts, by both alike. It is cut where
that changes no id: with Llama's tokenizer at a blank, a line end, a digit, or between letters that no piece has side by
side. Only where ``WINDOW`` bytes have no such place, or none is known for the tokenizer, are the few ids at the cut
others than those of the whole.
"""

import importlib.metadata
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from tinyllama import InputError
from tinyllama.prepare.readers import TextChunk
from tinyllama.tokenizer import Tokenizer

Choice = Literal["auto", "fast", "sentencepiece"]
Encode = Callable[[bytes], np.ndarray]

SAMPLED = 1000  # documents (or parts of long ones), of which one is encoded by both
CUT = 1 << 20  # bytes; a document of more is cut at the first place behind so many where that changes no id
WINDOW = 1 << 16  # bytes in which such a place is looked for
_RENEWED = 1 << 26  # bytes encoded between two fast encoders: the cache of words in one only grows
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


class Mismatch(RuntimeError):
    """The fast encoder returned other ids than the reference: a defect, and a shard that must not be written."""


class Encoder:
    """Documents to ids, uint32 or int32 arrays without bos and eos.

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
        self._encoded = self._texts = 0  # bytes by the encoder there is, texts since renew
        self.name = f"{tokenizer.encoder} {tokenizer.encoder_version}"
        if choice != "sentencepiece":
            try:
                self._make, self._encode = _fast(tokenizer)
                self.name = f"gigatoken {importlib.metadata.version('gigatoken')}"
            except InputError as error:
                if choice == "fast":
                    raise
                self.fell_back = str(error)
        self._cuts, prefix = _cuts(tokenizer)
        self._prefix, self._dropped = prefix.encode(), len(tokenizer.encode(prefix))  # put before a part that continues

    def renew(self) -> None:
        """Forget what encoding has cached; before each shard, so that a shard's memory and time are its own."""
        if self._make and self._encoded:
            self._encode = self._make()
        self._encoded = self._texts = 0

    def stream(self, chunks: Iterable[TextChunk]) -> Iterator[TokenChunk]:
        """Encode each document, a long one in parts of its own cutting; raises Mismatch."""
        rest, goes_on = bytearray(), False  # of a long document: what is not encoded yet, whether some of it is
        for text, subset, is_last in chunks:
            if is_last and not rest and len(text) <= CUT:
                yield TokenChunk(self._checked(text), len(text), subset, is_last=True)
                continue
            rest += text
            while place := self._place(rest):
                yield TokenChunk(self._checked(bytes(rest[:place]), goes_on), place, subset, is_last=False)
                del rest[:place]
                goes_on = True
            if is_last:
                yield TokenChunk(self._checked(bytes(rest), goes_on), len(rest), subset, is_last=True)
                rest, goes_on = bytearray(), False

    def _place(self, text: bytearray) -> int:
        """Where to cut ``text``, the same however much more of the document is there; 0: not yet."""
        if self._cuts and (found := self._cuts.search(text, CUT, CUT + WINDOW)):
            return found.end()
        if len(text) <= CUT + WINDOW:
            return 0
        place = CUT
        while text[place] & 0xC0 == 0x80:  # inside a character
            place += 1
        return place

    def _checked(self, text: bytes, goes_on: bool = False) -> np.ndarray:
        """Ids of ``text``; ``goes_on``: of which the document has more before it."""
        if self._make and self._encoded > _RENEWED:
            self._encode, self._encoded = self._make(), 0
        self._encoded += len(text)
        if goes_on:
            text = self._prefix + text
        ids = self._encode(text)
        if self._make and self._texts % SAMPLED == 0 and not np.array_equal(ids, self._reference(text)):
            raise Mismatch(
                f"{self.name} gives other ids than the tokenizer's own library for the text {text[:60]!r}...: "
                "run with --encoder sentencepiece, and tell gigatoken's makers"
            )
        self._texts += 1
        return ids[self._dropped :] if goes_on else ids


def _fast(tokenizer: Tokenizer) -> tuple[Callable[[], Encode], Encode]:
    """Return a function that makes fast encoders, and one of them; InputError unless their ids are ``tokenizer``'s."""
    try:
        from gigatoken.gigatoken_rs import load_hf_json
    except ImportError:
        raise InputError("gigatoken is not installed: pip install gigatoken") from None
    payload = tokenizer.json_without_added_tokens()

    def make() -> Encode:
        return load_hf_json(payload).encode

    other = "use --encoder sentencepiece"
    try:
        encode = make()
    except Exception as error:  # the library's own types for what it does not support
        raise InputError(f"gigatoken cannot read {tokenizer.path} ({error}): {other}") from None
    for text in map(str.encode, GUARDS):
        if not np.array_equal(encode(text), tokenizer.encode_utf8(text)):
            raise InputError(f"gigatoken gives other ids than {tokenizer.path} for {text[:40]!r}: {other}")
    return make, encode


def _cuts(tokenizer: Tokenizer) -> tuple[re.Pattern[bytes] | None, str]:
    """Return a pattern whose matches end at cut points, and a character to put before the part behind a cut.

    At a cut point a document may be cut without changing an id.

    Two characters that stand side by side in no piece are never joined: one can cut between them. A separator is a
    character in no piece but its own: one can cut before it, and the blank that encoding puts before every text stays
    before it. Other characters are looked at only if they are pieces themselves: the rest may be normalized into those,
    or be unknown together with their neighbours. (None, ""): nowhere that this knows of.
    """
    pieces = set(tokenizer.pieces() or ())
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
