"""Write files that appear complete or not at all, and survive a power cut."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def temporary(path: Path) -> Path:
    """Return an unused name beside ``path`` that ends in ``.tmp``."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def behind_link(path: Path) -> Path:
    """Return the file that the link ``path`` leads to, which may not be there yet; ``path`` itself if it is no link."""
    return Path(os.path.realpath(path))


def check_is_file(path: Path) -> None:
    """Raise FileExistsError if something other than a file is there.

    Opening a pipe would block, and as root one would replace a device.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "it is there and is not a file", str(path))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``: the file that the block writes there replaces ``path`` if it succeeds."""
    check_is_file(path)
    partial = temporary(path)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        # writing does not name the file, and nobody knows the temporary one
        if error.errno is not None and error.filename in (None, str(partial)):
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write(path: Path, payload: bytes) -> None:
    """Replace the content of ``path`` by ``payload``; a reader sees the old content or the complete new one."""
    with replacing(path) as partial:
        partial.write_bytes(payload)


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
