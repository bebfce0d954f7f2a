"""A run that holds its folder keeps it, or ends: real processes that are replaced, killed or unmounted."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from owners import OTHER
from processes import Process

from tinyllama.train import lock
from tinyllama.train.lock import RunLock

pytestmark = pytest.mark.usefixtures("no_slurm_and_a_quick_heart")


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
