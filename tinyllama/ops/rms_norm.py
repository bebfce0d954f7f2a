"""Root mean square normalisation (arXiv:1910.07467) of the residual stream, and the addition before it.

Every backend takes x (..., C), weight (C,) and perhaps ``added`` (..., C), and gives (norm(x + added), x + added), both
(..., C) in x's dtype. The stream comes out again so that one kernel of the backward pass can add both its gradients.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyllama.ops.backend import Backend


def reference(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``x / rms(x) * weight`` over the last dimension.

    The division is in fp32 and cast back before the product with the weight, as transformers' LlamaRMSNorm does it.
    torch.compile makes one kernel of it.
    """
    x = x if added is None else x + added
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype), x


def fused(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """PyTorch's own kernel, for runs without torch.compile; the product with the weight is in fp32 too."""
    x = x if added is None else x + added
    return F.rms_norm(x, weight.shape, weight, eps), x


def quack(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """quack-kernels' kernel, a pass over memory each way; the product with the weight is in fp32 too."""
    normed, stream = _Quack.apply(x, weight, eps, added)
    return normed, stream


class _Quack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, added: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, -2)
        normed, rstd, stream = _quack(rows, weight, eps, None if added is None else added.flatten(0, -2))
        ctx.adds = added is not None
        ctx.save_for_backward(stream if ctx.adds else rows, weight, rstd)
        return normed.view(x.shape), stream.view(x.shape) if ctx.adds else x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None]:
        of_normed, of_stream = (gradient.flatten(0, -2).contiguous() for gradient in gradients)
        dx, dw = _quack_backward(*ctx.saved_tensors, of_normed, of_stream)
        dx = dx.view(gradients[0].shape)
        return dx, dw, None, dx if ctx.adds else None


@torch.library.custom_op("tinyllama::rms_norm_quack", mutates_args=())
def _quack(x: Tensor, weight: Tensor, eps: float, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x + added (N, C), what each row was multiplied by (N,), and x + added, or nothing (0,)."""
    from quack.rmsnorm import rmsnorm_fwd

    normed, stream, rstd = rmsnorm_fwd(x, weight, residual=added, eps=eps, store_rstd=True)
    return normed, rstd, x.new_empty(0) if added is None else stream


@_quack.register_fake
def _(x: Tensor, weight: Tensor, eps: float, added: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    stream = x.new_empty(0) if added is None else torch.empty_like(x)
    return torch.empty_like(x), x.new_empty(x.size(0), dtype=torch.float32), stream


@torch.library.custom_op("tinyllama::rms_norm_quack_backward", mutates_args=())
def _quack_backward(
    x: Tensor, weight: Tensor, rstd: Tensor, of_normed: Tensor, of_stream: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the stream (N, C) before its norm, and of the weight (C,)."""
    from quack.rmsnorm import rmsnorm_bwd

    dx, dw, _, _ = rmsnorm_bwd(x, weight, of_normed, rstd, of_stream)
    return dx, dw


@_quack_backward.register_fake
def _(x: Tensor, weight: Tensor, rstd: Tensor, of_normed: Tensor, of_stream: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


BACKENDS = {
    "reference": Backend(reference),
    "torch": Backend(fused),
    "quack": Backend(quack, cuda=True, capability=(9, 0), multiple=8, module="quack", package="quack-kernels"),
}
