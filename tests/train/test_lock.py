"""Who may write into a run's folder: real processes, and files as they leave them."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import Process

from tinyllama import InputError
from tinyllama.train import lock
from tinyllama.train.lock import RunLock

HERE = socket.gethostname()
OTHER = {"host": "node7", "pid": 1, "job_id": None, "restarts": 0, "token": "theirs"}


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


def leave(out_dir: Path, age: float = 0, **facts: Any) -> Path:
    """The file of another owner whose last heartbeat was ``age`` seconds ago."""
    path = out_dir / "OWNER.json"
    path.write_text(json.dumps(OTHER | facts))
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
        facts = json.loads(file.read_text())
        assert file.name == "OWNER.json"
        assert {**facts, "token": ""} == {"host": HERE, "pid": os.getpid(), "job_id": "77", "restarts": 0, "token": ""}
        with pytest.raises(InputError) as error, RunLock(out_dir, "78"):
            pass
        assert [path.name for path in out_dir.iterdir()] == ["OWNER.json"]
        assert json.loads(file.read_text()) == facts
    who = f"pid {os.getpid()} on {HERE}, job 77; heartbeat 0 s ago"
    assert str(error.value).startswith(f"{out_dir} belongs to another run ({who}): stop that or give another out_dir")
    assert list(out_dir.iterdir()) == []


@pytest.mark.parametrize("restarts", [0, 3])
def test_the_file_says_how_often_the_job_was_requeued(restarts: int, tmp_path: Path, monkeypatch) -> None:
    if restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    with RunLock(tmp_path, "5"):
        assert json.loads((tmp_path / "OWNER.json").read_text())["restarts"] == restarts


def test_requeues_say_nothing_of_runs_outside_slurm(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    leave(tmp_path, job_id=None)
    with pytest.raises(InputError, match="belongs to another run"):
        RunLock(tmp_path, None).__enter__()


def test_another_users_process_is_alive(tmp_path: Path, monkeypatch) -> None:
    def not_ours(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "kill", not_ours)
    leave(tmp_path, host=HERE)
    with pytest.raises(InputError, match="belongs to another run"):
        RunLock(tmp_path, None).__enter__()


def test_a_heart_beats_several_times_before_its_owner_is_taken_for_gone() -> None:
    assert 0 < lock.BEAT <= lock.STALE / 4


@pytest.mark.parametrize("successor", [OTHER, {"host": HERE, "pid": os.getpid(), "job_id": None, "restarts": 0}])
def test_a_run_that_ends_leaves_its_successors_file(successor: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "OWNER.json"
    with RunLock(tmp_path, None):
        path.write_text(json.dumps(successor | {"token": "theirs"}))
    assert json.loads(path.read_text()) == successor | {"token": "theirs"}
    with RunLock(tmp_path / "other", None):  # nor is a file that is gone, or a damaged one, a fault at the end
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
    with pytest.raises(InputError, match="belongs to another run .pid 1 on node7"):
        RunLock(tmp_path, None).__enter__()
    assert [path.read_text() for path in tmp_path.iterdir()] == texts


def test_a_stale_file_that_a_quicker_one_has_removed_is_no_fault(tmp_path: Path, monkeypatch, capsys) -> None:
    path = leave(tmp_path, host=HERE, pid=dead_pid())
    monkeypatch.setattr(lock, "_alive", lambda pid: bool(path.unlink()))
    with RunLock(tmp_path, None):  # the quicker one has gone again
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert capsys.readouterr().out == ""
    path.touch()
    read = lock._read
    monkeypatch.setattr(lock, "_read", lambda path: path.unlink() or read(path))
    assert RunLock(tmp_path, None)._clear() is None
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_given_back_does_not_replace_a_third_runs(tmp_path: Path, monkeypatch) -> None:
    leave(tmp_path, host=HERE, pid=dead_pid())
    monkeypatch.setattr(lock, "_alive", lambda pid: not rival(tmp_path))
    read = lock._read

    def reading(path: Path) -> str:
        text = read(path)
        if path.suffix == ".tmp":  # the second's file, taken away by mistake: a third run sees that none is there
            rival(tmp_path, "third")
        return text

    monkeypatch.setattr(lock, "_read", reading)
    with pytest.raises(InputError, match="belongs to another run"):
        RunLock(tmp_path, None).__enter__()
    assert [json.loads(path.read_text())["token"] for path in tmp_path.iterdir()] == ["third"]


def test_a_file_that_cannot_be_written_to_its_end_is_not_left(tmp_path: Path, monkeypatch) -> None:
    def full(facts: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock.json, "dumps", full)
    with pytest.raises(InputError, match="cannot write .*OWNER.json: No space left on device: give an out_dir"):
        RunLock(tmp_path, None).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_an_exception_gives_the_folder_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunLock(tmp_path, None):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


REFUSED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "fresh, on another host": ({"age": 50}, {}),
    "fresh, alive on this host": ({"host": HERE, "pid": os.getppid()}, {}),
    "the same job, not requeued": ({"job_id": "5", "restarts": 1}, {"SLURM_RESTART_COUNT": "1"}),
    "another job, requeued": ({"job_id": "6"}, {"SLURM_RESTART_COUNT": "1"}),
    "outside Slurm": ({"job_id": None}, {"SLURM_RESTART_COUNT": "1"}),
    "beats in our future": ({"age": -3600}, {}),
    "a pid that is nobody's here, on another host": ({"pid": dead_pid()}, {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_live_owner_is_left_alone(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, env = REFUSED[case]
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    text = leave(tmp_path, **facts).read_text()
    job = facts.get("job_id") or ""
    with pytest.raises(InputError, match=f"belongs to another run .pid .*{job}; heartbeat [0-9]+ s ago"):
        RunLock(tmp_path, "5").__enter__()
    assert [path.read_text() for path in tmp_path.iterdir()] == [text]


TAKEN: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "silent": ({"age": 70}, {}, "pid 1 on node7: silent for 70 s"),
    "silent, though its pid is alive": (
        {"age": 70, "host": HERE, "pid": os.getppid()},
        {},
        f"pid {os.getppid()} on {HERE}: silent for 70 s",
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
    facts, env, why = TAKEN[case]
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    path = leave(tmp_path, **facts)
    with RunLock(tmp_path, "5"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        said = capsys.readouterr().out
        assert said.startswith(f"took over {tmp_path} from pid ")
        assert said.endswith(f"{why}\n")
    assert list(tmp_path.iterdir()) == []


UNREADABLE = [b"", b"{", b"[1]", b"\xff\xfe\0", b"[" * 100_000, json.dumps({"host": HERE}).encode()]
UNREADABLE += [json.dumps(OTHER | {"host": HERE, "pid": pid}).encode() for pid in ("x", 10**30, -1)]
UNREADABLE += [json.dumps(OTHER | {"job_id": "5", "restarts": "x"}).encode()]


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_file_that_is_being_written_or_damaged_is_a_live_owner_for_a_while(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "OWNER.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="belongs to another run .pid . on ."):
        RunLock(tmp_path, "5").__enter__()
    beat = path.stat().st_mtime - 70
    os.utime(path, (beat, beat))
    with RunLock(tmp_path, None):
        assert json.loads(path.read_text())["host"] == HERE


def test_the_heart_beats_and_brings_back_a_file_that_was_removed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
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


def verdict(run: Process) -> str:
    """Whether the run holds the folder or was refused."""
    line = run.line()
    return run.line() if line.startswith("took over") else line


def test_a_run_that_was_replaced_ends_itself_and_leaves_the_new_one_alone(tmp_path: Path) -> None:
    run = start(tmp_path)
    assert verdict(run) == "holds\n"
    new = tmp_path / "new"
    new.write_text(json.dumps(OTHER))
    new.replace(tmp_path / "OWNER.json")
    code, _, said = run.end()
    assert (code, said) == (1, f"error: another run has taken over {tmp_path}: this one ends\n")
    assert json.loads((tmp_path / "OWNER.json").read_text()) == OTHER


@pytest.mark.slow
def test_a_killed_run_is_followed_at_once_by_one_of_many(tmp_path: Path) -> None:
    first = start(tmp_path)
    assert verdict(first) == "holds\n"
    first.kill()
    at = time.time() + 0.5
    rivals = [start(tmp_path, at) for _ in range(5)]
    said = [verdict(rival) for rival in rivals]
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
