import subprocess
from pathlib import Path

import pytest

from tinyllama.monitor.environment import commit


def git(folder: Path, *command: str) -> str:
    settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "core.hooksPath=")
    done = subprocess.run(["git", *settings, *command], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_of_the_code_and_whether_it_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    file, other = tmp_path / "file", tmp_path / "inside" / "other"
    other.parent.mkdir()
    for path in (file, other):
        path.write_text("one")
    assert commit(file) is None
    git(tmp_path, "init")
    assert commit(file) is None  # of nothing yet
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "v1")
    assert commit(file) == git(tmp_path, "rev-parse", "HEAD")[:12]
    assert commit(other) is None  # as of a package that is installed in another repository
    git(tmp_path, "add", "inside/other")
    git(tmp_path, "commit", "-m", "second")
    assert commit(other) == git(tmp_path, "rev-parse", "HEAD")[:12]
    file.write_text("two")
    assert commit(other) == git(tmp_path, "rev-parse", "HEAD")[:12] + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit(file) is None
