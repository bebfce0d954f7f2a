"""Files that appear whole or not at all, and are still there after a power cut."""

import errno
import os
import secrets
from pathlib import Path


def temporary(path: Path) -> Path:
    """A name beside ``path`` that nobody else uses, with the ending ``.tmp``."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def write(path: Path, payload: bytes) -> None:
    """Put ``payload`` into ``path``: a reader finds what was there before, or all of this."""
    if path.exists() and not path.is_file():  # root could replace a device
        raise FileExistsError(errno.EEXIST, "it is there and is not a file", str(path))
    unfinished = temporary(path)
    try:
        unfinished.write_bytes(payload)
        sync(unfinished)
        unfinished.replace(path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when what a file holds, or the names in a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
