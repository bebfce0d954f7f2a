"""Multiply by a weight, ``x weight^T``, whose gradient may be added to a sum in fp32 instead of being returned."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class GradientSum(NamedTuple):
    """The sum of a weight's gradients over the backward passes of a step; the first one writes it."""

    total: Tensor
    """fp32, in the weight's shape; what it holds means nothing while it is ``empty``"""
    empty: Tensor
    """() bool on the CPU, so that reading it waits for nothing: whether no gradient of this step is in ``total``"""

    def add(self, gradient: Tensor) -> None:
        """Add ``gradient``, in place."""
        if self.empty:
            self.total.copy_(gradient)
            self.empty.fill_(False)
        else:
            self.total.add_(gradient)

    def add_scaled(self, gradient: Tensor, scale: Tensor) -> None:
        """Add ``gradient``, fp32, times ``scale``, () fp32, in place."""
        if self.empty:
            torch.mul(gradient, scale, out=self.total)
            self.empty.fill_(False)
        else:
            self.total.addcmul_(gradient, scale)


def empty_sum(weight: Tensor) -> GradientSum:
    """Return memory for the sum of the gradients of ``weight``."""
    return GradientSum(torch.empty_like(weight, dtype=torch.float32), torch.tensor(True))


def linear(x: Tensor, weight: Tensor, weight_gradient: GradientSum | None = None) -> Tensor:
    """Multiply x (..., I) by weight (O, I) -> (..., O).

    With ``weight_gradient``, the backward pass adds the weight's gradient to it, in the matmul that computes it, and
    autograd sees none.
    """
    if weight_gradient is None:
        return F.linear(x, weight)
    out = _Linear.apply(x, weight, *weight_gradient)
    assert isinstance(out, Tensor)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, total: Tensor, empty: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, total, empty)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, total, empty = ctx.saved_tensors
        (gradient,) = gradients
        add_matmul(total, empty, gradient.flatten(0, -2).T, x.flatten(0, -2))
        return gradient @ weight, None, None, None


@torch.library.custom_op("tinyllama::add_matmul", mutates_args=("total", "empty"))
def add_matmul(total: Tensor, empty: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a (M, K) times b (K, N) to a ``GradientSum``, in place."""
    if a.is_cuda and a.dtype != total.dtype:
        beta = 0 if empty else 1  # 0 does not read the total
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)  # the product is not rounded, nor stored
        empty.fill_(False)
    else:
        GradientSum(total, empty).add(a @ b)


@add_matmul.register_fake
def _(total: Tensor, empty: Tensor, a: Tensor, b: Tensor) -> None:
    pass
