"""The run lock: refuse a second process that would write to the folder of a run.

A requeued job can overlap the one it replaces. OWNER.json says who holds the lock, and its holder touches the file
every few seconds. Clocks may differ and jump, so they are not asked: a holder whose file changes while we watch is
alive, and one whose file does not is gone.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tinyllama import InputError, atomic, printable, stdio
from tinyllama.train.collectives import from_rank_zero
from tinyllama.train.launch import env_number

BEAT = 10.0  # seconds between heartbeats
STALE = 60.0  # a holder that was silent for as many seconds is gone
LONGEST = 65_536  # bytes of a file that are read; ours has some hundred


class RunLock:
    """Holds the lock on ``out_dir`` while in the context; for rank 0 only.

    ``job_id`` is the Slurm job's, None outside one. Entering waits for up to STALE seconds to see whether another
    holder is alive and raises InputError if it is. One on this host whose pid is not running, and one of the same job,
    requeued since, are not waited for. Should the previous holder still be there, it ends itself with status 1.
    Folders that it made are removed on exit if nothing was written in them.
    """

    def __init__(self, out_dir: Path, job_id: str | None) -> None:
        self._path = out_dir / "OWNER.json"
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job_id": job_id,
            "restarts": env_number("SLURM_RESTART_COUNT", 0),
            "token": secrets.token_hex(8),
        }
        self._me["blake2b"] = _hash(self._me)
        self._made: list[Path] = []  # the innermost first
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="owner", daemon=True)

    def __enter__(self) -> "RunLock":
        try:
            before = None
            while not self._create_in_folder():
                before = self._evict()
            self._folder = self._path.parent.stat()
        except OSError as error:
            self._remove_made()
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "make room there" if full else "give an out_dir that can be written"
            raise InputError(f"cannot write {self._path}: {error.strerror}: {hint}") from None
        if before is not None:
            print(printable(f"took over {self._path.parent} from {before}"), flush=True)
        self._heart.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._heart.join()
        with contextlib.suppress(OSError):  # the run is over; what is left of its file grows stale
            if self._is_mine(_look(self._path).holder):
                self._path.unlink()
                self._remove_made()

    def _create_in_folder(self) -> bool:
        """Take the lock if nobody holds it, in a folder that is made if it is not there."""
        while True:
            folder = self._path.parent
            self._made += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # who made the folder has just removed it
                return self._create()

    def _remove_made(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):  # something was written there
                folder.rmdir()

    def _create(self) -> bool:
        """Take the lock if nobody holds it."""
        try:
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(json.dumps(self._me).encode())
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _evict(self) -> str | None:
        """Remove the file of a holder that is gone and return who it was and why; raises InputError if it is alive."""
        try:
            seen = _look(self._path)
            why = self._why_gone(seen) or self._watch(seen)
        except FileNotFoundError:
            return None
        # of two that find the same file stale, the one that renames it continues; the other finds none, or a new one
        tombstone = atomic.temporary(self._path)
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(tombstone)
            try:
                if _look(tombstone) == seen:
                    return f"{seen}: {why}"
                with contextlib.suppress(FileExistsError):  # another was quicker by a moment: this is its file
                    os.link(tombstone, self._path)
            finally:
                tombstone.unlink()
        return None

    def _why_gone(self, seen: "_Look") -> str | None:
        """Return what shows that the holder is gone, without a wait; None if nothing does."""
        job_id, holder = self._me["job_id"], seen.holder
        if job_id is not None and job_id == holder.get("job_id") and self._me["restarts"] > holder["restarts"]:
            return "this job was requeued since"
        if holder.get("host") == self._me["host"] and not _alive(holder["pid"]):
            return "it is not running any more"
        return None

    def _watch(self, seen: "_Look") -> str:
        """Wait until the holder is gone and return why; raises InputError at its next heartbeat."""
        out_dir, deadline = self._path.parent, time.monotonic() + STALE
        print(printable(f"{out_dir} is locked by {seen}: waiting {STALE:.0f} s for a sign of life"), flush=True)
        while time.monotonic() < deadline:
            time.sleep(BEAT / 20)
            if _look(self._path) != seen:
                raise InputError(f"{out_dir} belongs to another run ({seen}): stop that or give another out_dir")
            if why := self._why_gone(seen):
                return why
        return f"silent for {STALE:.0f} s"

    def _is_mine(self, holder: dict[str, Any]) -> bool:
        return holder.get("token") == self._me["token"]

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # of a file server that does not answer now
                end_if_lost(self._path.parent, self._folder, self._path)
                self._create()  # if somebody removed it: we are alive
                holder = _look(self._path).holder
                if holder and not self._is_mine(holder):  # {}: another has begun to write there, or a disk failed
                    end_process(f"another run has taken over {self._path.parent}: this one ends")
                os.utime(self._path)


@contextlib.contextmanager
def run_lock(out_dir: Path, job_id: str | None) -> Iterator[None]:
    """Collective. Hold the run lock on ``out_dir`` by rank 0; every rank raises the InputError of a refusal."""
    with contextlib.ExitStack() as stack:
        from_rank_zero(lambda: bool(stack.enter_context(RunLock(out_dir, job_id))))
        yield


def end_if_lost(folder: Path, then: os.stat_result, file: Path) -> None:
    """End this process if ``folder``, which was ``then``, was unmounted, moved or replaced since.

    A file system that is mounted again may number its files anew, so our own ``file`` in it is proof, too.
    """
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(folder.stat(), then) or file.exists():
            return
    end_process(f"{folder} was unmounted or replaced: mount it, and start this run again")


def end_process(reason: str) -> NoReturn:
    """End this process at once, from any thread: what it would still write would do harm."""
    stdio.write_stderr(f"error: {printable(reason)}\n".encode())
    os._exit(1)


class _Look(NamedTuple):
    """What there was to see of a lock's file at a moment; a heartbeat changes ``touched``."""

    holder: dict[str, Any]
    """what the file says; {} if it has not been written to its end, or was damaged"""
    text: bytes
    inode: int
    touched: int

    def __str__(self) -> str:
        job = f", job {self.holder['job_id']}" if self.holder.get("job_id") else ""
        return f"pid {self.holder.get('pid', '?')} on {self.holder.get('host', '?')}{job}"


def _look(path: Path) -> _Look:
    # opened before its time is read, as NFS may remember an older one; and no link is followed, no pipe waited for
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        status, text = os.fstat(file.fileno()), file.read(LONGEST)
    try:
        holder = json.loads(text)
        kinds = {"host": str, "pid": int, "restarts": int}
        complete = all(type(holder[name]) is kind for name, kind in kinds.items()) and 0 < holder["pid"] < 2**31
        complete &= holder.get("blake2b", _hash(holder)) == _hash(holder)  # earlier versions wrote none
    except (ValueError, TypeError, KeyError, RecursionError):
        complete = False
    return _Look(holder if complete else {}, text, status.st_ino, status.st_mtime_ns)


def _hash(holder: dict[str, Any]) -> str:
    """Return the hash of what an OWNER.json says besides its hash: a damaged pid or host must evict nobody."""
    content = json.dumps({name: value for name, value in holder.items() if name != "blake2b"}, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
