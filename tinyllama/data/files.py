"""The files of a packed folder: regular ones, or links to them, as large shards may lie on another disk.

Whatever else stands in the place of one is refused before it is opened: a pipe would wait for ever, and a device may
have no end.
"""

import errno
import io
import os
import re
import stat
from pathlib import Path

import numpy as np

from tinyllama import InputError

_INDEX_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '<u8', 'fortran_order': False, 'shape': \((\d{1,18}),\), \} *\n", re.DOTALL
)


def open_regular(path: Path) -> io.FileIO:
    """Open a file for reading; raises OSError if it cannot be read or is not a regular one."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return io.FileIO(path)


def check_size(path: Path, expected: int, hint: str) -> None:
    """Raise InputError unless the file is there with that many bytes."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: {hint}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): {hint}") from None
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is not a regular file: {hint}")
    if status.st_size != expected:
        raise InputError(f"{path} has {status.st_size} bytes, not the {expected} it was written with: {hint}")


def index_bytes(ends: np.ndarray) -> bytes:
    """Return the content of a NAME.idx.npy: the document ends (n,) as numpy saves them."""
    content = io.BytesIO()
    np.save(content, ends.astype("<u8"))
    return content.getvalue()


def open_index(path: Path, documents: int) -> io.FileIO | None:
    """Open a NAME.idx.npy at the first of its ends; None if it is not what ``index_bytes`` made of ``documents`` ends.

    Its header is compared with the one there can be, not evaluated: a damaged one may declare any type and size.
    Raises FileNotFoundError.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise
    except OSError:
        return None
    header = _INDEX_HEADER.match(file.read(1024))
    if header is not None:
        start, declared = 10 + int.from_bytes(header[1], "little"), int(header[2])
        if start == header.end() and declared == documents and os.stat(path).st_size == start + 8 * documents:
            file.seek(start)
            return file
    file.close()
    return None


def read_index(path: Path, documents: int, tokens: int) -> np.ndarray | None:
    """Return the document ends (documents,) of a shard of ``tokens``, as int64; None if the file cannot be theirs."""
    try:
        file = open_index(path, documents)
        if file is None:
            return None
        with file:
            ends = np.frombuffer(file.read(), "<u8").astype(np.int64)
    except OSError:
        return None
    whole = ends.shape == (documents,) and ends.max(initial=0) == tokens
    return ends if whole and (np.diff(ends, prepend=0) >= 0).all() else None
