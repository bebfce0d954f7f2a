"""Llama's gated MLP (arXiv:2002.05202): ``w3(silu(w1 x) * w2 x)``, of x (..., C) with w1, w2 (I, C) and w3 (C, I)."""

import importlib.metadata
import re
from collections.abc import Callable
from typing import Any

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


def quack(x: Tensor, w1: torch.nn.Linear, w2: torch.nn.Linear, w3: torch.nn.Linear) -> Tensor:
    """quack-kernels' products with the gate inside, in both passes; what the gate gives is made again, not kept."""
    both = torch.stack((w1.weight, w2.weight), dim=1).flatten(0, 1)  # (2 I, C), the rows of w1 and w2 in turn
    out, _ = _quack(x.flatten(0, -2), both, w3.weight)
    return out.view(x.shape)


@torch.library.custom_op("tinyllama::swiglu_quack", mutates_args=())
def _quack(x: Tensor, both: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
    """The MLP of x (N, C), (N, C), and its products with ``both`` before the gate, (N, 2 I)."""
    from quack.gemm_interface import gemm_gated

    products, gated = gemm_gated(x, both.T, activation="swiglu", tuned=False)
    return gated @ w3.T, products


@_quack.register_fake
def _(x: Tensor, both: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((x.size(0), both.size(0)))


@torch.library.custom_op("tinyllama::swiglu_quack_backward", mutates_args=())
def _quack_backward(gradient: Tensor, w3: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``products``, (N, 2 I), and what the gate gave, (N, I)."""
    from quack.gemm_interface import gemm_dgated

    of_products, gated = gemm_dgated(gradient, w3, products, activation="swiglu", tuned=False)
    return of_products, gated


@_quack_backward.register_fake
def _(gradient: Tensor, w3: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(products), products.new_empty((products.size(0), w3.size(1)))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, both, w3, products = ctx.saved_tensors
    of_products, gated = _quack_backward(gradient.contiguous(), w3, products)
    return of_products @ both, of_products.T @ x, gradient.T @ gated


_quack.register_autograd(_gradients, setup_context=_keep)


SAVED = [torch.ops.tinyllama.swiglu_quack.default]
"""What selective activation checkpointing must not compute again."""


def _whether_fused() -> str | None:
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", importlib.metadata.version("xformers"))
    if found and tuple(map(int, found.groups())) >= (0, 0, 34):
        return "not fused: xformers 0.0.34 dropped its fused path"
    return "fused on an A100 only, in 16 bits"


BACKENDS = {
    "reference": Backend(reference),
    "quack": Backend(
        quack, cuda=True, half=True, capability=(9, 0), multiple=8, module="quack", package="quack-kernels"
    ),
    "xformers": Backend(xformers, cuda=True, module="xformers.ops", package="xformers", notes=_whether_fused),
}
