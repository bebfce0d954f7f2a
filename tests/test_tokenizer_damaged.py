"""Damaged and hostile tokenizers end in one error that names the file: no traceback, no abort, no hang, no noise."""

import copy
import io
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from generated_tokenizers import write

from tinyllama import InputError, tokenizer_trial
from tinyllama.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
VALUES = [
    None,
    -1,
    0,
    2**32 - 1,
    2**63,
    1e308,
    "",
    "</s>",
    "a" * 100_000,
    [],
    {},
    True,
    [[]],
    "(a+)+$",
    {"a": 2**32 - 1},
]
JSON_KINDS = ["byte-level", "byte fallback", "unigram", "wordpiece", "wordlevel"]


def paths(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every field, of long lists and vocabularies only of some."""
    if path:
        yield path
    if isinstance(content, dict | list):
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        for key in keys if len(keys) < 20 else [*keys[:2], keys[-1]]:
            yield from paths(content[key], (*path, key))


def damaged_json(content: dict) -> Iterator[bytes]:
    for path in paths(content):
        for value in VALUES:
            damaged = copy.deepcopy(content)
            place: Any = damaged
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            yield json.dumps(damaged).encode()


def damaged_bytes(content: bytes, places: list[int], rng: random.Random) -> Iterator[bytes]:
    for place in places:
        for value in (0, 1, 8, 10, 18, 127, 128, 254, 255, rng.randrange(256)):
            yield content[:place] + bytes([value]) + content[place + 1 :]
        yield content[:place]


def try_all(versions: list[bytes], file: Path, capfd: pytest.CaptureFixture[str]) -> int:
    """Read each version, and encode if it can be read; returns how many were refused."""
    refused, fails = 0, []
    for content in versions:
        file.write_bytes(content)
        try:
            tokenizer = Tokenizer(file)
        except InputError as error:
            refused += 1
            (line,) = error.args
            assert str(file) in line
            assert "\n" not in line
            assert capfd.readouterr().err == "", line
            continue
        for text in ("", "a the </s> llama\n", "漢字 é 123", *itertools.islice(tokenizer.hard_texts(), 3)):
            try:
                tokenizer.decode(tokenizer.encode(text))
            except InputError as error:
                fails.append(str(error))
    assert all(f"tokenizer {file} fails on " in line for line in fails)
    return refused


@pytest.fixture
def model(tmp_path) -> bytes:
    """A model of 900 bytes, with a piece of every type."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the little llama walked along the river 123"] * 20),
        model_writer=made,
        model_type="bpe",
        vocab_size=60,
        hard_vocab_limit=False,
        user_defined_symbols=["<|x|>"],
        control_symbols=["<pad>"],
        normalization_rule_name="identity",
        minloglevel=5,
    )
    return made.getvalue()


@pytest.fixture
def short_trials(monkeypatch):
    monkeypatch.setattr(tokenizer_trial, "SECONDS", 1)


@pytest.mark.usefixtures("short_trials")
@pytest.mark.parametrize("kind", JSON_KINDS)
def test_fields_of_a_tokenizer_json(kind, tmp_path, capfd):
    content = json.loads(write(kind, random.Random(kind), tmp_path).read_bytes())
    versions = random.Random(1).sample(list(damaged_json(content)), 25)
    assert try_all(versions, tmp_path / "tokenizer.json", capfd) > 5


def test_bytes_of_a_model(model, tmp_path, capfd):
    rng = random.Random(0)
    versions = list(damaged_bytes(model, rng.sample(range(len(model)), 40), rng))
    assert try_all(versions, tmp_path / "tokenizer.model", capfd) > 100


@pytest.mark.slow
@pytest.mark.usefixtures("short_trials")
@pytest.mark.parametrize("kind", JSON_KINDS)
def test_many_fields_of_a_tokenizer_json(kind, tmp_path, capfd):
    content = json.loads(write(kind, random.Random(kind), tmp_path).read_bytes())
    versions = list(damaged_json(content))[::3]  # all of them take minutes
    assert try_all(versions, tmp_path / "tokenizer.json", capfd) > len(versions) // 2


@pytest.mark.slow
def test_many_bytes_of_a_model(model, tmp_path, capfd):
    versions = list(damaged_bytes(model, list(range(0, len(model), 5)), random.Random(0)))
    assert try_all(versions, tmp_path / "tokenizer.model", capfd) > len(versions) // 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", JSON_KINDS)
def test_bytes_of_a_tokenizer_json(kind, tmp_path, capfd):
    rng = random.Random(kind)
    content = write(kind, rng, tmp_path).read_bytes()
    versions = list(damaged_bytes(content, rng.sample(range(len(content)), 50), rng))
    assert try_all(versions, tmp_path / "tokenizer.json", capfd) > len(versions) // 4


def split_by(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaaaaaaaa"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.usefixtures("short_trials")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}}, "out of bounds"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////fw=="}}, ""),  # asks for gigabytes
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "a"}}, "out of bounds"),
        ({"normalizer": {"type": "Sequence", "normalizers": [GROWS] * 12}}, "more than 1 s or 2 GB"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 40}}, "more than 1 s or 2 GB"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "must be non-zero"),
        ({"pre_tokenizer": split_by(r"(x+x+)+y")}, "retry-limit"),
        ({"pre_tokenizer": split_by("(" * 50_000)}, "parse depth"),
        ({"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 2**63}}, "out of bounds"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, "'a' and 'b' have the id 0"),
        ({"model": {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}}, "'a' has the id 4294967295"),
        (
            {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []},
            " with a vocabulary",
        ),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}}, "UnkIdNotInVocabulary"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}}, "out of range"),
    ],
)
def test_what_aborts_panics_hangs_or_fills_the_memory(changes, reason, tmp_path, capfd):
    file = write("byte-level", random.Random(0), tmp_path)
    file.write_text(json.dumps(json.loads(file.read_bytes()) | changes))
    with pytest.raises(InputError, match=rf"{file} is not a tokenizer.json.*{reason}") as error:
        Tokenizer(file)
    assert len(error.value.args) == 1
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_text_that_the_library_fails_on_is_an_error_of_that_text(tmp_path):
    file = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}  # which is not in the vocabulary
    file.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    tokenizer = Tokenizer(file)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(InputError, match=rf"{file} fails on 'b': .*: use another tokenizer"):
        tokenizer.encode("b")
    with pytest.raises(InputError, match=rf"{file} fails on 'b'"):
        tokenizer.encode_utf8(b"b")


def test_a_file_is_tried_once_and_only_if_it_has_what_may_fail(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(tokenizer_trial, "_try", lambda payload: tried.append(payload) or "")
    file = write("byte-level", random.Random("plain"), tmp_path)
    content = json.loads(file.read_bytes()) | {"normalizer": None, "pre_tokenizer": BYTES, "decoder": {"type": "Fuse"}}
    file.write_text(json.dumps(content))
    Tokenizer(file)
    assert tried == []
    file.write_text(json.dumps(content | {"pre_tokenizer": split_by(r"\w+|\W")}))
    known = Tokenizer(file, known_sha256=Tokenizer(file).sha256)
    assert len(tried) == 1
    monkeypatch.setattr(tokenizer_trial, "_tried", {})
    Tokenizer(file, known_sha256=known.sha256)
    assert len(tried) == 1
    Tokenizer(file, known_sha256="0" * 64)
    assert len(tried) == 2


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder.model").mkdir()
    (tmp_path / "denied").symlink_to("/dev/null/tokenizer.model")
    (tmp_path / "loop.json").symlink_to("loop.json")
    os.mkfifo(tmp_path / "tokenizer.model")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, Path("/dev/null")):
        with pytest.raises(InputError, match=r"is not a file: give a sentencepiece .model or a tokenizer.json"):
            Tokenizer(path)
    for path in (
        tmp_path / "folder.model",
        tmp_path / "denied",
        tmp_path / "loop.json",
        "a\0b",
        tmp_path / ("a" * 300),
    ):
        with pytest.raises(InputError, match=r"give a sentencepiece|give a file"):
            Tokenizer(path)


def test_a_pipe_in_the_place_of_the_config(tmp_path):
    write("byte-level", random.Random(0), tmp_path)
    os.mkfifo(tmp_path / "tokenizer_config.json")
    with pytest.raises(InputError, match=r"tokenizer_config.json is not JSON \(a pipe or a device\)"):
        Tokenizer(tmp_path)


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError, match=r"tokenizer.json has more than 512 MB: give another file"):
        Tokenizer(tmp_path)


def test_a_command_says_one_line(tmp_path):
    file = write("byte-level", random.Random(0), tmp_path)
    panics = {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"normalizer": panics}))
    (tmp_path / "a.txt").write_text("a text")
    command = [sys.executable, ROOT / "scripts/prepare_text.py", "--source", tmp_path / "a.txt", "--tokenizer", file]
    done = subprocess.run([*command, "--output", tmp_path / "out"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {file} is not a tokenizer.json (")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
