"""Damage to a packed folder, by a generator: each try is refused in one line, or reads as what was written."""

import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed import POLICY, add, change, write_shard

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.data.metadata import read_manifest, read_shard_info, seal, to_json
from tinyllama.data.packed import ShardWriter, check_datasets, open_packed, write_manifest
from tinyllama.prepare.done import METADATA
from tinyllama.prepare.inspection import inspect_packed

JSON = ("manifest.json", "a.json")
INDEX = "a.idx.npy"
SUBSETS = {"C4": {"documents": 2, "tokens": 5, "bytes": 20, "documents_over_2048": 0, "tokens_over_2048": 0}}
MORE = {"source": {"name": "a", "bytes": 30}, "subsets": SUBSETS, "dropped": {"fraction": 1}, "repaired": 0}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of a few tokens, and their manifest, as prepare writes them."""
    folder = tmp_path_factory.mktemp("written")
    write_shard(folder, "a", [[5, 6, 2], [7, 2]], **MORE)
    write_shard(folder, "b", [[8, 2]], **MORE)
    write_manifest(folder, ["a", "b"], subsets=SUBSETS | {"other": {"documents": 1, "tokens": 2, "bytes": 5}})
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "packed"))


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A reader that waits is interrupted, and its test fails."""

    def interrupt(number: int, frame: object) -> None:
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(500)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def content(folder: Path) -> Any:
    """All that training, an inspection and a restarted preparation take from the folder."""
    dataset = open_packed(folder)
    check_datasets([dataset], vocab_size=100, block_size=1)
    figures = inspect_packed(folder)
    infos = [read_shard_info(folder, name, METADATA) for name in "ab"]
    values = [dataset.read(0, dataset.tokens).tolist(), {**vars(dataset), "_file": 0, "path": 0}, figures]
    return [str(value) for value in (*values, *map(known, (*infos, read_manifest(folder))))]


def known(info: dict[str, Any] | None) -> Any:
    """What somebody reads of it: without keys that a damaged byte has made up, and without its hash."""
    assert info is not None
    keys = {"dtype", "vocab_size", "shards", "name", "tokens", "documents", "max_token", "blake2b", *POLICY, *MORE}
    return sorted((key, str(info[key])) for key in keys & info.keys())


class Tally:
    """Counts the tries, and what came of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.right = folder, content(folder)
        self.tries, self.refused, self.wrong = 0, 0, []

    def take(self, what: object) -> None:
        self.tries += 1
        why = refusal(self.folder)
        if why is not None:
            self.refused += 1
        elif content(self.folder) != self.right:
            self.wrong.append(what)

    def __str__(self) -> str:
        same = self.tries - self.refused - len(self.wrong)
        return f"{self.tries} tries: {self.refused} refused, {same} read as written, {len(self.wrong)} believed"


def refusal(folder: Path) -> str | None:
    """Why the folder is refused; None if it is read."""
    try:
        content(folder)
    except InputError as error:
        for line in error.args:
            assert str(folder) in line
            assert "\n" not in line
            assert len(line) < 6000
        return str(error)
    return None


def bytes_damaged(folder: Path, name: str, stride: int, values: int) -> Iterator[tuple[str, int, int]]:
    """Put other values, a flipped bit first, at every ``stride``-th byte of a file, one after the other."""
    rng = random.Random(5)
    whole = (folder / name).read_bytes()
    for at in range(rng.randrange(stride), len(whole), stride):
        flipped = whole[at] ^ 1 << rng.randrange(8)
        others = rng.sample([value for value in range(256) if value not in (whole[at], flipped)], values - 1)
        for value in (flipped, *others):
            (folder / name).write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            yield name, at, value
    (folder / name).write_bytes(whole)


def check_bytes(folder: Path, stride: int, values: int) -> Tally:
    tally = Tally(folder)
    for name in JSON:
        for what in bytes_damaged(folder, name, stride, values):
            tally.take(what)
    assert tally.wrong == []
    assert refusal(folder) is None
    return tally


def test_a_damaged_byte_is_refused_or_harmless(folder: Path) -> None:
    tally = check_bytes(folder, stride=17, values=2)
    assert tally.tries > 180
    assert tally.refused > 0.7 * tally.tries  # the rest is indentation, and the key of the hash


@pytest.mark.slow
def test_every_damaged_byte_is_refused_or_harmless(folder: Path) -> None:
    tally = check_bytes(folder, stride=1, values=10)
    print(tally)
    assert tally.tries > 15_000
    assert tally.refused > 0.7 * tally.tries


VALUES: tuple[Any, ...] = (
    None,
    True,
    -2,
    1.5,
    3,
    "x\x00",
    "../b",
    "/etc/passwd",
    "\ud800",
    "",
    [],
    {},
    2**63,
    10**400,
    math.nan,
    {"a": 1},
    "y" * 9999,
)


def fields_changed(value: Any, values: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield ``value`` with each field of it, at any depth, removed and changed to each of ``values``, and where."""
    if not isinstance(value, dict | list):
        return
    for key in value if isinstance(value, dict) else range(len(value)):
        copy = value.copy()
        del copy[key]
        yield (key, "removed"), copy
        for other in (*values, *fields_changed(value[key], values)):
            where, changed = other if isinstance(other, tuple) else ((other,), other)
            copy = value.copy()
            copy[key] = changed
            yield (key, *where), copy


def check_fields(folder: Path, write: Callable[[dict[str, Any]], bytes]) -> Tally:
    """Change every field of both files, and write what comes of it by ``write``."""
    tally = Tally(folder)
    for name in JSON:
        whole = (folder / name).read_bytes()
        for where, changed in fields_changed(json.loads(whole), VALUES):
            if to_json(changed) == to_json(json.loads(whole)):
                continue  # no damage
            (folder / name).write_bytes(write(changed))
            tally.take((name, *where))
        (folder / name).write_bytes(whole)
    return tally


def test_every_changed_field_is_refused(folder: Path) -> None:
    tally = check_fields(folder, to_json)
    print(tally)
    assert tally.tries > 900
    assert tally.wrong == []
    assert tally.tries - tally.refused <= 2  # the hash alone is removed, as from a file of before there was one


def without_hash(value: dict[str, Any]) -> dict[str, Any]:
    return {key: field for key, field in value.items() if key != "metadata_blake2b"}


@pytest.mark.parametrize("write", [lambda value: value, lambda value: seal(value)], ids=["of before", "forged"])
def test_a_field_that_contradicts_the_others_is_refused_without_a_hash(folder: Path, write) -> None:
    tally = check_fields(folder, lambda value: to_json(write(without_hash(value))))
    print(tally)
    assert tally.tries > 900
    # what is believed could have been written: it is optional, free text, or a number that nothing else tells
    free = {"bos", "eos", "bos_id", "eos_id", "tokenizer_sha256", "encoder", "vocab_size"}
    assert {path[0] for name, *path, _ in tally.wrong if name == "manifest.json"} <= free | {"subsets", "shards"}
    # the largest token is that of the other shard
    assert {tuple(path) for _, *path, _ in tally.wrong if path[0] == "shards"} == {("shards", 0, "max_token")}
    told_by_the_manifest = {"max_token", "blake2b"}
    free |= {"subsets", "source", "dropped", "repaired"} | told_by_the_manifest
    assert {path[0] for name, *path, _ in tally.wrong if name == "a.json"} <= free


EMPTY = {
    "nothing": b"",
    "an object": b"{}",
    "a list": b"[]",
    "null": b"null",
    "a number": b"7",
    "a text": b'"x"',
    "zeros": bytes(500),
    "no text": b'{"format_version": "\xff"}',
    "long and no text": b'{"format_version": "\xff' + b"x" * 3000,
    "another encoding": '{"format_version": 1}'.encode("utf-16"),
    "nests": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "a long number": b'{"format_version": ' + b"9" * 6000 + b"}",
}


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("text", EMPTY)
def test_json_that_is_none_of_ours_is_refused(folder: Path, name: str, text: str) -> None:
    (folder / name).write_bytes(EMPTY[text])
    why = refusal(folder) or ""
    assert f"{folder / name} is damaged (" in why
    assert len(why) < len(str(folder)) + 400


def test_shards_without_tokens_hold_nothing_to_read(tmp_path: Path) -> None:
    write_shard(tmp_path, "a", [])
    write_manifest(tmp_path, ["a"])
    with pytest.raises(InputError, match="holds no tokens"):
        open_packed(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["a\x00", "a/../a", "..", ".", "", "/tmp/a", "sub/a", "\ud800", "x" * 300, None, 5, ["a"], {"a": 1}],
    ids=lambda name: ascii(name)[:9],
)
def test_only_plain_names_of_this_folder_are_shards(folder: Path, name: Any) -> None:
    shards = json.loads((folder / "manifest.json").read_bytes())["shards"]
    change(folder / "manifest.json", shards=[shards[0] | {"name": name}, shards[1]])
    with pytest.raises(InputError, match=r"shards\[0\]\.name is missing or of a wrong type or value\): rerun"):
        open_packed(folder)


def test_a_shard_that_is_listed_twice_or_out_of_order_is_refused(folder: Path) -> None:
    one = json.loads((folder / "manifest.json").read_bytes())
    with ShardWriter(folder, "c", 100) as writer:  # of the same tokens, so that the fingerprint tells nothing
        add(writer, [8, 2])
        writer.finish(**POLICY)
    write_manifest(folder, ["b", "c"])
    for names in ("bb", "cb"):
        shards = [one["shards"][1] | {"name": name} for name in names]
        change(folder / "manifest.json", shards=shards)
        with pytest.raises(InputError, match="its shards are not in the order of their names"):
            open_packed(folder)


def test_the_json_of_another_shard_is_refused(folder: Path) -> None:
    shutil.copy(folder / "b.json", folder / "a.json")
    with pytest.raises(InputError, match=r"a.json is damaged \(it is of the shard b\): delete a.json and rerun"):
        read_shard_info(folder, "a")


def header(descr: str = "'<u8'", order: str = "False", shape: str = "(2,)", version: bytes = b"\x01\x00") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text


ENDS = np.array([3, 5], dtype="<u8").tobytes()
INDICES = {
    "a huge shape": header(shape="(1152921504606846976,)") + ENDS,
    "a shape beyond 64 bits": header(shape=f"({10**30},)") + ENDS,
    "two dimensions": header(shape="(2, 1)") + ENDS,
    "no dimension": header(shape="()") + ENDS[:8],
    "a negative shape": header(shape="(-2,)") + ENDS,
    "a shape of text": header(shape="('2',)") + ENDS,
    "objects": header(descr="'|O'") + ENDS,
    "an expression": header(descr="__import__('os')") + ENDS,
    "a type of fields": header(descr="[('a', '<u8')]") + ENDS,
    "big-endian": header(descr="'>u8'") + ENDS,
    "signed": header(descr="'<i8'") + ENDS,
    "floats": header(descr="'<f8'") + np.array([3.0, 5.0]).tobytes(),
    "Fortran's order": header(order="True") + ENDS,
    "another version": header(version=b"\x02\x00") + ENDS,
    "brackets": header(shape="(" * 90) + ENDS,
    "more than it declares": header() + ENDS + b"\0",
    "less than it declares": header() + ENDS[:-1],
    "a header alone": header(),
    "half a header": header()[:60],
    "nothing": b"",
    "a pickle": b"\x80\x04N.",
    "an archive": b"PK\x03\x04" + bytes(100),
}


def test_the_header_is_the_one_numpy_writes(folder: Path) -> None:
    assert (folder / INDEX).read_bytes() == header() + ENDS
    assert np.load(folder / INDEX).tolist() == [3, 5]


@pytest.mark.parametrize("case", INDICES)
def test_an_index_that_is_none_of_ours_is_refused(folder: Path, case: str) -> None:
    (folder / INDEX).write_bytes(INDICES[case])
    with pytest.raises(InputError, match=r"a.idx.npy does not fit its .bin: delete a.json and rerun"):
        read_shard_info(folder, "a")
    with pytest.raises(InputError, match=r"a.idx.npy is missing or does not fit its .bin: delete a.json and rerun"):
        inspect_packed(folder)


@pytest.mark.parametrize("values", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_damaged_byte_of_an_index_is_refused_or_harmless(folder: Path, values: int) -> None:
    tries = refused = 0
    for what in bytes_damaged(folder, INDEX, 1, values):
        tries += 1
        if (folder / INDEX).read_bytes()[128:][8:] != ENDS[8:] or what[1] < 128:
            assert refusal(folder) is not None, what
            refused += 1
        elif refusal(folder) is None:  # the first of two documents ends elsewhere before the end of the second
            assert 0 <= int(np.load(folder / INDEX)[0]) <= 5
        else:
            refused += 1
    print(f"{tries} tries: {refused} refused")
    assert tries == 144 * values


# what may stand in the place of a file, and has no end or no content
PLACES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "a pipe": os.mkfifo,
    "a folder": lambda path: path.mkdir(),
    "a device without an end": lambda path: path.symlink_to("/dev/zero"),
    "a device without content": lambda path: path.symlink_to("/dev/null"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a file of 4 TB": lambda path: (path.touch(), os.truncate(path, 2**42)),
}
FILES = ("manifest.json", "a.json", "a.bin", INDEX)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_refused_in_one_line(folder: Path, script, capsys, name: str, place: str) -> None:
    (folder / name).unlink()
    PLACES[place](folder / name)
    if name == "a.json":  # is read by prepare alone
        if place in ("nothing", "a link to nothing"):
            assert read_shard_info(folder, "a") is None
        else:
            with pytest.raises(InputError, match=r"a.json is damaged \(.*\): delete a.json and rerun"):
                read_shard_info(folder, "a")
        return
    code, out, err = script("inspect_packed", folder)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: {folder / name} ")
    assert "rerun the prepare command" in line
    if name != INDEX:  # is not read in training
        with pytest.raises(SystemExit) as end:
            cli.run(lambda: print(open_packed(folder)))
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {folder / name} ")
    if name != "manifest.json":  # is written anew by prepare
        with pytest.raises(InputError, match=f"{name} .*delete a.json and rerun"):
            read_shard_info(folder, "a")


def test_shards_may_be_links_to_files_elsewhere(folder: Path, tmp_path: Path) -> None:
    right = content(folder)
    for name in ("a.bin", INDEX, "a.json", "manifest.json"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    assert content(folder) == right


def test_a_shard_without_tokens_is_a_file_all_the_same(tmp_path: Path) -> None:
    write_shard(tmp_path, "a", [[1, 2]])
    write_shard(tmp_path, "b", [])
    write_manifest(tmp_path, ["a", "b"])
    (tmp_path / "b.bin").unlink()
    os.mkfifo(tmp_path / "b.bin")
    with pytest.raises(InputError, match=r"b.bin is not a regular file: delete b.json and rerun"):
        open_packed(tmp_path)


@pytest.mark.parametrize("place", list(PLACES)[1:7])
def test_chunk_files_of_upstream_are_files(tmp_path: Path, place: str) -> None:
    PLACES[place](tmp_path / "chunk.bin")
    with pytest.raises(InputError, match=r"chunk.bin cannot be read \(.*\): move it out of the folder"):
        open_packed(tmp_path)


def test_a_folder_of_before_there_was_a_hash_is_read(folder: Path) -> None:
    right = content(folder)
    for name in (*JSON, "b.json"):
        change(folder / name)
        assert "metadata_blake2b" not in (folder / name).read_text()
    assert content(folder) == right
