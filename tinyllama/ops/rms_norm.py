"""Add to the residual stream and normalize the sum by its root mean square (arXiv:1910.07467).

Every backend takes x (..., C), weight (C,) and optionally ``added`` (..., C), and returns (norm(x + added), x + added),
both (..., C) in x's dtype. It returns the residual stream so that one backward kernel can add both its gradients.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyllama.ops.backend import Backend, quack_backend


def reference(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute ``x / rms(x) * weight`` over the last dimension.

    It divides in fp32 and casts back before it multiplies by the weight, as transformers' LlamaRMSNorm does.
    torch.compile makes one kernel of it.
    """
    x = x if added is None else x + added
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype), x


def fused(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Call PyTorch's own kernel, for runs without torch.compile; it multiplies by the weight in fp32 too."""
    x = x if added is None else x + added
    return F.rms_norm(x, weight.shape, weight, eps), x


def quack(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Call quack-kernels' kernel, one pass over memory each way; it multiplies by the weight in fp32 too."""
    normed, residual = _Quack.apply(x, weight, eps, added)
    return normed, residual


class _Quack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, added: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, -2)
        normed, rstd, residual = _quack(rows, weight, eps, None if added is None else added.flatten(0, -2))
        ctx.adds = added is not None
        ctx.save_for_backward(residual if ctx.adds else rows, weight, rstd)
        return normed.view(x.shape), residual.view(x.shape) if ctx.adds else x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        d_normed, d_residual = (gradient.flatten(0, -2).contiguous() for gradient in gradients)
        dx, dw = _quack_backward(*ctx.saved_tensors, d_normed, d_residual)
        dx = dx.view(gradients[0].shape)
        return dx, dw, None, dx if ctx.adds else None


@torch.library.custom_op("tinyllama::rms_norm_quack", mutates_args=())
def _quack(x: Tensor, weight: Tensor, eps: float, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm of x + added (N, C), the scale of each row (N,), and x + added, or an empty tensor (0,)."""
    from quack.rmsnorm import rmsnorm_fwd

    normed, residual, rstd = rmsnorm_fwd(x, weight, residual=added, eps=eps, store_rstd=True)
    return normed, rstd, x.new_empty(0) if added is None else residual


@_quack.register_fake
def _(x: Tensor, weight: Tensor, eps: float, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    residual = x.new_empty(0) if added is None else torch.empty_like(x)
    return torch.empty_like(x), x.new_empty(x.size(0), dtype=torch.float32), residual


@torch.library.custom_op("tinyllama::rms_norm_quack_backward", mutates_args=())
def _quack_backward(
    x: Tensor, weight: Tensor, rstd: Tensor, d_normed: Tensor, d_residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the residual stream (N, C) before its norm and of the weight (C,)."""
    from quack.rmsnorm import rmsnorm_bwd

    dx, dw, _, _ = rmsnorm_bwd(x, weight, d_normed, rstd, d_residual)
    return dx, dw


@_quack_backward.register_fake
def _(x: Tensor, weight: Tensor, rstd: Tensor, d_normed: Tensor, d_residual: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


BACKENDS = {
    "reference": Backend(reference),
    "torch": Backend(fused),
    "quack": quack_backend(quack, module="quack.rmsnorm"),
}
