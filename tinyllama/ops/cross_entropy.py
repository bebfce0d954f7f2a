"""The language-modelling loss."""

import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""a target that is not counted"""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target] over targets != IGNORE_INDEX: logits (..., V), targets (...) -> fp32 scalar.

    A sum, for only the caller knows how many targets the whole step has, over ranks and micro-batches.
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
