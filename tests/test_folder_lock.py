"""The lock that conversions and preparation share: what stands in its place, and who removes its file."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinyllama.convert import folder
from tinyllama.folder_lock import locked

HOLD = """
import fcntl, sys
from pathlib import Path
from tinyllama.folder_lock import locked
with locked(Path(sys.argv[1]), sys.exit, fcntl.lockf, 1, int(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


def busy() -> None:
    raise RuntimeError("busy")


def test_the_last_of_several_places_removes_the_file(tmp_path: Path) -> None:
    path, pipes = tmp_path / ".lock", {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLD, path, "3"], **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with locked(path, busy, fcntl.lockf, 1, 2):
            assert path.exists()
        assert path.exists()
        for place in ((1, 3), (0, 0)):
            with pytest.raises(RuntimeError, match="busy"), locked(path, busy, fcntl.lockf, *place):
                pass
        other.stdin.close()
    assert not path.exists()


def test_a_file_with_content_is_left(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_text("of another program")
    with locked(path, busy, fcntl.flock):
        pass
    assert path.read_text() == "of another program"


@pytest.mark.parametrize("place", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_opened(tmp_path: Path, place) -> None:
    place(tmp_path / ".lock")
    with pytest.raises(FileExistsError, match="is not a file"), locked(tmp_path / ".lock", busy, fcntl.flock):
        pass


def test_a_conversion_does_not_wait_for_a_pipe_in_the_place_of_its_lock(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".out.lock")
    with (
        pytest.raises(ValueError, match=r"cannot create .*out: it is there and is not a file: give a folder"),
        folder.create(tmp_path / "out", tmp_path / "source", {}),
    ):
        pass
    assert not (tmp_path / "out").exists()
