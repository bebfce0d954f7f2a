"""Record what a run was started by and on, at each start, for the report."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from tinyllama import __version__
from tinyllama.monitor.console import same_command
from tinyllama.train.run import Run

LIBRARIES = ("torch", "lightning")


def environment(run: Run) -> dict[str, Any]:
    """Return the run's origin and length, its ranks and backends, its command, the code's commit, and versions."""
    has_gpu = torch.cuda.is_available()
    versions = {"tinyllama": __version__, "python": platform.python_version()}
    versions |= {library: importlib.metadata.version(library) for library in LIBRARIES}
    return {
        "world_size": run.world.size,
        "ops": run.ops,
        "resumed_from": str(run.resume) if run.resume else None,
        "started_from": str(run.start) if run.start else None,
        "max_steps": run.max_steps,
        "nodes": run.world.nodes,
        "device": torch.cuda.get_device_name() if has_gpu else f"CPU ({platform.machine()})",
        "command": same_command(run.world.launcher),
        "commit": commit(Path(__file__)),
        "versions": versions | ({"cuda": torch.version.cuda} if has_gpu else {}),
    }


def commit(file: Path) -> str | None:
    """Return the commit of the repository that tracks ``file``, ``-dirty`` if it was changed; None if none does."""
    is_tracked = ["ls-files", "--error-unmatch", file.name]  # not of a virtual environment in another repository
    describe = ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    found = None
    for command in (is_tracked, describe):
        command = ["git", "-C", str(file.parent), *command]
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None
    return found
