"""Compute the output matrix and the language-modelling loss as one operation, which never needs all logits at once.

Every backend takes x (..., C), weight (V, C) and targets (...) and returns the sum of -log softmax(x weight^T)[target]
over targets != IGNORE_INDEX, an fp32 scalar. It is a sum because only the caller knows how many targets the step has
over all ranks and micro-batches. With ``weight_gradient`` the backward pass adds the weight's gradient to it, and
autograd sees none.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyllama.config.model import LOGITS_CHUNK
from tinyllama.ops.backend import Backend
from tinyllama.ops.linear import GradientSum, add_matmul, empty_sum, linear

IGNORE_INDEX = -100
"""the loss skips targets of this value"""


def reference(x: Tensor, weight: Tensor, targets: Tensor, weight_gradient: GradientSum | None = None) -> Tensor:
    """Compute all logits, and their loss in fp32."""
    logits = linear(x, weight, weight_gradient).flatten(0, -2).float()  # (N, V)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def chunked(x: Tensor, weight: Tensor, targets: Tensor, weight_gradient: GradientSum | None = None) -> Tensor:
    """Compute loss and gradients for LOGITS_CHUNK tokens at a time in the forward pass; nothing is computed twice."""
    if not torch.is_grad_enabled():  # an autograd.Function does not see no_grad, and would compute the gradients
        x, weight = x.detach(), weight.detach()
    loss = _Chunked.apply(x.flatten(0, -2), weight, targets.flatten(), *(weight_gradient or ()))
    assert isinstance(loss, Tensor)
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, *weight_gradient: Tensor) -> Tensor:
        # x (N, C), weight (V, C), targets (N,), weight_gradient a GradientSum's two or nothing
        loss = torch.zeros((), device=x.device)
        wants_gradient = any(ctx.needs_input_grad)
        if wants_gradient:
            dx, dw = torch.empty_like(x), empty_sum(weight)  # gradients of the loss
        for start in range(0, len(x), LOGITS_CHUNK):
            rows = slice(start, start + LOGITS_CHUNK)
            logits = x[rows] @ weight.T  # (n, V)
            loss += _turn_into_gradient(logits, targets[rows])
            if wants_gradient:  # the gradients have replaced the logits in place
                torch.mm(logits, weight, out=dx[rows])
                add_matmul(*dw, logits.T, x[rows])
        if wants_gradient:
            ctx.save_for_backward(dx, dw.total, *weight_gradient)
            ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, *weight_gradient = ctx.saved_tensors
        (scale,) = gradients  # () fp32
        # a scale of one dimension takes part in type promotion; one of none would be rounded to bf16, three digits
        dx = torch.mul(dx, scale.view(1), out=torch.empty_like(dx))
        if not weight_gradient:
            return dx, torch.mul(dw, scale, out=torch.empty_like(dw, dtype=ctx.dtype)), None
        GradientSum(*weight_gradient).add_scaled(dw, scale)
        return dx, *[None] * 4


def _turn_into_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed loss of logits (n, V), and replace them by its gradient in place."""
    if logits.is_cuda:
        from tinyllama.ops.cross_entropy_kernels import turn_into_gradient

        return turn_into_gradient(logits, targets, IGNORE_INDEX).sum()
    log_softmax = logits.float().log_softmax(-1)  # (n, V)
    counted = (targets != IGNORE_INDEX)[:, None]  # (n, 1)
    index = targets.clamp(min=0)[:, None]  # (n, 1)
    loss = -(log_softmax.gather(-1, index) * counted).sum()
    is_target = torch.arange(logits.size(-1)) == index  # (n, V)
    logits.copy_((log_softmax.exp() - is_target.float()) * counted)
    return loss


BACKENDS = {"reference": Backend(reference), "chunked": Backend(chunked)}
