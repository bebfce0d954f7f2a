"""Compute Llama's gated MLP (arXiv:2002.05202), ``w3(silu(w1 x) * w2 x)``: x (..., C), w1, w2 (I, C), w3 (C, I)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyllama.ops import float8
from tinyllama.ops.backend import Backend, quack_backend
from tinyllama.ops.linear import GradientSum, add_matmul

Linear = Callable[[Tensor], Tensor]


class Interleaved(NamedTuple):
    """The rows of w1 and w2 in turn, (2 I, C), and the sum of its gradients, to which a backward pass adds."""

    weight: Tensor
    gradient: GradientSum


def reference(x: Tensor, w1: Linear, w2: Linear, w3: Linear, w12: Interleaved | None = None) -> Tensor:
    """Call the modules for the three matmuls (perhaps in float8); torch.compile fuses the operations between them."""
    return w3(F.silu(w1(x)) * w2(x))


def xformers(
    x: Tensor, w1: torch.nn.Linear, w2: torch.nn.Linear, w3: torch.nn.Linear, w12: Interleaved | None = None
) -> Tensor:
    """Call xformers' SwiGLU, upstream's choice; it was fused on an A100 in 16 bits, until version 0.0.34."""
    from xformers.ops import swiglu

    return swiglu(x, w1.weight, None, w2.weight, None, w3.weight, None)


def quack(x: Tensor, w1: Any, w2: Any, w3: Any, w12: Interleaved | None = None) -> Tensor:
    """Call quack-kernels' matmuls with the gate fused, in both passes; backward recomputes the gate's output."""
    weight12 = w12.weight if w12 else torch.stack((w1.weight, w2.weight), dim=1).flatten(0, 1)
    sums = (*w12.gradient, *w3.weight_gradient) if w12 else ()
    out = _Quack.apply(x.flatten(0, -2), weight12, w3.weight, *sums)
    assert isinstance(out, Tensor)
    return out.view(x.shape)


class _Quack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w12: Tensor, w3: Tensor, *sums: Tensor) -> Tensor:
        out, pre_gate = _quack(x, w12, w3)
        ctx.save_for_backward(x, w12, w3, pre_gate, *sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, w12, w3, pre_gate, *sums = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        d_pre_gate, gated = _quack_backward(gradient, w3, pre_gate)
        dx = d_pre_gate @ w12
        if not sums:
            return dx, d_pre_gate.T @ x, gradient.T @ gated
        add_matmul(*sums[:2], d_pre_gate.T, x)
        add_matmul(*sums[2:], gradient.T, gated)
        return dx, *[None] * 6


@torch.library.custom_op("tinyllama::swiglu_quack", mutates_args=())
def _quack(x: Tensor, w12: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
    """Return the MLP's output (N, C) for x (N, C), and the matmul of x and ``w12`` before the gate, (N, 2 I)."""
    from quack.gemm_interface import gemm_gated

    pre_gate, gated = gemm_gated(x, w12.T, activation="swiglu", tuned=False)
    return gated @ w3.T, pre_gate


@_quack.register_fake
def _(x: Tensor, w12: Tensor, w3: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((x.size(0), w12.size(0)))


@torch.library.custom_op("tinyllama::swiglu_quack_backward", mutates_args=())
def _quack_backward(gradient: Tensor, w3: Tensor, pre_gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``pre_gate``, (N, 2 I), and the output of the gate, (N, I)."""
    from quack.gemm_interface import gemm_dgated

    d_pre_gate, gated = gemm_dgated(gradient, w3, pre_gate, activation="swiglu", config=_tile(), tuned=False)
    return d_pre_gate, gated


@functools.cache
def _tile() -> Any:
    """Return the configuration of the backward kernel: on Hopper a tile that is faster than quack's own choice."""
    from quack.gemm_config import GemmConfig

    if torch.cuda.get_device_capability()[0] != 9:
        return None  # quack's own
    return GemmConfig(tile_m=128, tile_n=128, pingpong=True, cluster_m=1, cluster_n=2, is_dynamic_persistent=False)


@_quack_backward.register_fake
def _(gradient: Tensor, w3: Tensor, pre_gate: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(pre_gate), pre_gate.new_empty((pre_gate.size(0), w3.size(1)))


SAVED = [torch.ops.tinyllama.swiglu_quack.default, *float8.SAVED]
"""operations that selective activation checkpointing must not recompute"""


BACKENDS = {
    "reference": Backend(reference),
    "quack": quack_backend(quack, half=True, module="quack.gemm_interface"),
    "xformers": Backend(
        xformers, cuda=True, module="xformers.ops", package="xformers", note="0.0.34 and newer are not fused"
    ),
    "float8": Backend(float8.swiglu, float8=True),
}

INTERLEAVED = (quack, float8.swiglu)
"""backends that take w1 and w2 as ``Interleaved``"""
