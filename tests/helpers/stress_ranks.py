"""A run of two ranks that is disturbed again and again, each time in one of the ways of ``KINDS``, until it is done.

    python stress_ranks.py [--mount] DISTURBANCES SEED ARGUMENTS...

ARGUMENTS are train.py's; with --mount, in a mount namespace of its own, the run's folder is on a small disk of its own.
Prints a line of JSON for each start: what was done to it and whether it came to that, the newest sound step that it
found and the one that it resumed from (null: it did not come so far), the launcher's exit code, what the watchdog said,
and the step and file that were damaged afterwards. Torch is imported once: launcher and ranks are forks.
"""

import contextlib
import ctypes
import json
import mmap
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tinyllama.checkpoint import names, reader
from tinyllama.config import cli
from tinyllama.config.args import PretrainArgs
from tinyllama.monitor import watchdog
from tinyllama.train import lock

sys.path.insert(0, str(Path(__file__).parents[2] / "pretrain"))
import train as recipe

LIMIT = 600.0
"""seconds that a start may take; then its ranks are stuck"""
DISK = "8m"
"""room for three checkpoints and more, and soon full"""
LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_CHILD_SUBREAPER, MNT_DETACH = 36, 2


class Folder:
    """The run's folder. With ``mount`` it is bound to a folder of a small disk, which outlives its being unmounted."""

    def __init__(self, path: Path, mount: bool) -> None:
        self.path, self.mounted = path, mount
        self._disk = path.with_name(f"{path.name}-disk")
        if mount:
            self._disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", self._disk], check=True)
            (self._disk / "run").mkdir()
            path.mkdir()
            self._bind()

    def _bind(self) -> None:
        subprocess.run(["mount", "--bind", self._disk / "run", self.path], check=True)

    def fill(self) -> None:
        """Leave no room for this process, until it ends."""
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
            return

        def fill() -> None:
            with (self._disk / "ballast").open("ab", buffering=0) as file:
                while True:  # old steps that are removed make room, too
                    with contextlib.suppress(OSError):
                        file.write(bytes(4096))
                        continue
                    time.sleep(0.01)

        threading.Thread(target=fill, daemon=True).start()

    def unmount(self) -> None:
        """Take the folder away from under the run; what it writes from now on is lost."""
        LIBC.umount2(bytes(self.path), MNT_DETACH)

    def restore(self) -> None:
        """Give room again, and mount it if it is not."""
        (self._disk / "ballast").unlink(missing_ok=True)
        if self.mounted and not self.path.is_mount():
            shutil.rmtree(self.path)
            self.path.mkdir()
            self._bind()

    def keep(self) -> None:
        """Copy what is there to where it is seen after the end of the namespace."""
        if self.mounted:
            self.unmount()
            shutil.copytree(self._disk / "run", self.path, dirs_exist_ok=True)


def cut(file: Path, choice: random.Random) -> None:
    """Truncate ``file``."""
    os.truncate(file, choice.randrange(file.stat().st_size - 1))  # a last line end may go unmissed


def flip(file: Path, choice: random.Random) -> None:
    """Flip a bit of ``file``."""
    content = bytearray(file.read_bytes())
    content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
    file.write_bytes(content)


def kill_all(folder: Folder | None = None) -> None:
    """End both ranks and their launcher at once, as a node that dies does."""
    os.killpg(0, signal.SIGKILL)


# what a rank does at its moment
IN_A_RUN: dict[str, Callable[[Folder], None]] = {
    "kill of a rank": lambda folder: os.kill(os.getpid(), signal.SIGKILL),
    "kill of all": kill_all,
    "kill of the launcher": lambda folder: os.kill(os.getppid(), signal.SIGKILL),
    "stop of a rank": lambda folder: os.kill(os.getpid(), signal.SIGSTOP),
    "full disk": Folder.fill,
    "unmounted folder": Folder.unmount,
}
# what is done to a file of the newest step, once all are killed
TO_A_FILE: dict[str, Callable[[Path, random.Random], None]] = {
    "removed file": lambda file, choice: file.unlink(),
    "truncated file": cut,
    "flipped bit": flip,
}
NEED_MOUNT = {"unmounted folder"}
KINDS = [*IN_A_RUN, *TO_A_FILE]


def at_call(number: int, function: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    """``function``, but ``act`` comes before its ``number``-th call."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return function(*args, **kwargs)

    return counted


def at_a_moment(choice: random.Random, rank: int, kind: str, act: Callable[[], None]) -> None:
    """Let this rank ``act`` at a random moment: some time after a step, or at a file of a save."""
    moment = choice.choice(["step", "fsync", "fsync" if rank else "remove"])  # rank 0 removes
    if moment == "step" or kind == "stop of a rank":  # where the watchdog has the short limit
        after, delay, lr_at = choice.randrange(2, 9), choice.uniform(0, 0.04), recipe.Run.lr_at
        fit, steps = recipe.fit, -1

        def begin(training: Any) -> int:
            nonlocal steps
            steps = 0  # the summary has asked for learning rates, too
            return fit(training)

        def timed(run: Any, step: int) -> float:
            nonlocal steps
            if steps >= 0 and threading.current_thread() is threading.main_thread():
                steps += 1
                if steps == after:
                    threading.Timer(delay, act).start()
            return lr_at(run, step)

        recipe.fit = begin
        recipe.Run.lr_at = timed  # type: ignore[method-assign]
    elif moment == "fsync":  # tensors, metadata, settings, state, before and after the rename
        os.fsync = at_call(choice.randrange(1, 24 if rank == 0 else 4), os.fsync, act)
    else:  # of what an earlier save left, or of old steps
        shutil.rmtree = at_call(choice.randrange(1, 5), shutil.rmtree, act)


def launch(argv: list[str], prepare: Callable[[int], None], choice: random.Random) -> int:
    """Run two ranks, as torchrun does: when one fails, the other is killed. Returns 1 if one has failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "stress", "GROUP_RANK": "0"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(2):
        ranks.append(os.fork())
        if ranks[-1]:
            continue
        os.environ.update(env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        torch.set_num_threads(1)
        try:
            prepare(rank)
            os._exit(recipe.main(recipe.setup(cli.parse(PretrainArgs, argv))))
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    first, status = os.wait()
    if status:
        time.sleep(choice.uniform(0, 0.3))
        os.kill(next(rank for rank in ranks if rank != first), signal.SIGKILL)
    _, other = os.wait()
    return int(bool(status or other))


def start(argv: list[str], kind: str | None, folder: Folder, choice: random.Random) -> tuple[int, bool]:
    """Start the run and disturb it; returns the launcher's exit code, and whether it came to the disturbance."""
    came = mmap.mmap(-1, 1)  # shared with the ranks
    doomed = choice.randrange(2)
    act = IN_A_RUN.get(kind, kill_all) if kind else None

    def disturb() -> None:
        came[0] = 1
        assert act is not None
        act(folder)

    def prepare(rank: int) -> None:
        if kind and rank == doomed:
            at_a_moment(choice, rank, kind, disturb)

    launcher = os.fork()
    if launcher == 0:
        os.setpgid(0, 0)
        os.dup2(2, 1)  # stdout is for our lines
        os._exit(launch(argv, prepare, choice))

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher, signal.SIGKILL)

    stuck = threading.Timer(LIMIT, end)
    stuck.start()
    _, status = os.waitpid(launcher, 0)
    time.sleep(choice.uniform(0, 0.5))  # ranks without a launcher, before somebody ends them
    end()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    assert stuck.is_alive(), f"two ranks did not come to their end in {LIMIT} s"
    stuck.cancel()
    return os.waitstatus_to_exitcode(status), came[0] == 1


def sound(folder: Folder, damaged: set[int]) -> list[Path]:
    """The steps that are complete, and not among those that we have ``damaged``, by their inodes."""
    steps = [path for _, path in names.step_dirs(folder.path / "checkpoints")]
    return [path for path in steps if path.stat().st_ino not in damaged and reader.problem(path) is None]


def main() -> None:
    mount = sys.argv[1] == "--mount"
    disturbances, seed, *argv = sys.argv[1 + mount :]
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)  # ranks whose launcher is dead become ours
    lock.BEAT = 0.2  # a tiny run would be over before it looks at its folder
    choice = random.Random(int(seed))
    kinds = [kind for kind in KINDS if mount or kind not in NEED_MOUNT]
    waiting: list[str] = []
    while len(waiting) < int(disturbances):
        waiting += choice.sample(kinds, len(kinds))
    del waiting[int(disturbances) :]
    folder = Folder(Path(cli.parse(PretrainArgs, argv).out_dir), mount)
    events, done = folder.path / "events.jsonl", False
    damaged: set[int] = set()
    while not done:
        kind = waiting.pop(0) if waiting else None
        before = sound(folder, damaged)
        said = events.stat().st_size if events.exists() else 0
        code, came = start(argv, kind, folder, choice)
        folder.restore()
        lines = events.read_text()[said:].splitlines() if events.exists() else []
        resumed = [event["step"] for event in map(json.loads, lines) if event["event"] == "start"]
        diagnosis = folder.path / "heartbeat" / watchdog.DIAGNOSIS
        result = {
            "kind": kind,
            "newest": names.step_of(before[-1]) if before else 0,
            "resumed": resumed[0] if resumed else None,
            "exit": code,
            "diagnosis": diagnosis.read_text() if diagnosis.exists() else None,
            "damaged": None,
        }
        if kind in TO_A_FILE and came:
            *others, last = sound(folder, damaged) or [None]
            came = bool(others)  # there is one to resume from
            if others:
                file = choice.choice(sorted(last.iterdir()))
                damaged.add(last.stat().st_ino)
                TO_A_FILE[kind](file, choice)
                result["damaged"] = [names.step_of(last), file.name]
        done = code == 0 and not came  # one whose folder is gone is not done
        if kind and not came and not done:  # killed before there was a step to resume from, perhaps
            waiting.append(kind)
        print(json.dumps(result | {"came": came}), flush=True)
    folder.keep()


if __name__ == "__main__":
    main()
