import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from tinyllama import InputError
from tinyllama.prepare import train_tokenizer
from tinyllama.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
PROSE = "The little llama walked along the river, and in 1984 the others followed her."
CODE = "def flibber(x):\n        return flibber(x) + 1024\n"


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> list[str]:
    """Prose as SlimPajama has it and code as StarCoder does."""
    folder = tmp_path_factory.mktemp("raw")
    with zstandard.open(folder / "prose.jsonl.zst", "wt") as file:
        for i in range(200):
            other = f"{i * 7919:b}".translate({48: "no", 49: "ri"})  # every line has a word of its own
            file.write(json.dumps({"text": f"{PROSE} {other}", "meta": {"redpajama_set_name": "RedPajamaC4"}}) + "\n")
    parquet.write_table(pyarrow.table({"content": [CODE] * 100}), folder / "code.parquet")
    return [str(folder / "prose.jsonl.zst"), f"{folder / 'code.parquet'}:content"]


def run(sources: list[str], output: Path, vocab_size: int) -> subprocess.CompletedProcess:
    call = [sys.executable, "scripts/train_tokenizer.py", "--source", *sources]
    call += ["--output", str(output), "--vocab_size", str(vocab_size)]
    return subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def trained(raw, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "new" / "tokenizer.model"
    done = run(raw, output, 380)
    assert done.returncode == 0, done.stderr
    return output


def pieces_of(model: bytes) -> list[str]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [processor.id_to_piece(i) for i in range(processor.vocab_size())]


@pytest.fixture(scope="module")
def pieces(trained) -> list[str]:
    return pieces_of(trained.read_bytes())


def test_special_pieces_and_bytes_come_first_as_in_llama(trained, pieces):
    assert len(pieces) == 380
    assert pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert pieces[3:259] == [f"<0x{i:02X}>" for i in range(256)]
    assert (Tokenizer(trained).bos_id, Tokenizer(trained).eos_id) == (1, 2)


def test_every_source_is_read(pieces):
    assert "▁llama" in pieces
    assert any("flibber" in piece for piece in pieces)


def test_digits_are_split_and_blanks_joined(pieces):
    assert [piece for piece in pieces if re.search(r"\d", piece) and len(piece) > 1 and "<0x" not in piece] == []
    assert "▁▁▁▁" in pieces


@pytest.mark.parametrize(
    "text",
    [
        "a word",
        " one blank before",
        "two  blanks,   three, at the end ",
        "tabs\tand\n\nlines\r\n\x0c",
        "1984",
        "ﬁ is a ligature, Å is not Å",  # another normalizer would write them alike
        "llama 🦙 \0 лама",
        "</s><s><unk>",
    ],
)
def test_a_text_comes_back_byte_for_byte(trained, text):
    tokenizer = Tokenizer(trained)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)


def test_the_first_word_is_a_word_like_any_other(trained, pieces):
    assert Tokenizer(trained).encode("llama") == [pieces.index("▁llama")]


def test_what_is_not_a_piece_falls_back_to_its_bytes(trained):
    assert Tokenizer(trained).encode("🦙")[-4:] == [3 + byte for byte in "🦙".encode()]


def test_characters_that_are_one_in_two_hundred_thousand_are_left_to_their_bytes(tmp_path):
    """One in ten thousand is a piece: 0.99995 of the characters are covered."""
    text = "ab cd " * 33_300 + "щ" * 20 + "ж"
    (tmp_path / "a.txt").write_text("\n".join(text[i : i + 100] for i in range(0, len(text), 100)))
    pieces = "".join(pieces_of(train_tokenizer.train([str(tmp_path / "a.txt")], 275)))
    assert "щ" in pieces
    assert "ж" not in pieces


def test_the_lines_of_all_files_in_and_below_a_folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("one\n\ntwo\r\nthree")
    (tmp_path / "b" / "c.jsonl").write_text('{"text": "four\\nfive"}\n{"text": ""}\n{"text": "six"}\n')
    (tmp_path / "b" / "d.md").write_text("not one")
    (tmp_path / "e.jsonl").write_text('{"body": "eight"}\n')
    sources = [str(tmp_path / "b"), str(tmp_path / "a.txt"), f"{tmp_path / 'e.jsonl'}:body"]
    assert list(train_tokenizer.lines(sources)) == ["four", "five", "six", "one", "", "two", "three", "eight"]


def test_every_source_that_prepare_text_takes(tmp_path):
    import bz2
    import zipfile

    import fsspec

    (tmp_path / "A.NDJSON.BZ2").write_bytes(bz2.compress(b'{"body": "one"}\n'))
    (tmp_path / ".hidden.jsonl").write_text("{")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("c.jsonl", '{"body": "two"}\n')
    (tmp_path / "with:colon.txt").write_text("four")
    fs = fsspec.filesystem("memory")
    fs.pipe("/words/d.jsonl", b'{"body": "three", "text": "five"}\n')
    sources = [f"{tmp_path}/A.NDJSON.BZ2:body", f"zip://*.jsonl::{tmp_path}/b.zip:body", "memory://words:body"]
    sources += [f"{tmp_path}/with:colon.txt", "memory://words", "memory://words/d.jsonl:"]
    assert list(train_tokenizer.lines(sources)) == ["one", "two", "three", "four", "five", "five"]
    fs.rm("/words", recursive=True)


@pytest.mark.parametrize(
    ("source", "path", "key"),
    [
        ("a.jsonl", "a.jsonl", "text"),
        ("a.jsonl:content", "a.jsonl", "content"),
        ("hf://datasets/a/b", "hf://datasets/a/b", "text"),
        ("hf://datasets/a/b@main/c:content", "hf://datasets/a/b@main/c", "content"),
        ("https://host:8080/a.jsonl", "https://host:8080/a.jsonl", "text"),
        ("https://host:8080/a.jsonl:content", "https://host:8080/a.jsonl", "content"),
        ("zip://*.jsonl::a.zip", "zip://*.jsonl::a.zip", "text"),
        ("zip://*.jsonl::a.zip:content", "zip://*.jsonl::a.zip", "content"),
        ("zip://::s3://bucket/a.zip", "zip://::s3://bucket/a.zip", "text"),
    ],
)
def test_the_key_is_behind_the_last_colon(source, path, key):
    assert train_tokenizer.with_key(source) == (path, key)


def test_what_is_not_read_is_said(tmp_path, capsys):
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_text("one")
    assert list(train_tokenizer.lines([str(tmp_path)])) == ["one"]
    assert capsys.readouterr().err == f"{tmp_path}: not read: 1 .md\n"


def test_32000_pieces_where_no_number_is_given(raw, tmp_path, script):
    code, out, err = script("train_tokenizer", "--source", raw[0], "--output", tmp_path / "tokenizer.model")
    assert (code, out) == (2, "")
    assert err.startswith("error: --vocab_size 32000 cannot be trained on this text: ")


def test_texts_without_text_are_called_so(tmp_path, script):
    (tmp_path / "a.txt").touch()
    code, _, err = script("train_tokenizer", "--source", tmp_path, "--output", tmp_path / "tokenizer.model")
    reason = "give a larger one, or texts that are not empty"
    assert (code, err) == (2, f"error: --vocab_size 32000 cannot be trained on this text: {reason}\n")


def test_what_the_command_says(raw, tmp_path):
    done = run([raw[0]], tmp_path / "a.model", 300)
    sha256 = hashlib.sha256((tmp_path / "a.model").read_bytes()).hexdigest()
    assert (done.returncode, done.stderr) == (0, "")  # sentencepiece's own log has no place here
    assert done.stdout == f"{tmp_path / 'a.model'}: 300 pieces, sha256 {sha256[:16]}\n"


def test_a_model_of_bpe(trained):
    """Its scores are the ranks of the merges; a unigram model has log probabilities."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained))
    scores = [processor.get_score(i) for i in range(259, 380)]
    assert scores == [-float(rank) for rank in range(121)]


def test_the_same_bytes_again(raw, trained):
    assert train_tokenizer.train(raw, 380) == trained.read_bytes()


def test_a_sample_is_of_all_the_lines_and_always_the_same():
    assert train_tokenizer.MAX_LINES == 300_000
    lines = [str(i) for i in range(10_000)]
    sample = train_tokenizer.sample(iter(lines), 1000)
    assert sample == train_tokenizer.sample(iter(lines), 1000)
    assert len(set(sample)) == 1000
    # each quarter gives 250 of 1000; the standard deviation is 13
    assert all(abs(sum(int(line) // 2500 == quarter for line in sample) - 250) < 65 for quarter in range(4))
    assert train_tokenizer.sample(iter(lines[:7]), 1000) == lines[:7]


def test_more_lines_than_the_most_are_sampled(raw, monkeypatch):
    monkeypatch.setattr(train_tokenizer, "MAX_LINES", 150)  # of 400, of which the last 200 are code
    pieces = pieces_of(train_tokenizer.train(raw, 380))
    assert "▁llama" in pieces
    assert any("flibber" in piece for piece in pieces)
    monkeypatch.setattr(train_tokenizer, "MAX_LINES", 1)
    with pytest.raises(InputError, match="too high"):
        train_tokenizer.train(raw, 380)


def test_a_tokenizer_that_is_there_is_left_alone(raw, trained):
    before = trained.read_bytes(), trained.stat().st_mtime_ns
    again = run(raw, trained, 380)
    sha256 = Tokenizer(trained).sha256[:16]
    assert again.returncode == 0
    assert again.stdout == f"{trained}: 380 pieces, sha256 {sha256}, which was there and is left as it is\n"
    other = run(raw, trained, 300)
    assert other.returncode == 2
    assert other.stderr == f"error: {trained} has 380 pieces, not 300: give another --output\n"
    assert (trained.read_bytes(), trained.stat().st_mtime_ns) == before


def test_a_tokenizer_is_written_through_a_link_to_a_file_to_come(raw, trained, tmp_path, script):
    link = tmp_path / "tokenizer.model"
    link.symlink_to("shared/llama.model")
    assert script("train_tokenizer", "--source", *raw, "--output", link, "--vocab_size", 380)[0] == 0
    assert link.is_symlink()
    assert (tmp_path / "shared" / "llama.model").read_bytes() == trained.read_bytes()


def test_an_output_that_cannot_be_written_is_an_error(raw, trained):
    done = run(raw, trained / "tokenizer.model", 380)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {trained}/tokenizer.model cannot be written (")


def test_a_model_that_would_be_read_as_json_is_refused_before_training(raw, tmp_path, script):
    output = tmp_path / "new" / "tokenizer.json"
    said = (
        f"error: --output {output}: a sentencepiece model does not end in .json: give {output.parent}/tokenizer.model"
    )
    assert script("train_tokenizer", "--source", *raw, "--output", output) == (2, "", f"{said}\n")
    assert not output.parent.exists()


@pytest.mark.parametrize("source", ["", ":content"])
def test_a_source_without_a_path_is_refused_before_any_is_read(raw, tmp_path, script, source):
    run = script("train_tokenizer", "--source", f"{raw[0]}:nope", source, "--output", tmp_path / "tokenizer.model")
    assert run == (2, "", f"error: --source {source!r} is not a path: give one\n")


def test_a_key_that_is_not_there_is_an_error(raw, tmp_path):
    done = run([f"{raw[0]}:nope"], tmp_path / "tokenizer.model", 380)
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: .*line 1: no key 'nope', only .*: name the one .*train_tokenizer.py PATH:KEY.*\n", done.stderr
    )


@pytest.mark.parametrize(
    ("vocab_size", "says"),
    [
        (20_000, "too high .* <= "),
        (100, "smaller than required_chars"),
        (-1, "give a larger one"),
        (2**31, "give one below 2"),
    ],
)
def test_a_vocabulary_that_the_text_cannot_fill_is_an_error(raw, tmp_path, vocab_size, says):
    done = run(raw, tmp_path / "tokenizer.model", vocab_size)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: --vocab_size {vocab_size} cannot be trained.*{says}.*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("abcd efgh", ["abcd", "efgh"]),
        ("ab cd efgh", ["ab cd", "efgh"]),  # as much as there is room for
        ("abcdefgh ijk", ["abcdefgh", "ijk"]),  # the blank itself needs no room
        ("abcdefghijk", ["abcdefgh", "ijk"]),
        ("漢字かな交じり", ["漢字", "かな", "交じ", "り"]),
        ("abc🦙🦙", ["abc🦙", "🦙"]),
        ("   abcdefghij", ["  ", "abcdefgh", "ij"]),
        ("abcdefgh", ["abcdefgh"]),
        ("", [""]),
    ],
)
def test_a_long_line_is_cut_at_a_blank_or_a_letter(line, parts):
    long = Counter()
    assert list(train_tokenizer.bounded(["x", line], 8, long)) == ["x", *parts]
    assert long["lines"] == (len(line.encode()) > 8)


@given(st.text("ab é漢🦙\0"), st.integers(4, 9))
def test_nothing_is_lost_of_a_long_line_but_blanks(line, size):
    parts = list(train_tokenizer.bounded([line], size, Counter()))
    assert max(len(part.encode()) for part in parts) <= size
    assert "".join(parts).replace(" ", "") == line.replace(" ", "")
    assert line.count(" ") - sum(part.count(" ") for part in parts) <= len(parts) - 1


def test_text_of_long_lines_has_its_letters_in_the_vocabulary(tmp_path, capsys):
    greek = "μῆνιν ἄειδε θεὰ Πηληϊάδεω Ἀχιλῆος "
    (tmp_path / "a.txt").write_text(greek * 2000 + "\n" + "a short line\n" * 50)
    pieces = "".join(pieces_of(train_tokenizer.train([str(tmp_path / "a.txt")], 320)))
    assert set(greek) - {" "} <= set(pieces)
    assert capsys.readouterr().err == "1 lines of more than 4,192 bytes were cut for sentencepiece\n"
