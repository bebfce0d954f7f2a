"""Watch the ranks of a run: record where each one is and, when they stall, name the one that did not arrive.

Each rank keeps out_dir/heartbeat/rank-00003.json. In a stall every rank adds its stacks (rank-00003.stacks.txt) and
what NCCL has recorded (``torchfrtrace OUT_DIR/heartbeat --prefix nccl_rank_``), one line names the rank to look at, on
stderr and in verdict.txt, and every process exits with 1, so that the launcher ends the job and the batch script
starts it again.
"""

import contextlib
import faulthandler
import json
import os
import re
import socket
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Literal, Self

import torch
import torch.distributed as dist

from tinyllama import InputError, printable, stdio
from tinyllama.train.lock import end_if_lost

Phase = Literal["start", "step", "validation", "checkpoint", "end"]

STDERR = 2  # the descriptor, which is there when sys.stderr is closed
DIAGNOSIS = "verdict.txt"


@dataclass(frozen=True)
class Heartbeat:
    """The content of a rank's heartbeat file."""

    rank: int
    host: str
    pid: int
    step: int
    """optimizer steps done"""
    phase: str
    """of the last beat; ``failed`` once an exception has ended the loop"""
    beats: int
    """so far: all ranks give the same ones, so the rank with the fewest is the one behind"""
    seconds_since_beat: float
    time: str
    """of writing, UTC"""
    stalled_at: str | None
    """where the main thread was when this rank saw the stall"""
    waiting: bool
    """whether it waited for other ranks there"""

    def age(self) -> float:
        """Return the seconds since it was written, by this machine's clock."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.time)).total_seconds()

    def __str__(self) -> str:
        place = f", in {self.stalled_at}" if self.stalled_at else ""
        return f"rank {self.rank} ({self.host}, pid {self.pid}; {self.phase} after step {self.step}{place})"


class Watchdog:
    """Watches this rank's training loop, from ``with`` to its end; one at a time in a process.

    The main thread may hang in a collective, and the file system may hang as well, so there are two more: one only
    writes heartbeats, the other only looks at the clock. Neither runs while C code holds the interpreter's lock, so
    the second keeps resetting faulthandler's timer, a thread in C that needs no lock to print the stacks and exit. It
    prints to stderr, as writing a file could hang too; the other ranks notice that its heartbeat has stopped. Should it
    crash over frames that change meanwhile, the process has ended all the same.
    """

    def __init__(self, out_dir: Path, *, rank: int, world_size: int, first_timeout: float, timeout: float) -> None:
        """Watch for a stall: ``timeout`` seconds without a beat in steps after the first one, when ranks run evenly;
        ``first_timeout`` seconds before that, and in every other phase."""
        self._out_dir, self._folder = out_dir, out_dir / "heartbeat"
        self._name = f"rank-{rank:05d}"
        self._rank, self._world_size = rank, world_size
        self._first_timeout, self._timeout = first_timeout, timeout
        self._interval = min(5.0, timeout / 10)
        self._grace = min(15.0, timeout / 2)  # for the other ranks to say where they are
        self._first_step: int | None = None
        self._last = (0.0, 0, "start", 0)  # when, step, phase, beats: replaced whole, so never torn
        self._stalled_at: str | None = None
        self._waiting = False
        self.on_stall: Callable[[str], None] = lambda text: None  # called with the reason before this process ends
        self._ended = threading.Event()
        self._writer = threading.Thread(target=self._write, name="heartbeat", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.iterdir():  # left by an earlier job, perhaps of more ranks
                match = re.match(r"(?:nccl_rank_|rank-)(\d+)", path.name)
                number = int(match[1]) if match else -1
                if number == self._rank or (self._rank == 0 and number >= self._world_size) or path.name == DIAGNOSIS:
                    path.unlink(missing_ok=True)
            self._mounted = self._out_dir.stat()
        except OSError as error:
            raise InputError(f"cannot write or remove {error.filename} ({error.strerror}): move it away") from None
        self._last = (time.monotonic(), 0, "start", 0)
        self._writer.start()
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        _, step, _, beats = self._last
        self._last = (time.monotonic(), step, "failed" if kind else "end", beats)
        self._ended.set()
        self._watcher.join()
        self._writer.join(self._grace)  # a file system that hangs from here on is no longer this watch's concern
        faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int, phase: Phase) -> None:
        """Say that ``phase`` begins or continues after ``step`` optimizer steps; costs a microsecond.

        All ranks must give the same beats, since the one that gave fewer is held to be behind.
        """
        if phase == "step" and self._first_step is None:
            self._first_step = step
        self._last = (time.monotonic(), step, phase, self._last[3] + 1)

    def _write(self) -> None:
        """Write this rank's file every few seconds and once more at the end; end the process if its folder is gone."""
        path = self._folder / f"{self._name}.json"
        unfinished = path.with_suffix(".tmp")
        who = (self._rank, socket.gethostname(), os.getpid())
        ended = False
        while not ended:
            ended = self._ended.is_set()
            at, step, phase, beats = self._last
            since, now = round(time.monotonic() - at, 3), datetime.now(UTC).isoformat()
            heartbeat = Heartbeat(*who, step, phase, beats, since, now, self._stalled_at, self._waiting)
            with contextlib.suppress(OSError):  # a full disk is for the checkpoint to report, and may pass
                end_if_lost(self._out_dir, self._mounted, path)
                unfinished.write_text(json.dumps(asdict(heartbeat)) + "\n", encoding="utf-8")
                unfinished.replace(path)
            self._ended.wait(self._interval)

    def _watch(self) -> None:
        """Look at the clock until the end or a stall."""
        while True:
            at, step, phase, _ = self._last
            steady = phase == "step" and self._first_step is not None and step > self._first_step
            limit = self._timeout if steady else self._first_timeout
            left = at + limit - time.monotonic()
            if left < 0:
                self._give_up(limit, f"{phase} after step {step}")
            # fires only when this thread is kept from running, and while the other ranks wait for a word from this one
            timer = left + self._interval + self._grace / 2
            faulthandler.dump_traceback_later(timer, exit=True, file=STDERR)
            if self._ended.wait(self._interval):
                return

    def _give_up(self, limit: float, where: str) -> None:
        """Say where this rank is, wait until the others have, let one rank name who is missing, and exit."""
        try:
            faulthandler.dump_traceback_later(4 * self._grace, exit=True, file=STDERR)  # should what follows hang
            stacks = _stacks()
            said = f"watchdog: rank {self._rank}: no progress for {limit:g} s, {where}\n".encode()
            stdio.write_stderr(said + stacks)
            self._stalled_at, self._waiting = _place(sys._current_frames().get(threading.main_thread().ident or 0))
            with contextlib.suppress(OSError):
                (self._folder / f"{self._name}.stacks.txt").write_bytes(stacks)
                _dump_nccl(self._folder / f"nccl_rank_{self._rank}")
            deadline = time.monotonic() + self._grace
            stalled = 0
            while stalled < self._world_size and time.monotonic() < deadline:
                time.sleep(self._interval / 5)
                stalled = sum(beat.stalled_at is not None for beat in read(self._folder, self._world_size))
            reason = printable(diagnosis(self._folder, self._world_size, limit))
            self._name_once(f"{reason}\n".encode())
            self.on_stall(reason)
        except BaseException:
            stdio.write_stderr(traceback.format_exc().encode())
        finally:
            os._exit(1)  # sys.exit would end this thread only

    def _name_once(self, line: bytes) -> None:
        """Print ``line`` unless another rank has: one that was stopped and wakes up later would tell another story."""
        try:
            with (self._folder / DIAGNOSIS).open("xb") as file:
                file.write(line)
        except FileExistsError:
            time.sleep(self._grace / 5)  # the launcher ends all ranks when the first one exits
            return
        except OSError:
            pass  # no file can be written: better that two ranks print it than none
        stdio.write_stderr(b"watchdog: " + line)


def read(folder: Path, world_size: int) -> list[Heartbeat]:
    """Read the heartbeats of the ranks that have one, but for damaged ones."""
    found = []
    for rank in range(world_size):
        with contextlib.suppress(OSError, ValueError, TypeError):
            text = (folder / f"rank-{rank:05d}.json").read_text(encoding="utf-8")
            found.append(Heartbeat(**json.loads(text)))
    return found


def diagnosis(folder: Path, world_size: int, limit: float) -> str:
    """Return one line that names the ranks to look at after a stall of ``limit`` seconds.

    They are those without a sign of life, else those that gave fewer beats than others, else those that do not wait
    for others.
    """
    seen = read(folder, world_size)
    named = [f"rank {rank} (never started)" for rank in sorted(set(range(world_size)) - {beat.rank for beat in seen})]
    # heartbeats are written many times in ``limit``; half of it forgives clocks that differ by seconds
    silent = [beat for beat in seen if beat.phase != "end" and (beat.age() > limit / 2 or beat.phase == "failed")]
    named += [f"{beat}, silent for {beat.age():.0f} s" for beat in silent]
    problem = "dead, stopped or stuck in C code"
    if not named:
        problem = "did not arrive"
        behind = [beat for beat in seen if beat.beats == min(other.beats for other in seen)]
        if len(behind) == world_size:
            behind = [beat for beat in seen if not beat.waiting] or seen
        if len(behind) == world_size > 1:
            return f"all {world_size} ranks arrived at the same place: {seen[0]}"
        named = [str(beat) for beat in behind]
    return f"{problem}: {', '.join(named[:8])}" + (f" and {len(named) - 8} more" if len(named) > 8 else "")


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Return the innermost line of our own code with what it calls, and whether that waits for other ranks."""
    foreign = (f"{sysconfig.get_path('stdlib')}/", "/site-packages/", "/dist-packages/", "<frozen")
    called, waiting = "", False
    while frame is not None:
        file = frame.f_code.co_filename
        here = f"{'/'.join(Path(file).parts[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        if not any(part in file for part in foreign):
            return here + (f" > {called}" if called else ""), waiting
        called = called or here
        waiting = waiting or "torch/distributed/" in file
        frame = frame.f_back
    return called or "no Python code", waiting


def _stacks() -> bytes:
    """Return where every thread is; faulthandler writes letter by letter, and the stacks of several ranks would mix."""
    try:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            return file.read()
    except OSError:  # a full disk
        faulthandler.dump_traceback(STDERR)
        return b""


def _dump_nccl(path: Path) -> None:
    """Save what NCCL's flight recorder holds: the collectives that this rank has started and finished."""
    if torch.cuda.is_initialized() and dist.is_nccl_available():
        from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]  # not in every build

        path.write_bytes(_dump_nccl_trace())
