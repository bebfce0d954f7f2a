import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyllama import InputError
from tinyllama.prepare import encode
from tinyllama.prepare.encode import GUARDS, Encoder, Mismatch
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


def stream(encoder: Encoder, pieces: list[bytes]) -> list[int]:
    documents = [(piece, "", number == len(pieces) - 1) for number, piece in enumerate(pieces)]
    out = list(encoder.stream(documents))
    assert [last for *_, last in out] == [False] * (len(out) - 1) + [True]
    assert sum(size for _, size, _, _ in out) == sum(map(len, pieces))
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
        for pieces in ([payload], halves, [payload, b""]):
            assert stream(encoder, pieces) == tokenizer.encode_utf8(payload).tolist(), (text[:80], size)


def parts(encoder: Encoder, pieces: list[bytes]) -> list[tuple[list[int], int]]:
    """Ids and bytes of each part of one document."""
    documents = [(piece, "", number == len(pieces) - 1) for number, piece in enumerate(pieces)]
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


def test_a_tokenizer_of_which_no_cut_is_known(tmp_path, monkeypatch):
    import tokenizers

    model = tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(encode, "CUT", 5)
    monkeypatch.setattr(encode, "WINDOW", 4)
    assert parts(Encoder(Tokenizer(tmp_path), "sentencepiece"), [b"abababa", b"bab"]) == [
        ([2, 2, 0], 5),
        ([1, 2, 2], 5),
    ]


def test_a_wrong_encoder_is_found_while_it_runs(tokenizer_file):
    encoder = Encoder(Tokenizer(tokenizer_file), "sentencepiece")
    encoder._make = lambda: lambda text: np.array([5])
    encoder._encode = encoder._make()
    with pytest.raises(Mismatch, match="gives other ids .* for the text b'a llama'"):
        list(encoder.stream([(b"a llama", "", True)]))


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
