import errno
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from limits import files_up_to
from packed import add

from tinyllama import atomic
from tinyllama.data.packed import ShardWriter, write_manifest
from tinyllama.prepare.inputs import ENDINGS, Fields, find_inputs
from tinyllama.prepare.prepare import Options, prepare

ROOT = Path(__file__).parents[1]
FACTS = {"tokenizer_sha256": "ab" * 32, "encoder": "none", "bos": False, "eos": True, "bos_id": 1, "eos_id": 2}


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """What is asked of the disk in order: what a file held when it was synced, the folders synced, the new names."""
    asked: list[tuple] = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        asked.append(("folder", path) if path.is_dir() else ("sync", path, path.read_bytes()))
        real_sync(handle)

    def replace(source, target):
        asked.append(("rename", Path(source), Path(target)))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return asked


def assert_durable(asked: list[tuple], *files: Path) -> None:
    """These files were written in this order, and each so that a power cut at no moment leaves half of it."""
    assert len(asked) == 3 * len(files)
    for file, (sync, rename, folder) in zip(files, zip(*[iter(asked)] * 3, strict=True), strict=True):
        temporary = sync[1]
        assert temporary.name.startswith(f"{file.name}.")
        assert (temporary.suffix, temporary.parent) == (".tmp", file.parent)
        assert sync == ("sync", temporary, file.read_bytes())  # all of it, before it has the name
        assert rename == ("rename", temporary, file)
        assert folder == ("folder", file.parent)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, disk):
    atomic.write(tmp_path / "a.json", b"one")
    assert_durable(disk, tmp_path / "a.json")
    disk.clear()
    atomic.write(tmp_path / "a.json", b"two")
    assert (tmp_path / "a.json").read_bytes() == b"two"
    assert_durable(disk, tmp_path / "a.json")


def test_temporary_names_are_beside_the_file_and_all_different(tmp_path):
    names = [atomic.temporary(tmp_path / "a.json") for _ in range(100)]
    assert len(set(names)) == 100
    assert {path.parent for path in names} == {tmp_path}
    assert all(re.fullmatch(r"a\.json\.[0-9a-f]{8}\.tmp", path.name) for path in names)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch, failing):
    atomic.write(tmp_path / "a.json", b"one")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, failing, fail)
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Input/output error"):
        atomic.write(tmp_path / "a.json", b"two")
    assert len(os.listdir("/proc/self/fd")) == open_files
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.json": b"one"}


@pytest.mark.parametrize("where", ["write", "sync"])
def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path, monkeypatch, where):
    atomic.write(path := tmp_path / "a.json", b"old")

    def fail(handle):
        raise OSError(errno.ENOSPC, "No space left on device")  # as with NFS, which writes then

    if where == "sync":
        monkeypatch.setattr(os, "fsync", fail)
    with files_up_to(3 if where == "write" else 1000), pytest.raises(OSError, match=str(path)) as caught:
        atomic.write(path, b"newer")
    number = errno.EFBIG if where == "write" else errno.ENOSPC
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    with pytest.raises(FileNotFoundError) as missing:
        atomic.write(tmp_path / "none" / "a.json", b"new")
    assert missing.value.filename == str(tmp_path / "none" / "a.json")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.json", b"old")]


def test_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "link").symlink_to("/dev/null")  # rename would put a file in the place of the link
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(FileExistsError, match="it is there and is not a file") as error:
            atomic.write(path, b"")
        assert error.value.filename == str(path)
    assert (tmp_path / "link").is_symlink()


def test_no_handle_is_left_open(tmp_path):
    open_files = len(os.listdir("/proc/self/fd"))
    atomic.write(tmp_path / "a", b"")
    atomic.sync(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_shard_is_on_the_disk_before_it_is_done_and_before_it_is_listed(tmp_path, disk):
    with ShardWriter(tmp_path, "a", 100) as writer:
        add(writer, [1, 2, 3])
        writer.finish(**FACTS)
    assert_durable(disk, tmp_path / "a.idx.npy", tmp_path / "a.bin", tmp_path / "a.json")
    assert (tmp_path / "a.bin").read_bytes() == bytes([1, 0, 2, 0, 3, 0])
    disk.clear()
    write_manifest(tmp_path, ["a"])
    assert_durable(disk, tmp_path / "manifest.json")


def test_the_mark_of_a_bad_input_is_on_the_disk(tmp_path, disk, tokenizer_file, one_process):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "in" / "b.jsonl").write_text("{")
    output = tmp_path / "out"
    options = Options(tokenizer_file, output, encoder="sentencepiece", skip_bad_files=1)
    prepare(find_inputs(tmp_path / "in", ENDINGS), Fields(), options)
    shard = [output / f"a.jsonl.{ending}" for ending in ("idx.npy", "bin", "json")]
    assert_durable(disk, *shard, output / "b.jsonl.bad", output / "manifest.json")


def run(monkeypatch, script: str, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    assert not end.value.code


def test_a_corpus_is_on_the_disk_before_its_mark(tmp_path, disk, monkeypatch):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "a.py").write_text("a = 1\n")
    run(monkeypatch, "quickstart_corpus", "--output", tmp_path / "out", "--library", tmp_path / "library")
    written = [entry[2].relative_to(tmp_path / "out").as_posix() for entry in disk if entry[0] == "rename"]
    assert [name.split("/")[0] for name in written] == [
        *(["slimpajama"] * 4 + ["starcoder"] * 2 + ["slimpajama", "starcoder_validation"]),
        "corpus.json",
    ]
    assert_durable(disk, *(tmp_path / "out" / name for name in written))
    assert json.loads((tmp_path / "out" / "corpus.json").read_bytes())["library"] == str(tmp_path / "library")


def test_a_tokenizer_is_on_the_disk(tmp_path, disk, monkeypatch, tokenizer_file):
    (tmp_path / "a.txt").write_text("The little llama walked along the river.\n" * 20)
    output = tmp_path / "new" / "tokenizer.model"
    run(monkeypatch, "train_tokenizer", "--source", tmp_path / "a.txt", "--output", output, "--vocab_size", 290)
    assert_durable(disk, output)
