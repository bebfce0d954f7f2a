"""The recipe as upstream computed it: fp32 weights and residual stream, products in bf16 by autocast.

Arguments are train.py's.
"""

import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from tinyllama.config import cli
from tinyllama.config.args import DataArgs, PretrainArgs
from tinyllama.train.step import LossFunction, loss_function

sys.path.insert(0, str(Path(__file__).parents[2] / "pretrain"))
import train as recipe


def known_linear(x: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    """What autocast knows; ours would multiply gradients in bf16 by inputs in fp32."""
    return F.linear(x, weight)


def autocast(model: torch.nn.Module, data: DataArgs, eos_id: int | None) -> LossFunction:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, dtype=torch.bfloat16)(loss_function(model, data, eos_id))


if __name__ == "__main__":
    known = mock.patch("tinyllama.ops.linear._Linear.apply", known_linear)
    with mock.patch.object(recipe, "loss_function", autocast), known:
        cli.run(lambda: recipe.main(recipe.setup(cli.parse(PretrainArgs))))
