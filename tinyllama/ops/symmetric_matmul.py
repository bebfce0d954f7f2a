"""Multiply matrices whose product is symmetric, as Muon's iterations do.

Every backend takes a (B, s, k), b (B, k, s) and optionally c (B, s, s), and returns alpha a b + beta c, (B, s, s) in
a's dtype. The caller knows that a b and c are symmetric.
"""

import torch
from torch import Tensor

from tinyllama.ops.backend import Backend, quack_backend


def reference(a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """Compute all of the product."""
    return a @ b if c is None else torch.baddbmm(c, a, b, alpha=alpha, beta=beta)


def quack(a: Tensor, b: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """Call quack-kernels' kernel, which computes half of the product and copies it to the other half."""
    from quack.gemm_interface import gemm_symmetric

    return gemm_symmetric(a, b, C=c, alpha=alpha, beta=beta)


BACKENDS = {"reference": Backend(reference), "quack": quack_backend(quack, half=True, module="quack.gemm_interface")}
"""implementations by name"""
