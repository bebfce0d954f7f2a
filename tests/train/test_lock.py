"""Who may write into a run's folder: a run that holds it, one that finds its owner gone, and rivals for it."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from owners import HERE, OTHER, dead_pid, leave
from runs import beating

from tinyllama import InputError
from tinyllama.train import lock
from tinyllama.train.lock import RunLock

pytestmark = pytest.mark.usefixtures("no_slurm_and_a_quick_heart")


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


def test_a_number_of_requeues_that_is_none_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "once")
    with pytest.raises(InputError, match="SLURM_RESTART_COUNT is 'once': it must be a whole number from 0"):
        RunLock(tmp_path / "run", "5")
    assert list(tmp_path.iterdir()) == []


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


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*: File exists: give an out_dir that can be written$"):
        RunLock(tmp_path / "file", None).__enter__()
