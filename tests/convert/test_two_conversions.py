"""Two conversions into one folder: the second is refused while the first works, and takes over when it was killed."""

import dataclasses
import fcntl
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from models import METADATA, given

from tinyllama import InputError
from tinyllama.convert import folder, hf_folder, native, tensor_file

KILLED = """
import os, signal, sys
from pathlib import Path
from tinyllama.convert import folder
with folder.create(Path(sys.argv[1]), Path("source"), {}) as partial:
    (partial / "stale").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def names(path: Path) -> set[str]:
    return {inner.name for inner in path.iterdir()}


def test_the_second_is_refused_and_leaves_the_first_alone(tmp_path, script, step_dir):
    hf_folder.write(tmp_path / "hf", given())
    output = tmp_path / "out"
    (tmp_path / "link").symlink_to(tmp_path)
    with folder.create(output, step_dir, {"step": 8}) as partial:
        (partial / "config.json").write_text("first")
        for name, source in [("convert_lit_checkpoint", step_dir), ("convert_hf_checkpoint", tmp_path / "hf")]:
            for other in (output, tmp_path / "link/out"):
                code, out, err = script(name, source, other)
                problem = "wait until it has ended, or give another folder"
                assert (code, out, err) == (2, "", f"error: another conversion is writing {output}: {problem}\n")
        hf_folder.write(tmp_path / "beside", given())  # another folder does not wait
        (partial / "model.safetensors").write_text("first")
    assert json.loads((output / "export.json").read_text())["step"] == 8
    assert names(output) == {"config.json", "export.json", "model.safetensors"}
    assert (output / "config.json").read_text() == "first"
    hf_folder.write(output, given(metadata=METADATA | {"step": 13}))  # which the first has ended for
    assert json.loads((output / "export.json").read_text())["step"] == 13
    assert names(tmp_path) == {"beside", "hf", "link", "out"}


def test_what_a_killed_conversion_left_is_removed(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "out"])
    assert killed.returncode == -signal.SIGKILL
    assert names(tmp_path) == {".out.lock", ".out.tmp"}
    hf_folder.write(tmp_path / "out", given())
    assert names(tmp_path) == {"out"}
    assert "stale" not in names(tmp_path / "out")


def test_a_lock_whose_file_is_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    real, ended = fcntl.flock, []

    def flock(handle, how):
        if not ended:  # the other conversion ends between our open and our lock
            ended.append((tmp_path / ".out.lock").unlink())
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder.create(tmp_path / "out", tmp_path / "source", {}):
        assert names(tmp_path) == {".out.lock", ".out.tmp"}
        with pytest.raises(InputError, match="another conversion is writing"):
            hf_folder.write(tmp_path / "out", given())
    assert names(tmp_path) == {"out"}


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def flock(handle, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    hf_folder.write(tmp_path / "out", given())
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("write", [hf_folder.write, native.write, lambda path, of: tensor_file.export(of, path)])
def test_an_error_of_the_system_without_a_number_is_told_by_its_text(write, tmp_path):
    def read(name):
        raise OSError("the disk\nis gone")

    with pytest.raises(InputError, match=r"cannot write .*out.* ?the disk\\nis gone"):
        write(tmp_path / "out", dataclasses.replace(given(), read=read))
    assert names(tmp_path) == set()
