"""Names of step directories: ``step-00005000``, at least eight digits, so that they sort by step."""

import os
import re
import secrets
from pathlib import Path

from tinyllama import InputError


def step_dir(folder: Path, step: int) -> Path:
    """Return the directory of ``step`` in ``folder``."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Return the step that a directory's name says; None for any other name, a temporary directory's among them."""
    named = re.fullmatch(r"step-(\d+)", path.name, re.ASCII)
    return int(named[1]) if named else None


def broken_dir(step_dir: Path) -> Path:
    """Return a name of its own for a broken ``step_dir`` that is set aside: ``step-00005000.broken-1f0a93c2``."""
    return step_dir.with_name(f"{step_dir.name}.broken-{secrets.token_hex(4)}")


def broken_dirs(folder: Path) -> list[Path]:
    """Return what ``broken_dir`` has named in ``folder``."""
    return [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}\.broken-[0-9a-f]{8}", path.name)]


def run_dir(step_dir: Path) -> Path:
    """Return the folder of the run that a step directory is of: above ``checkpoints``, else the one it is in."""
    folder = step_dir.parent
    return folder.parent if folder.name == "checkpoints" else folder


def step_dirs(folder: Path) -> list[tuple[int, Path]]:
    """Return the steps in ``folder`` and their directories, complete or not, sorted by step.

    There are none if there is no folder. Raises InputError for one that cannot be listed, and for a file or a link to
    nowhere in its place: a run that took this for no steps would start anew.
    """
    try:
        with os.scandir(folder) as entries:
            paths = [folder / entry.name for entry in entries]
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.lexists(folder):
            return []
        reason = "a link to nowhere" if isinstance(error, FileNotFoundError) else error.strerror
        hint = "mount its disk, allow reading it, or move it away"
        raise InputError(f"cannot list the checkpoints in {folder} ({reason}): {hint}") from None
    return sorted((step, path) for path in paths if (step := step_of(path)) is not None)
