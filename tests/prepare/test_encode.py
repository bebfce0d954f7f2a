import os
import random
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from tinyllama import InputError
from tinyllama.prepare import encode
from tinyllama.prepare.encode import GUARDS, Encoder, Mismatch
from tinyllama.prepare.readers import TextChunk
from tinyllama.tokenizer import Tokenizer

LLAMA = os.environ.get("LLAMA_TOKENIZER")
llama = pytest.mark.skipif(not LLAMA, reason="LLAMA_TOKENIZER does not name the Llama 2 tokenizer.model")
ADVERSARIAL = [
    *GUARDS,
    *(" " * n for n in (3, 16, 17, 1000)),
    *("a" + " " * 1000 + "b", "\x00", "a\x00b", "\u0301", "e\u0301\u0301", "\u200d", "\ufdfa" * 50, "word " * 200_000),
    *("x" * 1_000_000, "0" * 100_000, "ab, " * 250_000, "漢字" * 100_000),
]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    alphabets = [
        "ab \n",
        " \t\r\n0",
        "<s>/unk ",
        "\u2581 a",
        "".join(map(chr, range(0x20, 0x3000))),
        "e\u0301\u0327 \u200d",
    ]
    texts = ["".join(rng.choices(rng.choice(alphabets), k=rng.randrange(300))) for _ in range(count)]
    anything = lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))  # noqa: E731
    return texts + ["".join(anything() for _ in range(rng.randrange(100))) for _ in range(count)]


def stream(encoder: Encoder, texts: list[bytes]) -> list[int]:
    documents = [TextChunk(part, "", number == len(texts) - 1) for number, part in enumerate(texts)]
    out = list(encoder.stream(documents))
    assert [last for *_, last in out] == [False] * (len(out) - 1) + [True]
    assert sum(size for _, size, _, _ in out) == sum(map(len, texts))
    return np.concatenate([ids for ids, *_ in out]).tolist()


@llama
def test_fast_is_exact_on_adversarial_and_random_texts():
    pytest.importorskip("gigatoken")
    tokenizer = Tokenizer(LLAMA)
    encoder = Encoder(tokenizer, "fast")
    assert encoder.name.startswith("gigatoken ")
    for text in ADVERSARIAL + random_texts(2000):
        assert np.array_equal(encoder._encode(text.encode()), tokenizer.encode_utf8(text.encode())), text[:80]


@pytest.mark.parametrize("choice", ["sentencepiece", pytest.param("fast", marks=llama)])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_document_cut_anywhere_has_the_same_ids(tokenizer_file, monkeypatch, choice, size):
    if choice == "fast":
        pytest.importorskip("gigatoken")
    tokenizer = Tokenizer(LLAMA or tokenizer_file)
    encoder = Encoder(tokenizer, choice)
    assert encoder._cuts is not None
    monkeypatch.setattr(encode, "CUT", size)
    texts = [text for text in ADVERSARIAL if len(text) < 5000] + random_texts(200)
    for text in texts:
        payload = text.encode()
        halves = [payload[: len(payload) // 2], payload[len(payload) // 2 :]]
        for texts in ([payload], halves, [payload, b""]):
            assert stream(encoder, texts) == tokenizer.encode_utf8(payload).tolist(), (text[:80], size)


def parts(encoder: Encoder, texts: list[bytes]) -> list[tuple[list[int], int]]:
    """Ids and bytes of each part of one document."""
    documents = [TextChunk(part, "", number == len(texts) - 1) for number, part in enumerate(texts)]
    return [(ids.tolist(), size) for ids, size, *_ in encoder.stream(documents)]


@pytest.mark.parametrize("choice", ["sentencepiece", pytest.param("fast", marks=llama)])
def test_no_part_of_a_document_is_long(tokenizer_file, monkeypatch, choice):
    """Where nothing tells a cut that changes no id, both encoders cut alike, between characters."""
    if choice == "fast":
        pytest.importorskip("gigatoken")
    tokenizer = Tokenizer(LLAMA or tokenizer_file)
    encoder = Encoder(tokenizer, choice)
    monkeypatch.setattr(encode, "CUT", 1000)
    monkeypatch.setattr(encode, "WINDOW", 100)
    for text in ("x" * 50_000, "漢字" * 10_000, "é" * 20_000, "a" * 999 + "🦙" * 5000):
        payload = text.encode()
        whole = parts(encoder, [payload])
        assert max(size for _, size in whole) <= 1100
        assert {size for _, size in whole[:-1]} <= set(range(1000, 1004))
        assert tokenizer.decode([i for ids, _ in whole for i in ids]) == text
        assert parts(encoder, [payload[i : i + 777] for i in range(0, len(payload), 777)]) == whole
        assert whole == parts(Encoder(tokenizer, "sentencepiece"), [payload])


def test_documents_behind_long_ones_begin_anew(tokenizer_file, monkeypatch):
    tokenizer = Tokenizer(tokenizer_file)
    monkeypatch.setattr(encode, "CUT", 40)
    monkeypatch.setattr(encode, "WINDOW", 20)
    long = "The little llama walked along the river until 1984, "
    texts = [long * 3, "nothing", long * 2 + "\n", "", "the evening", long * 4]
    chunks = []
    for number, text in enumerate(texts):
        payload, size = text.encode(), 1000 if number % 2 else 30
        cut = [payload[i : i + size] for i in range(0, len(payload), size)] or [b""]
        chunks += [TextChunk(part, f"set {number}", i == len(cut) - 1) for i, part in enumerate(cut)]
    found, ids, size = [], [], 0
    for new, num_bytes, subset, is_last in Encoder(tokenizer, "sentencepiece").stream(chunks):
        ids, size = ids + new.tolist(), size + num_bytes
        if is_last:
            found.append((ids, size, subset))
            ids, size = [], 0
    assert ids == []
    assert found == [(tokenizer.encode(text), len(text), f"set {number}") for number, text in enumerate(texts)]


def test_a_place_to_cut_is_looked_for_in_the_window_alone(tokenizer_file, monkeypatch):
    monkeypatch.setattr(encode, "CUT", 1000)
    monkeypatch.setattr(encode, "WINDOW", 100)
    encoder = Encoder(Tokenizer(tokenizer_file), "sentencepiece")
    for size, first in ((1098, 1098), (1099, 1099), (1100, 1000), (1500, 1000)):  # a digit may be cut off before it
        payload = b"x" * size + b"1" + b"x" * 1200
        whole = parts(encoder, [payload])
        assert whole[0][1] == first, size
        # what is there of the document when it is looked for makes no difference
        assert parts(encoder, [payload[i : i + 1] for i in range(len(payload))]) == whole


def test_prose_is_cut_between_letters_that_no_piece_has_side_by_side(tokenizer_file, monkeypatch):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    normal = [i for i in range(model.vocab_size()) if not (model.is_control(i) or model.is_byte(i))]
    pieces = {model.id_to_piece(i).replace("\u2581", " ") for i in normal if not model.is_unknown(i)}
    pairs = {a + b for piece in pieces for a, b in zip(piece, piece[1:], strict=False)}
    known = {piece for piece in pieces if len(piece) == 1 and piece not in " \t"}
    text = "the little llama walked along  the xylophone and (extra) paths, until the evening: lost"
    ends, begin = [], 0
    for i in range(2, len(text)):
        a, b = text[i - 1 : i + 1]
        if i >= begin + 2 and a in known and (b in known or b == " ") and a + b not in pairs:
            ends.append(i)
            begin = i
    assert {"x", "y"}.isdisjoint(known)  # bytes, which cuts leave alone
    assert {text[end] for end in ends} >= {" ", "l"}
    monkeypatch.setattr(encode, "CUT", 1)
    found = parts(Encoder(Tokenizer(tokenizer_file), "sentencepiece"), [text.encode()])
    assert np.cumsum([size for _, size in found]).tolist() == [*ends, len(text)]
    assert [i for ids, _ in found for i in ids] == model.encode(text)


def test_digits_that_pieces_join_to_letters_are_no_place_to_cut(tmp_path, monkeypatch):
    import sentencepiece

    texts = iter(["b1 c2 b1 c2 ab", "say b1 or c2"] * 20)
    llamas = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2}
    settings = llamas | {"vocab_size": 275, "remove_extra_whitespaces": False, "split_by_number": False}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_prefix=str(tmp_path / "joined"), **settings)
    tokenizer = Tokenizer(tmp_path / "joined.model")
    assert any("b1" in piece for piece in tokenizer.pieces())
    monkeypatch.setattr(encode, "CUT", 1)
    for text in ("b1 c2 b1", "abb1c2b1b1", "a1b1a1", "b1\nb1 c2"):
        assert stream(Encoder(tokenizer, "sentencepiece"), [text.encode()]) == tokenizer.encode(text), text


def test_cuts_beside_user_defined_pieces_with_blanks(tmp_path, monkeypatch):
    import sentencepiece

    texts = iter(["the little llama walked along the river", "a day in the mountains"] * 20)
    settings = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2}
    settings |= {"vocab_size": 330, "remove_extra_whitespaces": False, "user_defined_symbols": ["w in", "e\\n"]}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_prefix=str(tmp_path / "a"), **settings)
    tokenizer = Tokenizer(tmp_path / "a.model")
    encoder = Encoder(tokenizer, "sentencepiece")
    assert encoder._cuts is not None
    monkeypatch.setattr(encode, "CUT", 1)
    for text in ("low in the river", "w in w in  w w inw in", "one\\ntwo e e\\n", "e\\\n"):
        assert len(parts(encoder, [text.encode()])) > 1
        assert stream(encoder, [text.encode()]) == tokenizer.encode(text), text


@llama
def test_text_without_blanks_is_cut_where_no_piece_reaches_over(monkeypatch):
    tokenizer = Tokenizer(LLAMA)
    monkeypatch.setattr(encode, "CUT", 1000)
    monkeypatch.setattr(encode, "WINDOW", 100)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+/"
    payload = "".join(random.Random(0).choices(letters, k=100_000)).encode()
    found = parts(Encoder(tokenizer, "sentencepiece"), [payload])
    assert len(found) > 90
    assert [i for ids, _ in found for i in ids] == tokenizer.encode_utf8(payload).tolist()


def test_no_cut_is_known_where_text_is_normalized(tmp_path):
    """sentencepiece's own default drops blanks and joins characters."""
    import sentencepiece

    texts = iter(["the little llama walked along the river", "a day in the mountains"] * 20)
    settings = {"model_type": "bpe", "vocab_size": 50, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_prefix=str(tmp_path / "nfkc"), **settings)
    assert encode._cuts(Tokenizer(tmp_path / "nfkc.model")) == (None, "")


def test_a_tokenizer_of_which_no_cut_is_known_is_cut_where_the_ids_near_by_stay(tmp_path, monkeypatch):
    import tokenizers

    model = tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(encode, "CUT", 5)
    monkeypatch.setattr(encode, "WINDOW", 4)
    assert parts(Encoder(Tokenizer(tmp_path), "sentencepiece"), [b"abababa", b"bab"]) == [([2, 2, 2], 6), ([2, 2], 4)]


def test_a_tokenizer_that_lacks_letters_encodes_what_it_can(tmp_path):
    import tokenizers

    model = tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="<unk>")  # which it has not either
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    encoder = Encoder(Tokenizer(tmp_path), "auto")
    assert parts(encoder, [b"b"]) == [([1], 1)]
    with pytest.raises(InputError, match="fails on 'c'"):
        parts(encoder, [b"c"])


def test_where_no_cut_keeps_the_ids_it_is_behind_so_many_bytes(tmp_path, monkeypatch):
    """A run of one letter: its pieces depend on where it began, so no place in it is safe."""
    import tokenizers

    model = tokenizers.models.BPE({"a": 0, "aa": 1, "aaaa": 2}, [("a", "a"), ("aa", "aa")])
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(encode, "CUT", 401)
    monkeypatch.setattr(encode, "WINDOW", 20)
    found = parts(Encoder(Tokenizer(tmp_path), "sentencepiece"), [b"a" * 1000])
    assert found == [([2] * 100 + [0], 401), ([2] * 100 + [0], 401), ([2] * 49 + [1], 198)]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda ids: np.array([5]),
        lambda ids: ids[::-1],
        lambda ids: ids[:-1],
        lambda ids: ids + (np.arange(len(ids)) == 0),  # the first alone
        lambda ids: ids + (np.arange(len(ids)) == len(ids) - 1),
    ],
)
def test_a_wrong_encoder_is_found_while_it_runs(tokenizer_file, wrong):
    tokenizer = Tokenizer(tokenizer_file)
    encoder = Encoder(tokenizer, "sentencepiece")
    encoder._make = lambda: lambda text: wrong(tokenizer.encode_utf8(text))
    encoder._encode = encoder._make()
    with pytest.raises(Mismatch, match="gives other ids .* for the text b'a llama'"):
        list(encoder.stream([TextChunk(b"a llama", "", True)]))


def test_one_document_in_a_thousand_is_encoded_by_both(tokenizer_file):
    encoder = Encoder(Tokenizer(tokenizer_file), "sentencepiece")
    reference, checked = encoder._reference, []
    encoder._make = lambda: reference  # in the place of the fast one
    encoder._reference = lambda text: checked.append(text) or reference(text)
    documents = [TextChunk(b"%d" % number, "", True) for number in range(2500)]
    assert len(list(encoder.stream(documents))) == 2500
    assert checked == [b"0", b"1000", b"2000"]
    list(encoder.stream(documents[5:99]))  # the next shard, of which the first is looked at
    assert checked[3:] == [b"5"]


def test_of_shards_of_one_document_each_only_a_part_is_encoded_by_both(tokenizer_file, monkeypatch):
    assert (encode._COMPARED, encode._SHARE) == (2**20, 100)
    monkeypatch.setattr(encode, "_COMPARED", 25)
    encoder = Encoder(Tokenizer(tokenizer_file), "sentencepiece")
    encode_both, checked = encoder._encode, []
    encoder._make = lambda: encode_both
    monkeypatch.setattr(encoder, "_reference", lambda text: checked.append(text) or encode_both(text))
    for number in range(600):
        list(encoder.stream([TextChunk(b"%010d" % number, "", True)]))
    # 25 bytes and what goes over them, then a hundredth of all
    assert [int(text) for text in checked] == [0, 1, 2, 300, 400, 500]


def test_text_is_read_ahead_up_to_a_bound(tokenizer_file, monkeypatch):
    monkeypatch.setattr(encode, "_BATCH", 100)
    read = []

    def chunks():
        for number in range(20):
            read.append(number)
            yield TextChunk(b"the llama " * 3, "", is_last=True)

    encoded = Encoder(Tokenizer(tokenizer_file), "sentencepiece").stream(chunks())
    counts = [len(read) for _ in encoded]  # at each document that comes out
    assert counts == [4] * 4 + [8] * 4 + [12] * 4 + [16] * 4 + [20] * 4


@pytest.mark.parametrize("text", [b"", b"a"])
def test_documents_without_much_text_are_read_ahead_up_to_a_number(tokenizer_file, text):
    read = iter(range(1 << 20))
    documents = (TextChunk(text, "", True) for _ in read)
    next(Encoder(Tokenizer(tokenizer_file), "sentencepiece").stream(documents))
    assert next(read) <= 1 << 15


def test_encoders_are_renewed_before_their_cache_is_large(tokenizer_file, monkeypatch):
    monkeypatch.setattr(encode, "_RENEWED", 100)  # ids
    encoder = Encoder(Tokenizer(tokenizer_file), "sentencepiece")
    made = []
    encoder._make = lambda: made.append(0) or encoder._reference
    documents = [TextChunk(b"7" * 59, "", True)] * 4  # 60 ids each
    found = [len(made) for shard in (documents, documents[:3]) for _ in encoder.stream(shard)]
    assert found == [0, 0, 1, 1, 2, 2, 3]  # whichever shard they are of


def test_encoders_are_renewed_before_long_pieces_fill_their_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_RENEWED", 100)
    longest = "=" * 64  # one id: the cache holds the word's bytes, too
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({longest: 0, "[UNK]": 1}, "[UNK]"))
    library.save(str(tmp_path / "tokenizer.json"))
    encoder = Encoder(Tokenizer(tmp_path / "tokenizer.json"), "sentencepiece")
    made = []
    encoder._make = lambda: made.append(0) or encoder._reference
    found = [len(made) for _ in encoder.stream([TextChunk(longest.encode(), "", True)] * 28)]  # worth 8 ids each
    assert found == [0] * 13 + [1] * 13 + [2] * 2


def test_fast_gives_the_ids_of_the_reference(tokenizer_file):
    gigatoken = pytest.importorskip("gigatoken")
    tokenizer = Tokenizer(tokenizer_file)
    for choice in ("auto", "fast"):
        encoder = Encoder(tokenizer, choice)
        assert (encoder.name, encoder.fell_back) == (f"gigatoken {version(gigatoken.__name__)}", "")
        for text in (text for text in ADVERSARIAL if len(text) < 5000):
            ((ids, *_),) = encoder.stream([TextChunk(text.encode(), "", True)])
            assert ids.tolist() == tokenizer.encode(text), text[:80]


@pytest.mark.parametrize(
    ("normalizer", "flags", "text", "pieces"),
    [
        # two marks, whose order depends on the version of Unicode's tables
        (normalizers.NFC(), {}, "\u0301\u08d3", ["\u0301\u08d3"]),
        (normalizers.NFC(), {}, "a cafe\u0301", ["a caf\u00e9"]),  # no "cafe" is left to be an added token
        (None, {"normalized": False, "lstrip": True}, "a\n\ncafe b", ["a", "cafe", " b"]),  # it takes the line ends
    ],
)
def test_what_the_fast_one_does_otherwise_is_left_to_the_reference(tmp_path, normalizer, flags, text, pieces):
    pytest.importorskip("gigatoken")
    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    whole = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole.add_tokens([tokenizers.AddedToken("cafe", **flags), "\n\n"])
    if normalizer:
        whole.normalizer = normalizer
    whole.save(str(tmp_path / "tokenizer.json"))
    encoder = Encoder(Tokenizer(tmp_path), "auto")
    assert encoder.name == f"tokenizers {version('tokenizers')}"
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    expected = [[256] if piece == "cafe" else [letters[one] for one in spelled(piece)[0][0]] for piece in pieces]
    assert stream(encoder, [text.encode()]) == sum(expected, [])
    with pytest.raises(InputError, match="gigatoken is not used with"):
        Encoder(Tokenizer(tmp_path), "fast")


@pytest.mark.parametrize("guard", [GUARDS[1], GUARDS[-1]])
def test_an_encoder_that_is_wrong_on_one_guard_is_not_taken(tokenizer_file, monkeypatch, guard):
    pytest.importorskip("gigatoken")
    tokenizer = Tokenizer(tokenizer_file)
    encode_utf8 = tokenizer.encode_utf8
    monkeypatch.setattr(tokenizer, "encode_utf8", lambda text: encode_utf8(text)[text == guard.encode() :])
    assert f"for {guard.encode()!r}: use" in Encoder(tokenizer, "auto").fell_back
    with pytest.raises(InputError, match="gigatoken gives other ids"):
        Encoder(tokenizer, "fast")


def test_without_gigatoken(tokenizer_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    tokenizer = Tokenizer(tokenizer_file)
    assert "gigatoken is not installed: pip install" in Encoder(tokenizer, "auto").fell_back
    assert Encoder(tokenizer, "auto").name == f"sentencepiece {tokenizer.encoder_version}"
    assert Encoder(tokenizer, "sentencepiece").fell_back == ""
    with pytest.raises(InputError, match="not installed"):
        Encoder(tokenizer, "fast")


def test_an_encoder_that_differs_is_not_taken(tokenizer_file, monkeypatch):
    pytest.importorskip("gigatoken")
    tokenizer = Tokenizer(tokenizer_file)
    monkeypatch.setattr(tokenizer, "encode_utf8", lambda text: np.array([len(text)]))
    assert "gigatoken gives other ids" in Encoder(tokenizer, "auto").fell_back


@llama
@pytest.mark.slow
def test_packed_output_is_the_same_over_200_mb(tmp_path):
    """Every text of this Python's library and packages, prose and code, in shards of 20 MB."""
    pytest.importorskip("gigatoken")
    import json
    import sysconfig

    from tinyllama.prepare.inputs import Fields, find_inputs
    from tinyllama.prepare.prepare import Options, prepare

    source, size, shard, rows = tmp_path / "in", 0, 0, []
    source.mkdir()
    for path in (p for root in ("stdlib", "purelib") for p in sorted(Path(sysconfig.get_path(root)).rglob("*"))):
        if size > 200_000_000:
            break
        if path.suffix in {".py", ".md", ".rst", ".txt", ".pyi", ".h", ".json"} and path.is_file():
            text = path.read_bytes().decode(errors="ignore")
            size += len(text)
            rows.append(json.dumps({"text": text}))
            if sum(map(len, rows[-1:])) and size // 20_000_000 > shard:
                (source / f"{shard:03}.jsonl").write_text("\n".join(rows))
                shard, rows = size // 20_000_000, []
    assert size > 200_000_000
    for encoder in ("fast", "sentencepiece"):
        prepare(find_inputs(source, (".jsonl",)), Fields(), Options(Path(LLAMA), tmp_path / encoder, encoder=encoder))
    for path in (tmp_path / "fast").iterdir():
        if path.name == "manifest.json" or path.suffix != ".json":
            assert path.read_bytes() == (tmp_path / "sentencepiece" / path.name).read_bytes(), path.name
