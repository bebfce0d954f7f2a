"""Tiny runs of the recipe on ranks of this machine, and what they leave behind."""

import contextlib
import csv
import itertools
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from processes import Group, Process

from tinyllama.checkpoint import reader
from tinyllama.checkpoint.names import step_dir

ROOT = Path(__file__).parents[2]
SHORT = ["--train.max_steps", 12, "--checkpoint.interval", 4, "--eval.interval", 100]


class World(Group):
    """Ranks that wait for commands; see rank.py. To the recipe, they are those of so many nodes."""

    def __init__(self, size: int, nodes: int = 1) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        # what torchrun sets
        local = size // nodes
        env = dict(os.environ, WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(local), TORCHELASTIC_RUN_ID="tests")
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, ROOT / "tests" / "helpers" / "rank.py"]
        numbers = [
            {"RANK": str(rank), "LOCAL_RANK": str(rank % local), "GROUP_RANK": str(rank // local)}
            for rank in range(size)
        ]
        super().__init__([Process(*command, warm=r, env=env | n, cwd=ROOT) for r, n in enumerate(numbers)])

    def __call__(self, command: str, *argv: object) -> list[dict[str, Any]]:
        """Run ``command`` on every rank; gives their answers."""
        return self.ask([command, [str(word) for word in argv]])

    def train(self, *argv: object) -> str:
        """Run the recipe to its end; gives what rank 0 said."""
        answers = self("train", *argv)
        assert [answer.get("result") for answer in answers] == [0] * len(answers), answers
        return answers[0]["said"]


def metrics(out_dir: Path) -> list[dict[str, str]]:
    with (out_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(out_dir: Path, name: str) -> list[float]:
    return [float(row[name]) for row in metrics(out_dir) if row[name]]


def tensors(step_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, of model and optimizer."""
    storage = reader._Reader(step_dir)
    entries = storage.read_metadata().state_dict_metadata
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    torch.distributed.checkpoint.load(found, storage_reader=storage, no_dist=True)
    return found


def branch(out_dir: Path, step: int) -> Path:
    """A copy of the run as it was at ``step``."""
    copy = out_dir.with_name(f"{out_dir.name}-from-{step}")
    shutil.copytree(step_dir(out_dir / "checkpoints", step), step_dir(copy / "checkpoints", step))
    shutil.copy(out_dir / "metrics.csv", copy)
    return copy


@contextlib.contextmanager
def beating(path: Path, times: Any = None) -> Iterator[None]:
    """A heart that touches ``path``, wherever it is not just being renamed, until the context ends."""
    ended = threading.Event()

    def beat() -> None:
        for seconds in itertools.cycle(times or [None]):
            if ended.wait(0.002):
                return
            with contextlib.suppress(FileNotFoundError):
                os.utime(path, seconds and (seconds, seconds))

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
