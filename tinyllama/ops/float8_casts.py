"""Cast to 8-bit floating point with PyTorch's operations: what ops/float8_kernels.py does on a GPU.

Every function multiplies by the FACTOR of a row of scales and raises its LARGEST magnitude. What is beyond the dtype's
range is clamped; what is not finite becomes NaN, which reaches the loss and the gradients, where train/anomaly.py
sees it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

INVERSE, FACTOR, LARGEST = range(3)
"""of a row of scales: 1 / FACTOR, what a cast multiplies by, and the largest magnitude that was cast in this step"""
ROW = 4
"""numbers of a row: cuBLAS wants an INVERSE in every 16 bytes"""


def cast(
    x: Tensor, row: Tensor, straight: Tensor | None = None, transposed: Tensor | None = None, sees: bool = True
) -> None:
    """Cast x (N, K) into ``straight`` (N, K), into ``transposed`` (K, N), or into both.

    Without ``sees``, the row's largest magnitude stays as it is.
    """
    if sees:
        _see(x, row)
    for out, given in ((straight, x), (transposed, x.T)):
        if out is not None:
            _fit(given, row, out)


def gate(ab: Tensor, row: Tensor, h: Tensor) -> None:
    """Cast ``silu(a) * b`` of ab (N, 2 I), whose columns are a's and b's in turn, into h (N, I)."""
    a, b = ab.float().unflatten(1, (-1, 2)).unbind(2)
    gated = F.silu(a) * b
    _see(gated, row)
    _fit(gated, row, h)


def gate_backward(
    dh: Tensor, ab: Tensor, d_row: Tensor, h_row: Tensor, d_ab: Tensor, d_ab_t: Tensor, h_t: Tensor
) -> None:
    """Cast the gradient of ab into d_ab (N, 2 I) and d_ab_t (2 I, N), and ``gate`` again into h_t (I, N).

    dh (N, I) is the gradient of the gate's output.
    """
    a, b = ab.float().unflatten(1, (-1, 2)).unbind(2)
    sigmoid = a.sigmoid()
    silu = a * sigmoid
    _fit((silu * b).T, h_row, h_t)
    d_a = dh.float() * b * sigmoid * (1 + a * (1 - sigmoid))
    gradient = torch.stack((d_a, dh.float() * silu), dim=2).flatten(1)
    cast(gradient, d_row, d_ab, d_ab_t)


def _see(x: Tensor, row: Tensor) -> None:
    row[LARGEST] = torch.maximum(row[LARGEST], x.abs().max())


def _fit(x: Tensor, row: Tensor, out: Tensor) -> None:
    most = torch.finfo(out.dtype).max
    bounded = (x.float() * row[FACTOR]).clamp(-most, most)
    out.copy_(torch.where(x.isfinite(), bounded, torch.nan))
