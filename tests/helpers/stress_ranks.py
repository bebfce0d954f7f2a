"""A run of two ranks that are killed, again and again, at random moments and at those of a save.

    python stress_ranks.py KILLS ARGUMENTS...

ARGUMENTS are train.py's. Prints, as JSON, for each start the newest complete checkpoint's step and the one that the run
went on from (null: it did not come so far), and the signal or status that each rank ended with. Torch is imported once:
every rank is a fork.
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tinyllama.checkpoint import reader
from tinyllama.config import cli
from tinyllama.config.args import PretrainArgs

sys.path.insert(0, str(Path(__file__).parents[2] / "pretrain"))
import train as recipe

LIMIT = 600.0
"""seconds that a start may take; then its ranks are stuck"""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, but the process is killed when it is called for the ``call``-th time."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            die()
        return function(*args, **kwargs)

    return counted


def doom(choice: random.Random, rank: int) -> None:
    """Decide when this rank is killed: a moment after some step, or at a file of a save."""
    kind = choice.choice(["step", "fsync", "fsync" if rank else "remove"])  # rank 0 removes
    if kind == "step":
        last, moment, lr_at = choice.randrange(8), choice.uniform(0, 0.04), recipe.Run.lr_at
        steps = 0

        def timed(run: Any, step: int) -> float:
            nonlocal steps
            if threading.current_thread() is threading.main_thread() and started:
                if steps == last:
                    threading.Timer(moment, die).start()
                steps += 1
            return lr_at(run, step)

        started = []  # the summary asks too, before the first step
        fit = recipe.fit
        recipe.fit = lambda *args: (started.append(1), fit(*args))[1]
        recipe.Run.lr_at = timed  # type: ignore[method-assign]
    elif kind == "fsync":  # tensors, metadata, settings, state, before and after the rename
        os.fsync = dying_at(choice.randrange(1, 24 if rank == 0 else 4), os.fsync)
    else:  # of what an earlier save left, or of old steps
        shutil.rmtree = dying_at(choice.randrange(1, 5), shutil.rmtree)


def start(argv: list[str], doomed: int | None, choice: random.Random) -> list[int]:
    """Run two ranks, of which one may be doomed, until both are gone; gives how they ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "stress", "GROUP_RANK": "0"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if pids[-1]:
            continue
        os.environ.update(env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        torch.set_num_threads(1)
        try:
            if rank == doomed:
                doom(choice, rank)
            os._exit(recipe.main(recipe.setup(cli.parse(PretrainArgs, argv))))
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    codes = {}
    stuck = threading.Timer(LIMIT, lambda: [os.kill(pid, signal.SIGKILL) for pid in pids if pid not in codes])
    stuck.start()
    while len(codes) < 2:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if len(codes) == 1 and codes[pid]:
            time.sleep(choice.uniform(0, 0.3))
            os.kill(next(other for other in pids if other != pid), signal.SIGKILL)  # as the launcher does
    assert stuck.is_alive(), f"two ranks did not come to their end in {LIMIT} s: {codes}"
    stuck.cancel()
    return [codes[pid] for pid in pids]


def main() -> None:
    kills, argv = int(sys.argv[1]), sys.argv[2:]
    out_dir = Path(cli.parse(PretrainArgs, argv).out_dir)
    events = out_dir / "events.jsonl"
    done = 0
    for seed in range(2 * kills + 1):  # some have ended before their kill
        choice = random.Random(seed)
        newest, _ = reader.newest(out_dir / "checkpoints")
        said = events.stat().st_size if events.exists() else 0
        codes = start(argv, choice.randrange(2) if done < kills else None, choice)
        lines = events.read_text()[said:].splitlines() if events.exists() else []
        went_on = [event["step"] for event in map(json.loads, lines) if event["event"] == "start"]
        step = int(newest.name.removeprefix("step-")) if newest else 0
        print(json.dumps([step, went_on[0] if went_on else None, codes]), flush=True)
        done += -signal.SIGKILL in codes
        if codes == [0, 0]:
            return


if __name__ == "__main__":
    main()
