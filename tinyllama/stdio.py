"""Standard output and error of a process that must go on where they fail: on a full disk, or without a terminal."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def best_effort() -> Iterator[None]:
    """Print, within it, what may be lost: a log whose disk is full must not end the run that it is of.

    It is for what takes days and has its results in files. What found no room is printed later, if it can be. A pipe
    that nobody reads ends the process as ever.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        pass


def drop_unprinted() -> None:
    """Drop what could not be printed with ``best_effort``: at the process's exit it would be an error again."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        drop_stdout()


def drop_stdout() -> None:
    """Write no more to stdout, not even what is left in its buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_stderr(line: bytes) -> None:
    """Write ``line`` to stderr, from any thread or signal handler; where that fails, the caller goes on.

    Not by print, because a thread that is stuck in one holds the lock of ``sys.stderr``.
    """
    with contextlib.suppress(OSError):
        os.write(2, line)
