"""The recipe with algorithms that give the same bits every time. Arguments are train.py's."""

import os
import sys
from pathlib import Path

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS reads it when it starts

import torch

from tinyllama.config import cli
from tinyllama.config.args import PretrainArgs
from tinyllama.train.as_rank import as_rank

sys.path.insert(0, str(Path(__file__).parents[2] / "pretrain"))
import train as recipe

if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    cli.run(lambda: as_rank(lambda: recipe.main(recipe.setup(cli.parse(PretrainArgs)))))
