"""A sentencepiece BPE model as a tokenizer.json: the same ids, or an error that says why there is none."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from tinyllama import InputError

# of sentencepiece_model.proto: the numbers of the fields that are read here
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _BLANK_AS_SUFFIX = 3, 24
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_BLANKS, _ESCAPE_BLANKS = 2, 3, 4, 5
_BPE = 2
_USER_DEFINED = b"\x18\x04"  # a piece's type, its last field


def tokenizer_json(processor: Any) -> dict[str, Any]:
    """Return the tokenizer.json of a sentencepiece model, without control tokens and decoder.

    User-defined pieces are added tokens there. A merge into a piece of better score goes first: not of lower id, as
    Llama 2 gave its runs of blanks low ids and the lowest scores. A piece has one merge, of the halves that it comes
    from where it is the whole text. No other halves ever meet: until two that do are merged, nothing around them has
    been merged with a part of them, so they were built as they are where there is nothing around them. (transformers'
    converter lists them all, twice as many for Llama 2, needs protobuf, and merges bytes and control tokens.)

    Raises InputError for a model whose ids such a file cannot give.
    """
    ids = list(range(processor.vocab_size()))
    vocab = dict(zip(processor.id_to_piece(ids), ids, strict=True))
    user_defined = user_defined_pieces(processor)
    mergeable = set(text_pieces(processor)) - set(user_defined)
    has_prefix = _refuse_inexact(processor, vocab, mergeable, user_defined)
    ranked = sorted(mergeable, key=lambda piece: (-processor.get_score(vocab[piece]), vocab[piece]))
    ranks = {piece: rank for rank, piece in enumerate(ranked)}
    merges = [halves for piece in ranked if (halves := _halves(piece, ranks))]
    bpe = {
        "type": "BPE",
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "fuse_unk": True,
        "byte_fallback": any(processor.is_byte(ids)),
        "vocab": vocab,
        "merges": merges,
    }
    blanks: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    if has_prefix:  # not Metaspace, which leaves out the prefix of a text that begins with a blank
        blanks.insert(0, {"type": "Prepend", "prepend": "\u2581"})
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": vocab[piece], "content": piece, **flags} for piece in user_defined],
        "normalizer": {"type": "Sequence", "normalizers": blanks},
        "model": bpe,
    }


def _halves(piece: str, ranks: dict[str, int]) -> list[str] | None:
    """Return the two pieces that ``piece`` comes from, by merges into the piece of lowest rank; None: from no two."""
    parts, never = list(piece), len(ranks)
    if len(parts) < 2 or not all(part in ranks for part in parts):
        return None
    while len(parts) > 2:
        found = [ranks.get(left + right, never) for left, right in pairwise(parts)]
        best = min(found)
        if best == never:
            return None
        place = found.index(best)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def text_pieces(processor: Any) -> list[str]:
    """Return every piece that text can become, bytes left out."""
    ids = list(range(processor.vocab_size()))
    kinds = (processor.is_control(ids), processor.is_byte(ids), processor.is_unknown(ids), processor.is_unused(ids))
    return [processor.id_to_piece(i) for i in ids if not any(kind[i] for kind in kinds)]


def user_defined_pieces(processor: Any) -> list[str]:
    """Return the pieces that are found in a text before it is segmented."""
    pieces = [value for number, value in _fields(processor.serialized_model_proto()) if number == _PIECE]
    messages = [value for value in pieces if isinstance(value, bytes)]  # a damaged file may have other fields of 1
    found = [
        i for i, value in enumerate(messages) if value.endswith(_USER_DEFINED) and dict(_fields(value)).get(3) == 4
    ]
    return [processor.id_to_piece(i) for i in found]


def is_plain(processor: Any) -> bool:
    """Return whether text is segmented as it is, blanks being U+2581, and there is no piece that must not be used."""
    _, normalizer = _specs(processor)
    keeps_blanks = normalizer.get(_ESCAPE_BLANKS, 1) and not normalizer.get(_REMOVE_BLANKS, 1)
    has_unused = any(processor.is_unused(list(range(processor.vocab_size()))))
    return not normalizer.get(_CHARSMAP) and bool(keeps_blanks) and not has_unused


def _specs(processor: Any) -> tuple[dict[int, Any], dict[int, Any]]:
    """Return the model's trainer_spec and normalizer_spec, by the numbers of their fields."""
    specs: dict[int, dict[int, Any]] = {_TRAINER: {}, _NORMALIZER: {}}
    for number, value in _fields(processor.serialized_model_proto()):
        if number in specs and isinstance(value, bytes):
            specs[number] = dict(_fields(value))
    return specs[_TRAINER], specs[_NORMALIZER]


def _refuse_inexact(processor: Any, vocab: dict[str, int], mergeable: set[str], user_defined: list[str]) -> bool:
    """Raise InputError unless a tokenizer.json gives the ids of this model; returns whether it puts a blank first."""
    trainer, normalizer = _specs(processor)
    has_prefix = bool(normalizer.get(_DUMMY_PREFIX, 1))
    scores = [processor.get_score(vocab[piece]) for piece in mergeable if len(set(piece)) > 1]
    reasons = {
        "it is not a BPE model": trainer.get(_MODEL_TYPE, 1) != _BPE,
        "it normalizes text, removes blanks or has unused pieces": not is_plain(processor),
        "it puts blanks behind words": bool(trainer.get(_BLANK_AS_SUFFIX, 0)),
        "pieces of several letters share a score": len(set(scores)) < len(scores),
        "a user-defined piece has a blank": any(" " in piece for piece in user_defined),  # which it never finds
        "it has user-defined pieces and puts a blank before a text": bool(user_defined) and has_prefix,
    }
    if reason := next((reason for reason, is_so in reasons.items() if is_so), None):
        raise InputError(f"no tokenizer.json can have the ids of this sentencepiece model: {reason}")
    return has_prefix


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value, an int or bytes, of each field of a protobuf message that sentencepiece has read."""
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        size = number() if key & 7 == 2 else {1: 8, 5: 4}.get(key & 7, 0)
        yield key >> 3, message[place : place + size]
        place += size
