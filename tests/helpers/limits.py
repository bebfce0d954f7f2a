"""A disk that is full, for every user and on every system: a limit on the size of files, which fails as one does."""

import contextlib
import os
import resource
from collections.abc import Iterator
from typing import IO

import pytest


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def full_disk() -> Iterator[IO[str]]:
    """A file on a full disk, open for writing."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    file = open("/dev/full", "w")  # noqa: SIM115 - closing it would fail, too
    try:
        yield file
    finally:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        file.close()
