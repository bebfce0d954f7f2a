"""A lock on a folder that the system keeps: it ends with the process that holds it, however that ends.

A run of days that other hosts must recognize as dead has another kind of lock: ``tinyllama.train.lock``.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from tinyllama.atomic import check_is_file


@contextlib.contextmanager
def locked(path: Path, busy: Callable[[], None], lock: Callable[..., object], *place: int) -> Iterator[None]:
    """Hold the lock of the file ``path``, which is made for it; the last one that holds it removes it, if it is empty.

    ``lock`` is ``fcntl.flock``, which also keeps two threads apart, or ``fcntl.lockf``, which can lock some bytes of a
    file alone: ``place`` is how many (0: all that follow) and the first one. Where another process holds them, ``busy``
    is called; if that returns, they are waited for. Where there are no locks, none is held. Raises OSError where the
    file cannot be made.
    """
    check_is_file(path)
    with open(path, "ab") as file:  # for writing, without which NFS has no exclusive locks
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, *place)
        except (BlockingIOError, PermissionError):
            busy()
            lock(file, fcntl.LOCK_EX, *place)
        except OSError:
            pass  # no locks on this file system
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            with locked(path, busy, lock, *place):  # the other one was the last and has removed the file
                yield
            return
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if _is_last(file, lock) and not os.fstat(file.fileno()).st_size:  # ours is empty
                    path.unlink()


def _is_last(file: IO[bytes], lock: Callable[..., object]) -> bool:
    """Return whether no other process holds a place of ``file``, or none can."""
    try:
        lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass  # no locks on this file system
    return True
