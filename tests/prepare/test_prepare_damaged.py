"""A preparation started again in an output folder whose files are damaged, or are no files: one line, exit 2."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from packed import change

from tinyllama.data.packed import open_packed

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def prepare(tmp_path: Path, tokenizer_file: Path, script) -> Callable[..., tuple[int, list[str]]]:
    """A function that prepares two inputs into out/ and returns the exit code and the lines of stderr."""
    (tmp_path / "in").mkdir()
    for name in "ab":
        (tmp_path / f"in/{name}.jsonl").write_text(json.dumps({"text": f"the llama {name}"}) + "\n")
    where = ["--source", tmp_path / "in", "--tokenizer", tokenizer_file, "--output", tmp_path / "out"]

    def run(*flags: object) -> tuple[int, list[str]]:
        code, _, err = script("prepare_text", *where, "--encoder", "sentencepiece", *flags)
        return code, err.splitlines()

    return run


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "json of another eos": ("a.jsonl.json", lambda path: path.write_text(path.read_text().replace('": 2,', '": 3,'))),
    "empty json": ("a.jsonl.json", lambda path: path.write_text("")),
    "json that is a pipe": ("a.jsonl.json", lambda path: (path.unlink(), os.mkfifo(path))),
    "index that is a pipe": ("a.jsonl.idx.npy", lambda path: (path.unlink(), os.mkfifo(path))),
    "index of another shape": (
        "a.jsonl.idx.npy",
        lambda path: path.write_bytes(path.read_bytes().replace(b"(1,)", b"(9,)")),
    ),
    "tokens that are a folder": ("a.jsonl.bin", lambda path: (path.unlink(), path.mkdir())),
    "tokens that are a pipe": ("a.jsonl.bin", lambda path: (path.unlink(), os.mkfifo(path))),
    "tokens that are a device": ("a.jsonl.bin", lambda path: (path.unlink(), path.symlink_to("/dev/zero"))),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_shard_is_named_and_made_anew_as_the_line_says(prepare, tmp_path: Path, case: str) -> None:
    assert prepare()[0] == 0
    right = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    name, damage = DAMAGE[case]
    damage(tmp_path / "out" / name)
    code, (line,) = prepare()
    assert code == 2
    assert line.startswith(f"error: {tmp_path / 'out' / name} ")
    assert line.endswith("delete a.jsonl.json and rerun the prepare command")
    (tmp_path / "out/a.jsonl.json").unlink()
    if os.path.lexists(tmp_path / "out" / name) and not (tmp_path / "out" / name).is_file():  # not overwritten
        remove = os.rmdir if (tmp_path / "out" / name).is_dir() else os.remove
        remove(tmp_path / "out" / name)
    assert prepare()[0] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == right


def compact(whole: bytes) -> bytes:
    return json.dumps(json.loads(whole) | {"shards": []}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: b"{}",
        lambda whole: b"\0" * len(whole),
        lambda whole: whole[:5],
        lambda whole: whole[:20],
        lambda whole: whole[:-20],
        lambda whole: whole.replace(b"bos", b"\xff\0s"),
        compact,
    ],
)
def test_a_damaged_manifest_is_made_anew(prepare, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    prepare()
    manifest = tmp_path / "out/manifest.json"
    whole = manifest.read_bytes()
    manifest.write_bytes(damage(whole))
    assert prepare()[0] == 0
    assert manifest.read_bytes() == whole


@pytest.mark.parametrize("name", ["manifest.json", ".lock"])
@pytest.mark.parametrize("place", [os.mkfifo, os.mkdir])
def test_what_stands_in_the_place_of_a_file_to_write_is_named(prepare, tmp_path: Path, name: str, place) -> None:
    prepare()
    path = tmp_path / "out" / name
    path.unlink(missing_ok=True)
    place(path)
    code, (line,) = prepare()
    assert code == 2
    assert line.startswith(f"error: cannot write {path} (it is there and is not a file): ")


FOREIGN = {
    "a web page's manifest": ("manifest.json", '{"name": "llama", "short_name": "l", "icons": []}'),
    "another tool's shards": ("manifest.json", '{"shards": []}'),
    "a list": ("manifest.json", '["a.jsonl", "b.jsonl"]'),
    "no JSON": ("manifest.json", "# files of the corpus\n"),
    "raw data": ("a.jsonl.json", '{"text": "the llama"}\n{"text": "runs"}\n'),
    "a note": ("b.jsonl.json", "checked by hand\n"),
    "a program": ("a.jsonl.bin", "\x7fELF"),
    "a list of bad lines": ("b.jsonl.bad", "line 17\n"),
}


@pytest.mark.parametrize("flags", [(), ("--task", "0/1")])
@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_of_another_program_is_named_and_nothing_is_written(prepare, tmp_path: Path, case: str, flags) -> None:
    name, content = FOREIGN[case]
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.write_text(content)
    code, lines = prepare(*flags)
    said = f"error: {path} was not written by a prepare command: move it away, or give another --output"
    assert (code, lines) == (2, [said])
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {name: content}
    path.unlink()
    assert prepare(*flags)[0] == 0


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.csv"])
def test_the_folder_of_a_run_takes_no_packed_data(prepare, tmp_path: Path, name: str) -> None:
    """A run would not resume among them."""
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("of a run\n")
    assert prepare() == (2, [f"error: {out} is the folder of a run ({name}): give another --output"])
    assert {path.name: path.read_text() for path in out.iterdir()} == {name: "of a run\n"}


def test_another_programs_manifest_is_not_replaced_by_finish(prepare, tmp_path: Path) -> None:
    assert prepare("--task", "0/1")[0] == 0
    manifest = tmp_path / "out/manifest.json"
    manifest.write_text('{"name": "llama"}')
    assert prepare("--finish")[0] == prepare()[0] == 2
    assert manifest.read_text() == '{"name": "llama"}'


@pytest.mark.parametrize("ending", ["bin", "idx.npy", "bad"])
@pytest.mark.parametrize("place", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_named_before_anything_is_written(prepare, tmp_path: Path, ending: str, place) -> None:
    path = tmp_path / f"out/b.jsonl.{ending}"
    path.parent.mkdir()
    place(path)
    code, (line,) = prepare()
    assert (code, line.partition(": give")[0]) == (2, f"error: cannot write {path} (it is there and is not a file)")
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_in_the_place_of_a_shards_metadata_is_not_to_be_deleted(prepare, tmp_path: Path) -> None:
    path = tmp_path / "out/a.jsonl.json"
    path.mkdir(parents=True)
    code, (line,) = prepare()
    assert (code, line.partition(": ")[2]) == (
        2,
        f"{path} was not written by a prepare command: move it away, or give another --output",
    )


def test_a_bad_input_is_tried_again_where_its_mark_is(prepare, tmp_path: Path) -> None:
    whole = (tmp_path / "in/b.jsonl").read_bytes()
    (tmp_path / "in/b.jsonl").write_text("{")
    assert [prepare()[0], prepare()[0]] == [2, 2]
    assert (tmp_path / "out/b.jsonl.bad").read_text().startswith(str(tmp_path / "in/b.jsonl"))
    (tmp_path / "in/b.jsonl").write_bytes(whole)
    assert prepare()[0] == 0
    assert not (tmp_path / "out/b.jsonl.bad").exists()


def test_what_a_task_says_of_a_bad_input_may_be_damaged(prepare, tmp_path: Path) -> None:
    (tmp_path / "in/b.jsonl").write_text("{")
    assert prepare("--task", "0/1")[0] == 2
    bad = tmp_path / "out/b.jsonl.bad"
    bad.write_bytes(b"\xff\n\x1b[2J")
    code, (line,) = prepare("--finish")
    assert (code, line) == (2, "error: \ufffd\\n\\x1b[2J")
    bad.unlink()
    os.mkfifo(bad)
    code, (line,) = prepare("--finish")
    assert (code, line) == (2, f"error: {bad} cannot be read (not a regular file): delete it and rerun its task")


def test_a_folder_of_before_there_was_a_hash_is_finished(prepare, tmp_path: Path) -> None:
    prepare()
    for path in (tmp_path / "out").glob("*.json"):
        change(path)
    tokens = open_packed(tmp_path / "out").tokens
    assert prepare()[0] == 0
    assert open_packed(tmp_path / "out").tokens == tokens
    assert "metadata_blake2b" in (tmp_path / "out/manifest.json").read_text()
    assert "metadata_blake2b" not in (tmp_path / "out/a.jsonl.json").read_text()  # it was done
