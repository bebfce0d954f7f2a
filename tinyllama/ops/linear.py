"""Multiply by a weight, ``x weight^T``, whose gradient may be added to a sum in fp32 instead of being returned."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, weight_gradient: Tensor | None = None) -> Tensor:
    """Multiply x (..., I) by weight (O, I) -> (..., O).

    With ``weight_gradient`` (O, I) fp32, the backward pass adds the weight's gradient to it, in the matmul that
    computes it, and autograd sees none.
    """
    if weight_gradient is None:
        return F.linear(x, weight)
    out = _Linear.apply(x, weight, weight_gradient)
    assert isinstance(out, Tensor)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, weight_gradient: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, weight_gradient)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight, weight_gradient = ctx.saved_tensors
        (gradient,) = gradients
        add_matmul(weight_gradient, gradient.flatten(0, -2).T, x.flatten(0, -2))
        return gradient @ weight, None, None


@torch.library.custom_op("tinyllama::add_matmul", mutates_args=("total",))
def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a (M, K) times b (K, N) to ``total`` (M, N) fp32, in place."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # the product is not rounded to bf16, nor stored
    else:
        total += a @ b


@add_matmul.register_fake
def _(total: Tensor, a: Tensor, b: Tensor) -> None:
    pass
