"""Llama's gated MLP (arXiv:2002.05202): ``w3(silu(w1 x) * w2 x)``, of x (..., C) with w1, w2 (I, C) and w3 (C, I)."""

import importlib.metadata
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyllama.ops.backend import Backend

Linear = Callable[[Tensor], Tensor]


def reference(x: Tensor, w1: Linear, w2: Linear, w3: Linear) -> Tensor:
    """The three products as the modules do them (in float8, perhaps); torch.compile fuses what is between."""
    return w3(F.silu(w1(x)) * w2(x))


def xformers(x: Tensor, w1: torch.nn.Linear, w2: torch.nn.Linear, w3: torch.nn.Linear) -> Tensor:
    """xformers' SwiGLU, upstream's choice."""
    from xformers.ops import swiglu

    return swiglu(x, w1.weight, None, w2.weight, None, w3.weight, None)


def _whether_fused() -> str | None:
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", importlib.metadata.version("xformers"))
    if found and tuple(map(int, found.groups())) >= (0, 0, 34):
        return "not fused: xformers 0.0.34 dropped its fused path"
    return "fused on an A100 only, in 16 bits"


BACKENDS = {
    "reference": Backend(reference),
    "xformers": Backend(xformers, cuda=True, module="xformers.ops", package="xformers", notes=_whether_fused),
}
