"""The gated activation of Llama's MLP (arXiv:2002.05202)."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, element by element: two tensors of one shape and dtype -> the same."""
    return F.silu(gate) * up
