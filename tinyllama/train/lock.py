"""The run lock: refuse a second process that would write to the folder of a run.

A requeued job can overlap the one it replaces. The lock's file, OWNER.json, says who holds it; its time of
modification is the heartbeat, and is compared only with the time that the same file system gives to a new file: clocks
may differ.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from tinyllama import InputError, atomic

BEAT = 10.0  # seconds between heartbeats
STALE = 60.0  # a holder that was silent for as many seconds is gone


class RunLock:
    """Hold the lock on ``out_dir`` while in the context; for rank 0 only.

    ``job_id`` is the Slurm job's, None outside one. Raises InputError when another process holds it: one whose
    heartbeat is fresh and, if it was on this host, whose pid is alive; but the same job, requeued since, takes over.
    Taking over is said, and the one before ends itself, with status 1, should it still be there.
    """

    def __init__(self, out_dir: Path, job_id: str | None) -> None:
        self._path = out_dir / "OWNER.json"
        self._me = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job_id": job_id,
            "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            "token": secrets.token_hex(8),
        }
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="owner", daemon=True)

    def __enter__(self) -> "RunLock":
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            before = None
            while not self._create():
                before = self._clear()
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror}: give an out_dir that can be") from None
        if before is not None:
            print(f"took over {self._path.parent} from {before}", flush=True)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._heart.join()
        with contextlib.suppress(OSError):  # the run is over; what is left of its file grows stale
            if self._holder() == self._me:
                self._path.unlink()

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

    def _clear(self) -> str | None:
        """Remove the file of a holder that is gone and return who it was and why; raises InputError if it is alive."""
        try:
            age, text = self._age(), _read(self._path)
        except FileNotFoundError:
            return None
        other = _parse(text)
        on_host = f"pid {other.get('pid', '?')} on {other.get('host', '?')}"
        who = f"{on_host}, job {other['job_id']}" if other.get("job_id") else on_host
        job_id, restarts = self._me["job_id"], self._me["restarts"]
        if job_id is not None and job_id == other.get("job_id") and restarts > other.get("restarts", 0):
            why = "this job was requeued since"
        elif other.get("host") == self._me["host"] and not _alive(other["pid"]):
            why = "it is not running any more"
        elif age > STALE:
            why = f"silent for {age:.0f} s"
        else:
            raise InputError(
                f"{self._path.parent} belongs to another run ({who}; heartbeat {max(age, 0):.0f} s ago): stop that or "
                f"give another out_dir; one that is gone is taken for it after {STALE:.0f} s"
            )
        # of two that find the same file stale, the one that renames it goes on; the other finds none, or a new owner's
        tombstone = atomic.temporary(self._path)
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(tombstone)
            try:
                if _read(tombstone) == text:
                    return f"{who}: {why}"
                with contextlib.suppress(FileExistsError):  # another was quicker by a moment: this is its file
                    os.link(tombstone, self._path)
            finally:
                tombstone.unlink()
        return None

    def _age(self) -> float:
        """Seconds since the last heartbeat, by the clock of the file system."""
        now = atomic.temporary(self._path)
        try:
            now.touch()
            with self._path.open("rb") as file:  # opened, for NFS may remember an older time of a file not opened
                return now.stat().st_mtime - os.fstat(file.fileno()).st_mtime
        finally:
            now.unlink(missing_ok=True)

    def _holder(self) -> dict[str, Any]:
        return _parse(_read(self._path))

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # of a file server that does not answer now
                self._create()  # if somebody removed it: we are alive
                if self._holder() not in ({}, self._me):  # {}: another has begun to write there, or a disk failed
                    what = f"another run has taken over {self._path.parent}: this one ends"
                    print(f"error: {what}", file=sys.stderr, flush=True)
                    os._exit(1)  # at once: two that write there would spoil it
                os.utime(self._path)  # the file server's time, not ours


@contextlib.contextmanager
def run_lock(out_dir: Path, job_id: str | None) -> Iterator[None]:
    """Collective. Hold the run lock on ``out_dir`` by rank 0; every rank raises the InputError of a refusal."""
    with contextlib.ExitStack() as stack:
        refusal: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                stack.enter_context(RunLock(out_dir, job_id))
            except InputError as error:
                refusal = [error.args]
        dist.broadcast_object_list(refusal, src=0)
        if refusal[0] is not None:
            raise InputError(*refusal[0])
        yield


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _parse(text: str) -> dict[str, Any]:
    """Return what a lock's file says; {} when it has not been written to its end, or was damaged."""
    try:
        facts = json.loads(text)
        kinds = {"host": str, "pid": int, "restarts": int}
        whole = all(isinstance(facts[name], kind) for name, kind in kinds.items()) and 0 < facts["pid"] < 2**31
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
    return facts if whole else {}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
