"""OWNER.json as the runs of others leave it, for the tests of the run lock."""

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

HERE = socket.gethostname()
OTHER = {"host": "node7", "pid": 1, "job_id": None, "restarts": 0, "token": "theirs"}


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
