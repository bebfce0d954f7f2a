"""Root mean square normalisation (arXiv:1910.07467)."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / rms(x) * weight`` over the last dimension: x (..., C), weight (C,) -> (..., C) in x's dtype.

    The division is in fp32 and cast back before the product with the weight, as transformers' LlamaRMSNorm does it.
    """
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)
