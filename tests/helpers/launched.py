"""A process for launchers to start: ``fail ERROR...``, ``wait`` for the end, or say where it listens."""

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from tinyllama import InputError
from tinyllama.config import cli
from tinyllama.config.args import ParallelArgs, TrainArgs
from tinyllama.train.as_rank import as_rank
from tinyllama.train.launch import find_world
from tinyllama.train.parallel import build_fabric


def fail(*errors: str) -> int:
    """Find errors in the input."""
    raise InputError(*errors)


def wait(how: str = "") -> int:
    """Say that it watches its launcher, if it does, and wait for a signal or a line; "in C", where no thread runs."""

    def end(number: int, frame: object) -> None:
        print("SIGTERM", flush=True)
        sys.exit(75)

    signal.signal(signal.SIGTERM, end)
    print(" ".join(thread.name for thread in threading.enumerate() if thread.name == "launcher"), flush=True)
    if how == "in C":
        ctypes.PyDLL(None).sleep(1000)  # which keeps the interpreter's lock
    print(sys.stdin.readline().strip(), flush=True)
    return 0


def listeners() -> int:
    """Print the addresses, in hexadecimal, at which this rank listens, once gloo has connected it with the others."""
    fabric = build_fabric(find_world(ParallelArgs()), ParallelArgs(), TrainArgs())
    fabric.launch()
    dist.all_reduce(torch.ones(1))
    sockets = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    found = {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}
    sys.stdout.write(" ".join(sorted(found)) + "\n")  # at once: under torchrun both ranks have one stdout
    sys.stdout.flush()
    fabric.barrier()
    return 0


def served() -> int:
    """Print the addresses, in hexadecimal, at which this machine listens on the port of the ranks' store."""
    fabric = build_fabric(find_world(ParallelArgs()), ParallelArgs(), TrainArgs())
    fabric.launch()
    port = f"{int(os.environ['MASTER_PORT']):04X}"
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = [local.split(":") for _, local, _, state, *_ in lines if state == "0A"]
    print(*(address for address, listens_on in listening if listens_on == port))
    fabric.barrier()
    return 0


if __name__ == "__main__":
    cli.run(lambda: as_rank(lambda: globals()[sys.argv[1]](*sys.argv[2:])))
