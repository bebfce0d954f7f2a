"""Root mean square normalisation (arXiv:1910.07467): x (..., C), weight (C,) -> (..., C) in x's dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyllama.ops.backend import Backend


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension.

    The division is in fp32 and cast back before the product with the weight, as transformers' LlamaRMSNorm does it.
    torch.compile makes one kernel of it.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """PyTorch's own kernel, for runs without torch.compile; the product with the weight is in fp32 too."""
    return F.rms_norm(x, weight.shape, weight, eps)


BACKENDS = {"reference": Backend(reference), "torch": Backend(fused)}
