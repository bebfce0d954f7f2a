"""What stands in the place of OWNER.json and is none, or a damaged one, evicts nobody and holds nobody up."""

import itertools
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from owners import HERE, OTHER, dead_pid, leave
from runs import beating

from tinyllama import InputError
from tinyllama.train import lock
from tinyllama.train.lock import RunLock

pytestmark = pytest.mark.usefixtures("no_slurm_and_a_quick_heart")


UNREADABLE = [b"", b"{", b"[1]", b"\xff\xfe\0", b"[" * 100_000, json.dumps({"host": HERE}).encode()]
UNREADABLE += [json.dumps(OTHER | {"host": HERE, "pid": pid}).encode() for pid in ("x", 10**30, -1)]
UNREADABLE += [json.dumps(OTHER | {"job_id": "5", "restarts": "x"}).encode()]


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_file_that_is_being_written_or_damaged_is_a_live_owner_for_a_while(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "OWNER.json"
    path.write_bytes(content)
    with beating(path), pytest.raises(InputError, match="belongs to another run .pid . on ."):
        RunLock(tmp_path, "5").__enter__()
    monkeypatch.setattr(lock, "STALE", 0.1)
    with RunLock(tmp_path, None):
        assert json.loads(path.read_text())["host"] == HERE


def damaged(text: bytes, values: int) -> Iterator[bytes]:
    """Yield ``text`` with other values, a flipped bit first, at every byte of it, and with each field changed."""
    rng = random.Random(5)
    for at in range(len(text)):
        flipped = text[at] ^ 1 << rng.randrange(8)
        others = rng.sample([value for value in range(256) if value not in (text[at], flipped)], values - 1)
        for value in (flipped, *others):
            yield text[:at] + bytes([value]) + text[at + 1 :]
    holder = json.loads(text)
    changes = (None, True, -2, 1, 1.5, "x\x00", [], {}, 10**400, "y" * 9999, dead_pid(), "5", holder["pid"] + 1)
    for name, value in itertools.product(holder, changes):
        yield json.dumps(holder | {name: value}).encode()
        yield json.dumps({key: field for key, field in holder.items() if key != name}).encode()
    yield from (text[:length] for length in range(len(text)))


@pytest.mark.parametrize("values", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_damaged_file_evicts_nobody_and_ends_nobody(values: int, tmp_path: Path, monkeypatch) -> None:
    """Whatever the file of a live run says, nobody takes it for gone without a wait, nor does it end itself."""
    ended: list[str] = []
    monkeypatch.setattr(lock, "end_process", ended.append)
    monkeypatch.setattr(lock, "BEAT", 1e6)
    path = tmp_path / "OWNER.json"
    tries = unreadable = 0
    with RunLock(tmp_path, "5") as owner:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
        other = RunLock(tmp_path, "5")
        whole = path.read_bytes()
        for content in damaged(whole, values):
            tries += 1
            path.write_bytes(content)
            seen = lock._look(path)
            assert other._why_gone(seen) is None, content
            assert not seen.holder or owner._is_mine(seen.holder), content
            unreadable += not seen.holder
        path.write_bytes(whole)
    print(f"{tries} tries: {unreadable} are nobody's, {tries - unreadable} are what was written")
    assert ended == []
    assert tries > 400
    assert unreadable > 0.9 * tries
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["dangling link", "link", "link to itself", "folder"])
def test_what_is_no_file_in_the_place_of_the_file_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "OWNER.json"
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"link": "file", "link to itself": "OWNER.json"}.get(kind, "nowhere"))
        (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*OWNER.json: .*: give an out_dir that can be written$"):
        RunLock(tmp_path, None).__enter__()
    assert path.is_symlink() or path.is_dir()


def test_a_pipe_and_a_huge_file_hold_nobody_up(tmp_path: Path, impatient: None) -> None:
    path = tmp_path / "OWNER.json"
    os.mkfifo(path)
    with RunLock(tmp_path, None):
        assert json.loads(path.read_text())["host"] == HERE
    with path.open("wb") as file:
        file.truncate(10**12)
    with RunLock(tmp_path, None):
        assert json.loads(path.read_text())["host"] == HERE


@pytest.mark.parametrize("host", ["\x1b[2J", "a\nerror: b", "\u202e", "h" * 50_000])
def test_a_strangers_name_is_one_line(host: str, tmp_path: Path, impatient: None, capsys) -> None:
    leave(tmp_path, host=host, job_id=host)
    with RunLock(tmp_path, "5"):
        lines = capsys.readouterr().out.splitlines()
    assert [line.isprintable() and len(line) < 2100 for line in lines] == [True, True]
