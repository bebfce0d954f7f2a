"""Who may write into a run's folder: real processes, and files as they leave them."""

import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Process
from runs import beating

from tinyllama import InputError
from tinyllama.train import lock
from tinyllama.train.lock import RunLock

HERE = socket.gethostname()
OTHER = {"host": "node7", "pid": 1, "job_id": None, "restarts": 0, "token": "theirs"}


@pytest.fixture(autouse=True)
def no_slurm_and_a_quick_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "STALE", 300.0)  # only a heartbeat ends the wait


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For files that nobody touches: the wait has nothing to see."""
    monkeypatch.setattr(lock, "STALE", 0.1)


def leave(out_dir: Path, age: float = 0, **changes: Any) -> Path:
    """The file of another owner whose last heartbeat was ``age`` seconds ago."""
    path = out_dir / "OWNER.json"
    path.write_text(json.dumps(OTHER | changes))
    beat = path.stat().st_mtime - age
    os.utime(path, (beat, beat))
    return path


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_an_owner_holds_the_folder_and_leaves_nothing(tmp_path: Path) -> None:
    out_dir = tmp_path / "out" / "run"
    with RunLock(out_dir, "77"):
        (file,) = out_dir.iterdir()
        owner = json.loads(file.read_text())
        assert file.name == "OWNER.json"
        me = {"host": HERE, "pid": os.getpid(), "job_id": "77", "restarts": 0, "token": owner["token"]}
        content = json.dumps(me, sort_keys=True).encode()
        assert owner == me | {"blake2b": hashlib.blake2b(content, digest_size=16).hexdigest()}
        with pytest.raises(InputError) as error, RunLock(out_dir, "78"):
            pass
        assert [path.name for path in out_dir.iterdir()] == ["OWNER.json"]
        assert json.loads(file.read_text()) == owner
    who = f"pid {os.getpid()} on {HERE}, job 77"
    assert str(error.value) == f"{out_dir} belongs to another run ({who}): stop that or give another out_dir"
    assert list(tmp_path.iterdir()) == []  # nor the folders that it made


@pytest.mark.parametrize("made", ["there before", "with a file", "by another"])
def test_a_folder_that_is_not_this_starts_or_not_empty_stays(made: str, tmp_path: Path) -> None:
    out_dir = tmp_path / "out" / "run"
    if made == "there before":
        out_dir.mkdir(parents=True)
    with RunLock(out_dir, None):
        if made == "with a file":
            (out_dir / "mine").touch()
        elif made == "by another":
            (out_dir.parent / "other").mkdir()
    assert out_dir.is_dir() == (made != "by another")
    assert out_dir.parent.is_dir()


def test_a_folder_that_is_removed_while_another_waits_for_it_is_made_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 4.0)  # it is looked at every 0.2 s
    out_dir = tmp_path / "out" / "run"
    first = RunLock(out_dir, None).__enter__()
    threading.Timer(0.1, first.__exit__).start()
    with RunLock(out_dir, None) as second:
        assert json.loads((out_dir / "OWNER.json").read_text()) == second._me
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_removed_before_the_file_is_in_it_is_made_again(tmp_path: Path, monkeypatch) -> None:
    out_dir, create = tmp_path / "out" / "run", RunLock._create
    removals = iter([out_dir.rmdir, lambda: None])

    def late(owner: RunLock) -> bool:
        next(removals)()
        return create(owner)

    monkeypatch.setattr(RunLock, "_create", late)
    with RunLock(out_dir, None) as owner:
        assert json.loads((out_dir / "OWNER.json").read_text()) == owner._me
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("restarts", [0, 3])
def test_the_file_says_how_often_the_job_was_requeued(restarts: int, tmp_path: Path, monkeypatch) -> None:
    if restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    with RunLock(tmp_path, "5"):
        assert json.loads((tmp_path / "OWNER.json").read_text())["restarts"] == restarts


def test_requeues_say_nothing_of_runs_outside_slurm(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    path = leave(tmp_path, job_id=None)
    with beating(path), pytest.raises(InputError, match="belongs to another run"):
        RunLock(tmp_path, None).__enter__()


def test_another_users_process_is_alive(tmp_path: Path, monkeypatch) -> None:
    def not_ours(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "kill", not_ours)
    path = leave(tmp_path, host=HERE)
    with beating(path), pytest.raises(InputError, match="belongs to another run"):
        RunLock(tmp_path, None).__enter__()


def test_a_heart_beats_several_times_before_its_owner_is_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert lock.STALE == 60
    assert 0 < lock.BEAT <= lock.STALE / 4


@pytest.mark.parametrize("successor", [OTHER, {"host": HERE, "pid": os.getpid(), "job_id": None, "restarts": 0}])
def test_a_run_that_ends_leaves_its_successors_file(successor: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "OWNER.json"
    with RunLock(tmp_path, None):
        path.write_text(json.dumps(successor | {"token": "theirs"}))
    assert json.loads(path.read_text()) == successor | {"token": "theirs"}
    with RunLock(tmp_path / "other", None):  # nor is a file that is gone, or a damaged one, a problem at the end
        (tmp_path / "other" / "OWNER.json").unlink()
    with RunLock(tmp_path / "third", None):
        (tmp_path / "third" / "OWNER.json").write_text("{")


def test_a_run_of_the_same_process_number_is_another_run(tmp_path: Path) -> None:
    path = tmp_path / "OWNER.json"
    with RunLock(tmp_path, None):  # as in two containers, which both count from 1
        path.unlink()
        assert RunLock(tmp_path, None)._create()
        text = path.read_text()
    assert path.read_text() == text


def rival(out_dir: Path, token: str = "rival") -> str:
    """Another run puts its fresh file there, as one that was quicker would; gives what it holds."""
    text = json.dumps(OTHER | {"token": token})
    (out_dir / "new").write_text(text)
    (out_dir / "new").replace(out_dir / "OWNER.json")
    return text


def test_of_two_that_find_the_same_stale_file_the_slower_gives_the_quicker_its_file_back(tmp_path, monkeypatch) -> None:
    leave(tmp_path, host=HERE, pid=dead_pid())
    texts: list[str] = []

    def looking(pid: int) -> bool:  # the stale file has been read and is not removed yet
        texts.append(rival(tmp_path))
        return False

    monkeypatch.setattr(lock, "_alive", looking)
    beats = beating(tmp_path / "OWNER.json")
    with beats, pytest.raises(InputError, match="belongs to another run .pid 1 on node7"):
        RunLock(tmp_path, None).__enter__()
    assert [path.read_text() for path in tmp_path.iterdir()] == texts


def test_a_stale_file_that_a_quicker_one_has_removed_is_no_error(tmp_path: Path, monkeypatch, capsys) -> None:
    path = leave(tmp_path, host=HERE, pid=dead_pid())
    monkeypatch.setattr(lock, "_alive", lambda pid: bool(path.unlink()))
    with RunLock(tmp_path, None):  # the quicker one has gone again
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert capsys.readouterr().out == ""
    path.touch()
    look = lock._look
    monkeypatch.setattr(lock, "_look", lambda path: path.unlink() or look(path))
    assert RunLock(tmp_path, None)._evict() is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_given_back_does_not_replace_a_third_runs(tmp_path: Path, monkeypatch) -> None:
    leave(tmp_path, host=HERE, pid=dead_pid())
    monkeypatch.setattr(lock, "_alive", lambda pid: not rival(tmp_path))
    look = lock._look

    def looking(path: Path) -> Any:
        seen = look(path)
        if path.suffix == ".tmp":  # the second's file, taken away by mistake: a third run sees that none is there
            rival(tmp_path, "third")
        return seen

    monkeypatch.setattr(lock, "_look", looking)
    with beating(tmp_path / "OWNER.json"), pytest.raises(InputError, match="belongs to another run"):
        RunLock(tmp_path, None).__enter__()
    assert [json.loads(path.read_text())["token"] for path in tmp_path.iterdir()] == ["third"]


def test_a_file_that_cannot_be_written_to_its_end_is_not_left(tmp_path: Path, monkeypatch) -> None:
    def full(owner: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = RunLock(tmp_path, None)
    monkeypatch.setattr(lock.json, "dumps", full)
    with pytest.raises(InputError, match="cannot write .*OWNER.json: No space left on device: make room there"):
        run.__enter__()
    assert list(tmp_path.iterdir()) == []


def test_an_exception_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunLock(tmp_path, None):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


REFUSED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "on another host": ({"age": 50}, {}),
    "on this host": ({"host": HERE, "pid": os.getppid()}, {}),
    "the same job, not requeued": ({"job_id": "5", "restarts": 1}, {"SLURM_RESTART_COUNT": "1"}),
    "another job, requeued": ({"job_id": "6"}, {"SLURM_RESTART_COUNT": "1"}),
    "outside Slurm": ({"job_id": None}, {"SLURM_RESTART_COUNT": "1"}),
    "a pid that is nobody's here, on another host": ({"pid": dead_pid()}, {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_live_owner_is_left_alone(case: str, tmp_path: Path, monkeypatch, capsys) -> None:
    changes, env = REFUSED[case]
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    path = leave(tmp_path, **changes)
    text = path.read_text()
    job = changes.get("job_id") or ""
    with beating(path), pytest.raises(InputError, match=f"belongs to another run .pid .*{job}.: stop that or give"):
        RunLock(tmp_path, "5").__enter__()
    assert [path.read_text() for path in tmp_path.iterdir()] == [text]
    assert capsys.readouterr().out.startswith(f"{tmp_path} is locked by pid ")


@pytest.mark.parametrize("times", [[9e9, 9e9 + 1], [5.0, 4.0, 3.0], [1e9, 4e9, 7.0]], ids=["future", "back", "jumps"])
def test_a_heart_that_beats_is_alive_whatever_the_clocks_say(times: list[float], tmp_path: Path) -> None:
    path = leave(tmp_path, age=1e6)
    with beating(path, times), pytest.raises(InputError, match="belongs to another run"):
        RunLock(tmp_path, "5").__enter__()


TAKEN: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "silent": ({"age": 70}, {}, "pid 1 on node7: silent for 0 s"),
    "silent since a moment": ({}, {}, "pid 1 on node7: silent for 0 s"),
    "silent since a time that is in our future": ({"age": -3600}, {}, "pid 1 on node7: silent for 0 s"),
    "silent, though its pid is alive": (
        {"age": 70, "host": HERE, "pid": os.getppid()},
        {},
        f"pid {os.getppid()} on {HERE}: silent for 0 s",
    ),
    "dead on this host": ({"host": HERE, "pid": dead_pid()}, {}, "it is not running any more"),
    "requeued": (
        {"job_id": "5", "restarts": 1},
        {"SLURM_RESTART_COUNT": "2"},
        "pid 1 on node7, job 5: this job was requeued since",
    ),
}


@pytest.mark.parametrize("case", TAKEN)
def test_an_owner_that_is_gone_is_followed(case: str, tmp_path: Path, monkeypatch, capsys) -> None:
    changes, env, why = TAKEN[case]
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if "silent" in case:  # no other has to be waited for
        monkeypatch.setattr(lock, "STALE", 0.1)
    path = leave(tmp_path, **changes)
    with RunLock(tmp_path, "5"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        *waits, said = capsys.readouterr().out.splitlines()
        assert len(waits) == ("silent" in case)
        assert said.startswith(f"took over {tmp_path} from pid ")
        assert said.endswith(why)
    assert list(tmp_path.iterdir()) == []


def test_an_owner_that_dies_while_it_is_watched_is_followed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        path = leave(tmp_path, host=HERE, pid=process.pid)
        threading.Timer(0.1, process.communicate).start()
        with RunLock(tmp_path, None):
            assert json.loads(path.read_text())["pid"] == os.getpid()


def test_an_owner_that_ends_while_it_is_watched_is_followed(tmp_path: Path, capsys) -> None:
    path = leave(tmp_path)
    threading.Timer(0.1, path.unlink).start()
    with RunLock(tmp_path, None):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "took over" not in capsys.readouterr().out


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
    with pytest.raises(InputError, match=r"cannot write .*OWNER.json: .*: give an out_dir that can be"):
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


def test_the_heart_beats_and_brings_back_a_file_that_was_removed(tmp_path: Path) -> None:
    path = tmp_path / "OWNER.json"

    def soon(true: Any) -> None:
        until = time.monotonic() + 120
        while not true():
            assert time.monotonic() < until
            time.sleep(0.02)

    with RunLock(tmp_path, None):
        text = path.read_text()
        os.utime(path, (1, 1))
        soon(lambda: path.stat().st_mtime > 1)
        path.unlink()
        soon(lambda: path.exists() and path.read_text() == text)
        path.write_bytes(b"\xff")  # damage is no other run
        os.utime(path, (1, 1))
        soon(lambda: path.stat().st_mtime > 1)


# a run that from a given time on holds a folder until its stdin ends
RUN = """
import sys, time
from collections.abc import Iterator
from pathlib import Path
from tinyllama import InputError
from tinyllama.train import lock
lock.BEAT = 0.05
time.sleep(max(float(sys.argv[2]) - time.time(), 0))
try:
    with lock.RunLock(Path(sys.argv[1]), None):
        print("holds", flush=True)
        sys.stdin.read()
except InputError as error:
    print(f"refused: {error}", flush=True)
"""


def start(out_dir: Path, at: float = 0) -> Process:
    return Process(sys.executable, "-c", RUN, out_dir, at)


def outcome(run: Process) -> str:
    """Whether the run holds the folder or was refused."""
    while (line := run.line()).startswith("took over") or " is locked by " in line:
        pass
    return line


def test_a_run_that_was_replaced_ends_itself_and_leaves_the_new_one_alone(tmp_path: Path) -> None:
    run = start(tmp_path)
    assert outcome(run) == "holds\n"
    new = tmp_path / "new"
    new.write_text(json.dumps(OTHER))
    new.replace(tmp_path / "OWNER.json")
    code, _, said = run.end()
    assert (code, said) == (1, f"error: another run has taken over {tmp_path}: this one ends\n")
    assert json.loads((tmp_path / "OWNER.json").read_text()) == OTHER


@pytest.mark.parametrize("how", ["moved", "replaced"])
def test_a_run_whose_folder_is_gone_ends_itself_and_writes_nothing(how: str, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    run = start(out_dir)
    assert outcome(run) == "holds\n"
    (tmp_path / "new").mkdir()
    out_dir.rename(tmp_path / "moved")
    if how == "replaced":
        (tmp_path / "new").rename(out_dir)
    code, _, said = run.end()
    assert (code, said) == (1, f"error: {out_dir} was unmounted or replaced: mount it, and start this run again\n")
    assert how == "replaced" or not out_dir.exists()
    assert how != "replaced" or list(out_dir.iterdir()) == []


MOUNTED = """
import subprocess, sys
from collections.abc import Iterator
from pathlib import Path
folder, code = Path(sys.argv[1]), sys.argv[2]
if subprocess.run(["mount", "-t", "tmpfs", "none", folder]).returncode:
    print("no mounts here", flush=True)
    sys.exit()
run = subprocess.Popen([sys.executable, "-c", code, folder / "run", "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
print(run.stdout.readline().decode(), end="", flush=True)
subprocess.run(["umount", folder], check=True)
print(run.wait(), flush=True)
"""


def test_an_unmounted_folder_ends_the_run(tmp_path: Path) -> None:
    """In a namespace of its own, where every user may mount."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces for users here")
    process = Process(unshare, "-Urm", sys.executable, "-c", MOUNTED, tmp_path, RUN)
    if (line := process.line()) == "no mounts here\n":
        pytest.skip("no mounts for users here")
    assert line == "holds\n"
    code, rest, said = process.end()
    assert (code, rest) == (0, "1\n")
    assert said.endswith(f"error: {tmp_path}/run was unmounted or replaced: mount it, and start this run again\n")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_is_mounted_again_is_the_same_folder(tmp_path: Path, monkeypatch) -> None:
    """A remount may give other numbers to the same files, and so may some file systems without one."""
    ended = []
    monkeypatch.setattr(lock, "end_process", ended.append)
    with RunLock(tmp_path / "run", None):
        then, copy = (tmp_path / "run").stat(), tmp_path / "copy"
        lock.end_if_lost(tmp_path / "run", then, tmp_path / "run/none")
        shutil.copytree(tmp_path / "run", copy)
        lock.end_if_lost(copy, then, copy / "OWNER.json")
        assert ended == []
        (copy / "OWNER.json").unlink()
        lock.end_if_lost(copy, then, copy / "OWNER.json")
        lock.end_if_lost(tmp_path / "none", then, copy)
    assert ended == [
        f"{f} was unmounted or replaced: mount it, and start this run again" for f in (copy, tmp_path / "none")
    ]


@pytest.mark.parametrize("host", ["\x1b[2J", "a\nerror: b", "\u202e", "h" * 50_000])
def test_a_strangers_name_is_one_line(host: str, tmp_path: Path, impatient: None, capsys) -> None:
    leave(tmp_path, host=host, job_id=host)
    with RunLock(tmp_path, "5"):
        lines = capsys.readouterr().out.splitlines()
    assert [line.isprintable() and len(line) < 2100 for line in lines] == [True, True]


@pytest.mark.slow
def test_a_killed_run_is_followed_at_once_by_one_of_many(tmp_path: Path) -> None:
    first = start(tmp_path)
    assert outcome(first) == "holds\n"
    first.kill()
    at = time.time() + 0.5
    rivals = [start(tmp_path, at) for _ in range(5)]
    said = [outcome(rival) for rival in rivals]
    (winner,) = [rival for rival, line in zip(rivals, said, strict=True) if line == "holds\n"]
    assert sum("belongs to another run" in line for line in said) == 4
    assert json.loads((tmp_path / "OWNER.json").read_text())["pid"] == winner.pid
    for rival in rivals:
        rival.close()
        assert rival.end()[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write .*OWNER.json: File exists: give an out_dir that can be"):
        RunLock(tmp_path / "file", None).__enter__()
