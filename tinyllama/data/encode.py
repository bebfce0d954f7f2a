"""Text to token ids at speed: exactly those of the tokenizer's own library, which stays the judge while it runs.

gigatoken is ten times as fast and young. So it is tried on ``GUARDS`` before anything is written, and one document in
``SAMPLED`` is encoded by both. The tokens being the same, a dataset does not say which one made them; its shards do.
"""

import importlib.metadata
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import numpy as np

from tinyllama import InputError
from tinyllama.data.readers import Piece
from tinyllama.tokenizer import Tokenizer

Choice = Literal["auto", "fast", "sentencepiece"]
Encode = Callable[[bytes], np.ndarray]

SAMPLED = 1000  # documents (or parts of long ones), of which one is encoded by both
CUT = 1 << 22  # bytes encoded at once; a longer document is cut
_RENEWED = 1 << 26  # bytes encoded between two fast encoders: the cache of words in one only grows
_PROSE = "It's the first of 1,024 tests: don't split “quotes”, naïve words or 3.14159 wrongly…"
GUARDS = (
    *(
        "",
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "\0",
        "\ufffd",
        "\ufeff",
        "\u2581",
        " \u2581 a\u2581b\u2581",
        " " * 1000 + "x",
    ),
    *("<s>", "</s>", "<unk>", "<0x0A>", "a</s>b <s> <unk><0x0A> [INST] <|endoftext|>", "a  b   c\n\n\td  \n"),
    *("line one\r\nline two\r\n", "def f(x):\n\t\treturn x  # tab\n    y = [1, 22, 333]\n", "0123456789 ١٢٣ ²", _PROSE),
    *("e\u0301 is not \u00e9, \u212b \ufb01 \u00a0 \u3000 \u200b x", "漢字かな交じり文、한국어 ภาษาไทย", "Ω≈ç√∫˜µ≤≥÷"),
    *("\U0001f642\U0001f1eb\U0001f1f7 \U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0010ffff\ud7ff\ue000\x7f\x1b[0m"),
    *(
        "x" * 3000,
        "word " * 500,
        "=" * 80 + "-" * 77 + "#" * 3 + "\n" * 9,
        "aaabababbbaab" * 30,
        " " * 1000 + "x",
        "https://a.b/c?d=e&f=%20g",
    ),
)


class Mismatch(RuntimeError):
    """The fast encoder gave other ids than the reference: a defect, and a shard that must not be written."""


class Encoder:
    """Documents to ids, uint32 or int32 arrays without bos and eos.

    Raises InputError when ``choice`` is ``fast`` and gigatoken is missing or does not give this tokenizer's ids.
    """

    name: str
    """library and version that encode"""
    fell_back: str = ""
    """why ``auto`` did not take the fast one"""

    def __init__(self, tokenizer: Tokenizer, choice: Choice) -> None:
        self._reference = tokenizer.encode_utf8
        self._make: Callable[[], Encode] | None = None
        self.name = f"{tokenizer.encoder} {tokenizer.encoder_version}"
        if choice != "sentencepiece":
            try:
                self._make = _fast(tokenizer)
                self.name = f"gigatoken {importlib.metadata.version('gigatoken')}"
            except InputError as error:
                if choice == "fast":
                    raise
                self.fell_back = str(error)
        self._cuts = _cuts(tokenizer)
        self.renew()

    def renew(self) -> None:
        """Forget what encoding has cached; before each shard, so that a shard's memory and time are its own."""
        self._encode = self._make() if self._make else self._reference
        self._encoded = 0
        self._texts = 0

    def stream(self, pieces: Iterable[Piece]) -> Iterator[tuple[np.ndarray, int, str, bool]]:
        """Of each document, or of each part of a long one: ids, bytes of text, subset, whether the document ends there.

        Raises Mismatch.
        """
        rest, seen, joined = bytearray(), 0, False  # of a long document: what is not encoded yet
        for text, subset, last in pieces:
            if last and not rest and len(text) <= CUT:
                yield self._checked(text), len(text), subset, True
                continue
            rest += text
            while self._cuts and (place := self._cuts.search(rest, max(CUT, seen))):
                cut, blank = place.start(), place[0] == b" "
                yield self._checked(bytes(rest[:cut]), joined), cut + blank, subset, False
                del rest[: cut + blank]
                seen, joined = 0, not blank
            seen = len(rest) - 1
            if last:
                yield self._checked(bytes(rest), joined), len(rest), subset, True
                rest, seen, joined = bytearray(), 0, False

    def _checked(self, text: bytes, joined: bool = False) -> np.ndarray:
        """Ids of ``text``; ``joined``: less the blank that goes before every text, for it continues another."""
        if self._make:
            if self._encoded > _RENEWED:
                self._encode, self._encoded = self._make(), 0
            self._encoded += len(text)
        ids = self._encode(text)
        if self._make and self._texts % SAMPLED == 0 and not np.array_equal(ids, self._reference(text)):
            raise Mismatch(
                f"{self.name} gives other ids than the tokenizer's own library for the text {text[:60]!r}...: "
                "run with --encoder sentencepiece, and tell gigatoken's makers"
            )
        self._texts += 1
        return ids[1:] if joined else ids


def _fast(tokenizer: Tokenizer) -> Callable[[], Encode]:
    """What makes fast encoders; raises InputError when they would not give the ids of ``tokenizer``."""
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
    return make


def _cuts(tokenizer: Tokenizer) -> re.Pattern[bytes] | None:
    """Where a document may be cut without changing an id; None: nowhere that this knows of.

    Where no piece has a blank behind another character, one can cut before a run of blanks; the first of them goes, for
    encoding puts one there again. Where no piece longer than a line end, tab or digit has one in it, one can cut before
    those, and drop the blank that encoding puts there.
    """
    pieces = tokenizer.pieces()
    if pieces is None or any("\u2581" in piece.lstrip("\u2581") for piece in pieces):
        return None
    alone = "".join(mark for mark in "\n\t0123456789" if not any(mark in piece and len(piece) > 1 for piece in pieces))
    ids = tokenizer.encode
    same = [ids("a b") == ids("a") + ids("b"), ids("a   b") == ids("a") + ids("  b")]
    same += [ids(f"a {mark}b") == ids("a ") + ids(f"{mark}b")[1:] for mark in alone]
    marks = b"|[" + alone.encode() + b"]" if alone else b""
    return re.compile(b"(?<=[!-~]) (?=.)" + marks, re.DOTALL) if all(same) else None
