"""Run as one rank of several: an error that all of them find is printed once, and a rank ends with its launcher."""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from tinyllama import InputError, stdio
from tinyllama.config import cli
from tinyllama.train.launch import (
    OTHER_LAUNCHER,
    Launch,
    LaunchError,
    cluster_environment,
    find_launch,
    torchrun_serves,
)

PATIENCE = 30.0
"""seconds that a rank with an error waits for others that may have the same one"""
NUMBERS = {
    "RANK": "TORCHELASTIC_RUN_ID",
    "SLURM_PROCID": "SLURM_STEP_ID",
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK": "PMI_SIZE",
    "PMIX_RANK": "PMIX_NAMESPACE",
}
"""what launchers call the number of a process, and what each also sets: without that, nobody may be number 0"""
PR_SET_PDEATHSIG = 1
"""asks Linux for a signal when the parent ends (prctl(2))"""


def as_rank(main: Callable[[], int]) -> int:
    """Run ``main`` as one of the ranks; an error that several ranks find is printed only once.

    When its torchrun, srun or mpirun is gone, a rank ends by SIGTERM, which saves a checkpoint. A rank that rank 0 has
    started is killed with it: without rank 0 nothing can be saved.
    """
    cli.leave_signals()  # a rank may wait for others in C, where it would not hear them; Preemption takes them later
    try:
        _end_with_launcher(find_launch())
        code = main()
        stdio.drop_unprinted()
        return code
    except LaunchError:
        env = os.environ
        if any(env.get(number, "0") != "0" and launcher in env for number, launcher in NUMBERS.items()):
            raise InputError from None  # the first process prints it
        raise
    except (InputError, OSError) as error:
        lines = cli.input_errors(error)
        if lines is None or not _print_once(lines):
            raise
        raise InputError from None  # which is printed


def _print_once(errors: Sequence[str]) -> bool:
    """Print the errors that no other rank prints, and wait until all are printed; False if ranks cannot meet."""
    try:
        if dist.is_initialized():
            rank, size, patience = dist.get_rank(), dist.get_world_size(), 5.0
        else:
            environment = cluster_environment()  # it may serve the store
            rank, size, patience = environment.global_rank(), environment.world_size(), PATIENCE
        if size == 1:
            return False
        serves = rank == 0 and not torchrun_serves()
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=serves,
            timeout=timedelta(seconds=patience),
            wait_for_workers=False,
            multi_tenant=True,
        )
        for error in errors:
            if store.add(f"found/{error}", 1) == 1:
                cli.print_error(error)
                store.set(f"printed/{error}", "")
        # the launcher may end the others as soon as one has ended
        store.wait([f"printed/{error}" for error in errors])
        store.add("failed", 1)
    except (InputError, RuntimeError):  # the server is gone, or never came: better printed twice than never
        return False
    if serves:  # it must not end before the others have asked it
        atexit.register(_await_others, store, size, time.monotonic() + patience)
    return True


def _await_others(store: dist.TCPStore, size: int, until: float) -> None:
    while store.add("failed", 0) < size and time.monotonic() < until:
        time.sleep(0.05)


def _end_with_launcher(launch: Launch | None) -> None:
    """Watch, in a thread, for the end of the process that started this rank, and send this rank a signal then.

    A rank that rank 0 has started is ended by Linux itself: while CUDA waits for a dead rank it may hold the
    interpreter's lock (torch 2.11 records events so), and no thread would run.

    An unknown launcher is not watched: it may end by design, as a script does that starts ranks in the background.
    """
    child_of_rank_0 = launch is None and "LOCAL_RANK" in os.environ  # by Fabric; without rank 0 nothing can be saved
    if child_of_rank_0 or (launch and launch.launcher != OTHER_LAUNCHER) or "OMPI_COMM_WORLD_SIZE" in os.environ:
        number, parent = signal.SIGKILL if child_of_rank_0 else signal.SIGTERM, os.getppid()
        if child_of_rank_0 and sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)

        def watch() -> None:
            while os.getppid() == parent:
                time.sleep(1)
            stdio.write_stderr(b"the launcher of this rank is gone: the rank ends\n")
            os.kill(os.getpid(), number)

        threading.Thread(target=watch, name="launcher", daemon=True).start()
