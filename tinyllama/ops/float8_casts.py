"""Cast to 8-bit floating point with PyTorch's operations: what ops/float8_kernels.py does on a GPU.

Every function multiplies by the SCALE of a row of scales and raises its AMAX. What is beyond the dtype's range is
clamped; what is not finite becomes NaN, which reaches the loss and the gradients, where train/anomaly.py sees it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE_INV, SCALE, AMAX = range(3)
"""columns of a row: 1 / SCALE, what a cast multiplies by, and the largest magnitude that was cast in this step"""
ROW = 4
"""numbers of a row: cuBLAS needs each SCALE_INV aligned to 16 bytes"""


def cast(
    x: Tensor, row: Tensor, straight: Tensor | None = None, transposed: Tensor | None = None, record_amax: bool = True
) -> None:
    """Cast x (N, K) into ``straight`` (N, K), into ``transposed`` (K, N), or into both.

    Without ``record_amax``, the row's AMAX stays as it is.
    """
    if record_amax:
        _record_amax(x, row)
    for out, given in ((straight, x), (transposed, x.T)):
        if out is not None:
            _scale_and_clamp(given, row, out)


def gate(ab: Tensor, row: Tensor, h: Tensor) -> None:
    """Cast ``silu(a) * b`` of ab (N, 2 I), whose columns are a's and b's in turn, into h (N, I)."""
    a, b = ab.float().unflatten(1, (-1, 2)).unbind(2)
    gated = F.silu(a) * b
    _record_amax(gated, row)
    _scale_and_clamp(gated, row, h)


def gate_backward(
    dh: Tensor, ab: Tensor, d_row: Tensor, h_row: Tensor, d_ab: Tensor, d_ab_t: Tensor, h_t: Tensor
) -> None:
    """Cast the gradient of ab into d_ab (N, 2 I) and d_ab_t (2 I, N), and ``gate`` again into h_t (I, N).

    dh (N, I) is the gradient of the gate's output.
    """
    a, b = ab.float().unflatten(1, (-1, 2)).unbind(2)
    sigmoid = a.sigmoid()
    silu = a * sigmoid
    _scale_and_clamp((silu * b).T, h_row, h_t)
    d_a = dh.float() * b * sigmoid * (1 + a * (1 - sigmoid))
    gradient = torch.stack((d_a, dh.float() * silu), dim=2).flatten(1)
    cast(gradient, d_row, d_ab, d_ab_t)


def _record_amax(x: Tensor, row: Tensor) -> None:
    row[AMAX] = torch.maximum(row[AMAX], x.abs().max())


def _scale_and_clamp(x: Tensor, row: Tensor, out: Tensor) -> None:
    most = torch.finfo(out.dtype).max
    bounded = (x.float() * row[SCALE]).clamp(-most, most)
    out.copy_(torch.where(x.isfinite(), bounded, torch.nan))
