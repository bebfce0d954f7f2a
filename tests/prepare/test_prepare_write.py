"""How the parts of documents become one stream with bos and eos, whatever is written at a time."""

import json
from pathlib import Path

import numpy as np
import pytest
from packed import SHORT

from tinyllama.data.packed import ShardWriter
from tinyllama.prepare import encode, prepare
from tinyllama.prepare.encode import TokenChunk
from tinyllama.prepare.inputs import ENDINGS, Fields, Input, find_inputs
from tinyllama.prepare.prepare import CONTEXTS
from tinyllama.tokenizer import Tokenizer

FACTS = {"tokenizer_sha256": "ab" * 32, "encoder": "none", "bos": True, "eos": True, "bos_id": 1, "eos_id": 2}
# documents in parts, with the bytes of each part and the document's subset
DOCUMENTS = [
    ([[5, 6, 7]], [10], "b"),
    ([[8], [9, 10], [11]], [1, 20, 300], "a"),
    ([[]], [0], "b"),
    ([[12] * 9, [13] * 9], [4, 5], "b"),
    ([[14]], [6], "a"),
]


def stream():
    for parts, sizes, subset in DOCUMENTS:
        for number, (ids, size) in enumerate(zip(parts, sizes, strict=True)):
            yield TokenChunk(np.array(ids, dtype=np.uint32), size, subset, number == len(parts) - 1)


@pytest.mark.parametrize("flush", [1, 4, 5, 12, 1 << 16])
@pytest.mark.parametrize(("bos", "eos"), [([1], [2]), ([], [2]), ([1], []), ([], [])])
def test_bos_and_eos_are_the_documents_not_its_parts(tmp_path, monkeypatch, flush, bos, eos):
    monkeypatch.setattr(prepare, "_FLUSH", flush)
    policy = FACTS | {"bos": bool(bos), "eos": bool(eos)}
    recipe = prepare._Recipe(tmp_path, Path("none"), "sentencepiece", Fields(), policy)
    with ShardWriter(tmp_path, "x", 100) as writer:
        subsets = prepare._write(writer, stream(), recipe, Input("", "go/sub/x.jsonl", 0))
        info = writer.finish(**FACTS)
    expected = [[*bos, *sum(parts, []), *eos] for parts, *_ in DOCUMENTS]
    assert np.fromfile(tmp_path / "x.bin", "<u2").tolist() == sum(expected, [])
    assert np.load(tmp_path / "x.idx.npy").tolist() == np.cumsum([len(document) for document in expected]).tolist()
    tokens = [len(document) for document in expected]
    assert (info["documents"], info["tokens"]) == (5, sum(tokens))
    assert subsets == {
        "a": {"documents": 2, "tokens": tokens[1] + tokens[4], "bytes": 327} | SHORT,
        "b": {"documents": 3, "tokens": tokens[0] + tokens[2] + tokens[3], "bytes": 19} | SHORT,
    }


@pytest.mark.parametrize("eos", [True, False])
def test_documents_without_tokens_are_written_before_they_are_many(tmp_path, monkeypatch, eos):
    recipe = prepare._Recipe(tmp_path, Path("none"), "sentencepiece", Fields(), FACTS | {"bos": False, "eos": eos})
    held, most = 0, 0

    def documents():
        nonlocal held, most
        for _ in range(300_000):
            held += 1
            most = max(most, held)
            yield TokenChunk(np.array([], dtype=np.uint32), 0, "", True)

    class Writer(ShardWriter):
        def append(self, ids, ends):
            nonlocal held
            held -= len(ends)
            super().append(ids, ends)

    with Writer(tmp_path, "x", 100) as writer:
        subsets = prepare._write(writer, documents(), recipe, Input("", "x.jsonl", 0))
        info = writer.finish(**FACTS)
    assert most <= 1 << 17
    assert (info["documents"], info["tokens"], held) == (300_000, 300_000 * eos, 0)
    assert subsets == {".": {"documents": 300_000, "tokens": 300_000 * eos, "bytes": 0} | SHORT}


@pytest.mark.parametrize(("name", "folder"), [("go/sub/x.jsonl", "go"), ("x.jsonl", ".")])
def test_documents_of_no_subset_are_their_folders(tmp_path, name, folder):
    recipe = prepare._Recipe(tmp_path, Path("none"), "sentencepiece", Fields(), FACTS | {"bos": False})
    with ShardWriter(tmp_path, "x", 100) as writer:
        document = TokenChunk(np.array([5, 6], dtype=np.uint32), 7, "", True)
        assert prepare._write(writer, [document], recipe, Input("", name, 0)) == {
            folder: {"documents": 1, "tokens": 3, "bytes": 7} | SHORT
        }


def test_a_long_document_is_one_document(tmp_path, tokenizer_file, monkeypatch):
    monkeypatch.setattr(encode, "CUT", 100)
    monkeypatch.setattr(encode, "WINDOW", 50)
    texts = ["the little llama walked along the river, " * 20, "a day", "1984\n" * 200]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = Tokenizer(tokenizer_file)
    policy = FACTS | {"tokenizer_sha256": tokenizer.sha256}
    recipe = prepare._Recipe(tmp_path, tokenizer_file, "sentencepiece", Fields(), policy)
    info = prepare._packer(recipe)(*find_inputs(tmp_path, ENDINGS))
    documents = [[1, *tokenizer.encode(text), 2] for text in texts]
    assert np.fromfile(tmp_path / "a.jsonl.bin", "<u2").tolist() == sum(documents, [])
    ends = np.cumsum([len(document) for document in documents]).tolist()
    assert np.load(tmp_path / "a.jsonl.idx.npy").tolist() == ends
    lengths = np.diff(ends, prepend=0)
    long = {
        f"{key}_over_{context}": int(value)
        for context in CONTEXTS
        for key, value in (("documents", (lengths > context).sum()), ("tokens", lengths[lengths > context].sum()))
    }
    assert long["documents_over_512"] > 0
    assert info["subsets"] == {".": {"documents": 3, "tokens": ends[-1], "bytes": sum(map(len, texts))} | long}
    assert info["documents"] == 3
