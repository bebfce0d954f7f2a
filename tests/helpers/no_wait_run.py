"""The recipe, which fails where the host waits for the GPU in a step after the second. Arguments are train.py's."""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tinyllama.config import cli
from tinyllama.config.args import PretrainArgs
from tinyllama.train.as_rank import as_rank
from tinyllama.train.step import TrainStep

sys.path.insert(0, str(Path(__file__).parents[2] / "pretrain"))
import train as recipe

call = TrainStep.__call__


def without_waiting(self: TrainStep, state: Any, *inputs: Any) -> None:
    torch.cuda.set_sync_debug_mode("error" if state.step > 1 else "default")  # before, torch.compile may
    try:
        call(self, state, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    with mock.patch.object(TrainStep, "__call__", without_waiting):
        cli.run(lambda: as_rank(lambda: recipe.main(recipe.setup(cli.parse(PretrainArgs)))))
