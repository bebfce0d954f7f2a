"""Spread inputs over worker processes, and know which worker died on which input: each has a pipe of its own.

The shared queue of a pool would lose both, and wait forever for the result of a dead worker.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from tinyllama import InputError
from tinyllama.prepare.encode import Mismatch
from tinyllama.prepare.inputs import Input, NotFetched

Work = Callable[[Input], Any]

_MAX_LOST = 3  # inputs lost while none is done: then the inputs are not the cause


class WorkerDied(RuntimeError):
    """A worker was killed, ran out of memory or crashed, twice on the same input."""


class NotSetUp(InputError):
    """No worker can be set up, because something that all of them need has changed or is gone; no input is to blame."""


def over_workers(
    todo: Sequence[Input], setup: Callable[[Any], Work], recipe: Any, workers: int
) -> Iterator[tuple[Input, Any]]:
    """Yield each input with its result, or with its InputError, Mismatch, NotFetched or WorkerDied.

    ``setup(recipe)``, called once in each process, returns the function that computes an input's result. Results come
    as they are ready. The largest input is started first, so that none is left running alone at the end. An input whose
    worker died is given to a new worker once. Raises the first OSError of a worker, which the others would meet, too;
    NotSetUp if ``setup`` raises InputError; and WorkerDied or NotFetched if the first ``_MAX_LOST`` outcomes are such.
    """
    queue = sorted(todo, key=lambda one: one.size)
    idle: dict[Any, SpawnProcess] = {}  # by our end of the pipe
    busy: dict[Any, tuple[SpawnProcess, Input]] = {}
    died: set[str] = set()  # shards whose worker died once
    lost = done = 0
    try:
        while queue or busy:
            while queue and len(busy) < workers:
                pipe, process = idle.popitem() if idle else _start(setup, recipe)
                busy[pipe] = process, queue.pop()
                with contextlib.suppress(OSError):  # a worker that is dead already: its pipe is at its end
                    pipe.send(busy[pipe][1])
            ready: Any = wait(list(busy))
            for pipe in ready:
                process, one = busy.pop(pipe)
                try:
                    outcome = pipe.recv()
                except (EOFError, OSError):
                    process.join()
                    if one.shard not in died:
                        died.add(one.shard)
                        queue.append(one)
                        continue
                    outcome = WorkerDied(
                        f"{one.path}: its worker died twice (exit code {process.exitcode}; -9: killed, perhaps for "
                        "want of memory, then give fewer --workers; -6 or -11: a library crashed, then repair or "
                        "remove the file): run the command again, what is done is kept"
                    )
                else:
                    idle[pipe] = process
                lost += isinstance(outcome, WorkerDied | NotFetched)
                done += not isinstance(outcome, WorkerDied | NotFetched)
                if isinstance(outcome, OSError | NotSetUp) or (lost == _MAX_LOST and not done):
                    raise outcome
                yield one, outcome
    finally:
        for process in [*idle.values(), *(process for process, _ in busy.values())]:
            process.kill()
            process.join()


def _start(setup: Callable[[Any], Work], recipe: Any) -> tuple[Any, SpawnProcess]:
    """Start a worker; returns our end of its pipe, and the process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, setup, recipe), daemon=True)
    with huge_pages():
        process.start()
    theirs.close()
    return ours, process


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Processes that start meanwhile ask for memory in pages of 2 MB: the fast encoder finds words in its cache sooner.

    glibc reads the wish at a process's start; where it or the kernel knows no such pages, nothing changes.
    """
    before = os.environ.get("GLIBC_TUNABLES")
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1" + (f":{before}" if before else "")
    try:
        yield
    finally:
        if before is None:
            del os.environ["GLIBC_TUNABLES"]
        else:
            os.environ["GLIBC_TUNABLES"] = before


def _work(pipe: Connection, setup: Callable[[Any], Work], recipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process of a terminal; the parent answers it
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        work = setup(recipe)
    except InputError as error:
        pipe.recv()  # the input that it is not about; left unread, it would reset the pipe
        pipe.send(NotSetUp(*error.args))
        return
    while True:
        one = pipe.recv()
        try:
            outcome = work(one)
        except (InputError, OSError, NotFetched) as error:
            outcome = error
        except Mismatch as error:
            outcome = Mismatch(f"{one.path}: {error}")
        pipe.send(outcome)


def _die_with_parent() -> None:
    """A worker whose parent was killed -9 would else work on, beside the workers of the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def cores() -> int:
    """Cores this process may use: in a container or a Slurm job fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
