"""What is packed again: an input whose bytes changed, to whatever size and with whatever time; none that did not."""

import contextlib
import io
import json
import os
from pathlib import Path

import pyarrow
import pytest
import zstandard
from packed import change
from pyarrow import parquet

from tinyllama import InputError
from tinyllama.data.metadata import hash_file
from tinyllama.data.packed import open_packed
from tinyllama.prepare import done
from tinyllama.prepare.inputs import ENDINGS, Fields, find_inputs
from tinyllama.prepare.prepare import Options, prepare
from tinyllama.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_process")
BEFORE, AFTER = "the llama eats", "the llama runs"


def content(name: str, text: str) -> bytes:
    """A file of one document, as large for one text as for the other."""
    line = json.dumps({"text": text}).encode() + b"\n"
    if name.endswith(".txt"):
        return text.encode()
    if name.endswith(".zst"):
        return zstandard.ZstdCompressor(write_content_size=False).compress(line)
    if name.endswith(".parquet"):
        buffer = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": [text]}), buffer, compression="none", use_dictionary=False)
        return buffer.getvalue()
    return line


NAMES = ["a.jsonl", "b.jsonl.zst", "c.parquet", "d.txt"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name in NAMES:
        (tmp_path / "in" / name).write_bytes(content(name, BEFORE))
    return tmp_path / "in"


@pytest.fixture
def pack(source: Path, tmp_path: Path, tokenizer_file: Path):
    def pack(url: str = "", fields: Fields | None = None, output: str = "out", **options: object) -> str:
        settings = {"encoder": "sentencepiece", "workers": 2} | options
        inputs = find_inputs(url or source, ENDINGS)
        return prepare(inputs, fields or Fields(), Options(tokenizer_file, tmp_path / output, **settings))

    return pack


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the inputs that were read to be compared."""
    names: list[str] = []

    def watched(path: Path) -> str:
        names.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(done, "hash_file", watched)
    return names


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(path: Path) -> None:
    """Change the content, and neither the size nor the time of modification."""
    old = path.stat()
    path.write_bytes(content(path.name, AFTER))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)


@pytest.mark.parametrize("name", NAMES)
def test_an_input_edited_to_the_same_size_is_packed_again(
    pack, read, source: Path, tmp_path: Path, tokenizer_file: Path, name: str
) -> None:
    pack()
    edit(source / name)
    assert "4 shards (1 new)" in pack()
    assert read == [name]
    dataset, tokenizer = open_packed(tmp_path / "out"), Tokenizer(tokenizer_file)
    expected = [AFTER if one == name else BEFORE for one in NAMES]
    assert dataset.read(0, dataset.tokens).tolist() == [i for text in expected for i in [*tokenizer.encode(text), 2]]
    pack(output="fresh")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
    assert "4 shards (0 new)" in pack()
    assert read == [name]


def test_an_input_that_is_only_touched_is_read_once_and_kept(pack, read, source: Path, tmp_path: Path, capsys) -> None:
    pack()
    before = files(tmp_path / "out")
    assert "4 shards (0 new)" in pack()
    assert read == []
    (source / "a.jsonl").touch()
    (source / "d.txt").chmod(0o600)
    capsys.readouterr()
    for _ in range(2):
        assert "4 shards (0 new)" in pack()
        assert sorted(read) == ["a.jsonl", "d.txt"]
    said = "comparing 2 inputs (0.0 GB) that may have changed since they were packed\n"
    assert capsys.readouterr().err == said
    assert files(tmp_path / "out") == before


def test_a_shard_of_before_there_was_a_time_is_compared_once(pack, read, source: Path, tmp_path: Path) -> None:
    pack()
    shards = [tmp_path / f"out/{name}.json" for name in NAMES]
    for path in shards:
        change(path)  # rewrites it as an earlier version did, now
    before = files(tmp_path / "out")
    edit(source / "c.parquet")
    assert "4 shards (1 new)" in pack()
    assert sorted(read) == NAMES
    assert "4 shards (0 new)" in pack()
    assert sorted(read) == NAMES
    changed = {name for name, payload in files(tmp_path / "out").items() if payload != before[name]}
    assert changed == {"manifest.json", *(f"c.parquet.{kind}" for kind in ("bin", "idx.npy", "json"))}


def test_tasks_compare_their_own_inputs_and_finish_refuses_a_changed_one(pack, read, source: Path, tmp_path) -> None:
    for task in range(2):
        pack(task=(task, 2))
    pack(finish=True)
    for name in NAMES[:2]:
        edit(source / name)
    with pytest.raises(InputError) as error:
        pack(finish=True)
    said = f"{tmp_path}/out: 2 of 4 shards are missing (a.jsonl, b.jsonl.zst): run the tasks that make them first"
    assert str(error.value) == said
    read.clear()
    assert "2 shards (1 new)" in pack(task=(0, 2))
    assert read == ["a.jsonl"]
    assert not (tmp_path / "out/manifest.json").exists()
    assert "2 shards (1 new)" in pack(task=(1, 2))
    read.clear()
    assert "4 shards (0 new)" in pack(finish=True)
    assert read == []


def test_no_document_is_in_both_parts_after_an_edit(pack, source: Path, tmp_path: Path) -> None:
    path, count = source / "e.jsonl", 200
    for name in NAMES:
        (source / name).unlink()
    path.write_text("".join(json.dumps({"text": f"{i:03}"}) + "\n" for i in range(count)))
    parts = {"train": Fields(held_out=0.5, seed=1), "val": Fields(fraction=0.5, seed=1)}
    pack(fields=parts["train"], output="train")
    path.write_text("".join(json.dumps({"text": f"{i:03}"}) + "\n" for i in reversed(range(count))))
    read = {}
    for output, fields in parts.items():
        pack(fields=fields, output=output)
        dataset = open_packed(tmp_path / output)
        ids = dataset.read(0, dataset.tokens).tolist()
        read[output] = "".join(" " if i == 2 else f"{i}," for i in ids).split()
    assert not set(read["train"]) & set(read["val"])
    assert len(read["train"]) + len(read["val"]) == count


def test_what_is_at_a_url_is_not_fetched_to_be_compared(pack, read, source: Path, tmp_path: Path, monkeypatch) -> None:
    url = f"file://{source}"
    pack(url)
    edit(source / "a.jsonl")
    monkeypatch.setattr("tinyllama.prepare.inputs.Input.fetched", lambda self: pytest.fail("fetched"))
    assert "4 shards (0 new)" in pack(url)
    assert read == []


@pytest.mark.parametrize(
    ("there", "wanted", "same"),
    [
        (1_700_000_000_123_456_789, 1_700_000_000_123_456_789, True),
        (1_700_000_000_123_456_789, 1_700_000_000_123_456_790, False),
        (1_700_000_001_000_000_000, 1_700_000_001_999_999_999, True),  # of a file system that keeps seconds
        (1_700_000_000_123_456_000, 1_700_000_000_123_456_999, True),  # or microseconds
        (1_700_000_000_123_456_000, 1_700_000_000_123_457_000, False),
        (1_700_000_010_000_000_000, 1_700_000_011_000_000_000, False),
    ],
)
def test_as_much_of_the_time_as_is_kept_is_compared(tmp_path: Path, there: int, wanted: int, same: bool) -> None:
    path = tmp_path / "a"
    path.touch()
    os.utime(path, ns=(there, there))
    assert path.stat().st_mtime_ns == there
    assert done._has_time(path, wanted) is same


def test_the_time_of_another_users_shard_cannot_be_set(pack, read, source: Path, tmp_path: Path, monkeypatch) -> None:
    pack()
    (source / "a.jsonl").touch()

    def utime(*args: object, **times: object) -> None:
        raise PermissionError

    monkeypatch.setattr(done.os, "utime", utime)
    for count in (1, 2):
        assert "4 shards (0 new)" in pack()
        assert read == ["a.jsonl"] * count


def test_an_input_that_changes_while_it_is_read_is_not_done(pack, source: Path, tmp_path: Path, monkeypatch) -> None:
    from tinyllama.prepare import prepare as module

    real, path = module._write, source / "c.parquet"

    def write(writer, chunks, recipe, one):
        figures = real(writer, chunks, recipe, one)
        if one.name == path.name:
            path.write_bytes(content(path.name, AFTER))
            os.utime(path, (1, 1))
        return figures

    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(module, "_write", write)
        error = stack.enter_context(pytest.raises(InputError))
        pack()
    said = f"{path}: changed while it was being read: run again when it is complete, what is done is kept"
    assert str(error.value) == said
    assert not (tmp_path / "out/c.parquet.json").exists()
    assert "4 shards (1 new)" in pack()
    pack(output="fresh")
    assert files(tmp_path / "out") == files(tmp_path / "fresh")
