"""Cast to 8-bit floating point on a GPU: one pass over memory each, in Triton.

Every kernel reads (rows, columns), multiplies by the SCALE of a row of ``Scales`` (ops/float8.py), writes the result,
transposed or not or both, and raises the row's AMAX. What is not finite becomes NaN, which reaches loss and gradients,
where train/anomaly.py sees it.

What is transposed has rows and columns in multiples of 16, as matmuls in float8 want it. With others, ``gate_backward``
compiled by Triton 3.6 wrote wrong numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinyllama.ops import float8_casts

_SCALE, _AMAX = tl.constexpr(float8_casts.SCALE), tl.constexpr(float8_casts.AMAX)


def cast(
    x: Tensor, row: Tensor, straight: Tensor | None = None, transposed: Tensor | None = None, record_amax: bool = True
) -> None:
    """Cast x (N, K) into ``straight`` (N, K), into ``transposed`` (K, N), or into both.

    Without ``record_amax``, the row's AMAX stays as it is.
    """
    out = straight if straight is not None else transposed
    assert out is not None
    grid, block = _blocks(x.shape, 64, 128)
    _cast[grid](
        x, straight, transposed, row, *x.shape, torch.finfo(out.dtype).max,
        straight is not None, transposed is not None, record_amax, *block, num_warps=4,
    )  # fmt: skip


def gate(ab: Tensor, row: Tensor, h: Tensor) -> None:
    """Cast ``silu(a) * b`` of ab (N, 2 I), whose columns are a's and b's in turn, into h (N, I)."""
    grid, block = _blocks(h.shape, 16, 256)
    _gate[grid](ab, h, row, *h.shape, torch.finfo(h.dtype).max, *block, num_warps=4)


def gate_backward(
    dh: Tensor, ab: Tensor, d_row: Tensor, h_row: Tensor, d_ab: Tensor, d_ab_t: Tensor, h_t: Tensor
) -> None:
    """Cast the gradient of ab (N, 2 I) into d_ab (N, 2 I) and d_ab_t (2 I, N), and ``gate`` again into h_t (I, N).

    dh (N, I) is the gradient of the gate's output.
    """
    grid, block = _blocks(dh.shape, 32, 64)
    most = (torch.finfo(out.dtype).max for out in (d_ab, h_t))
    _gate_backward[grid](dh, ab, d_ab, d_ab_t, h_t, d_row, h_row, *dh.shape, *most, *block, num_warps=4)


def _blocks(shape: torch.Size, *block: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the grid of programs for a matrix, and the block of each."""
    return tuple(triton.cdiv(size, part) for size, part in zip(shape, block, strict=True)), block


@triton.jit
def _scale_and_clamp(x, scale, MOST: tl.constexpr):  # type: ignore[no-untyped-def]
    bounded = tl.minimum(tl.maximum(x * scale, -MOST), MOST)
    return tl.where(tl.abs(x) < float("inf"), bounded, float("nan"))


@triton.jit
def _record_amax(row, x):  # type: ignore[no-untyped-def]
    tl.atomic_max(row + _AMAX, tl.max(tl.max(tl.abs(x), axis=1), axis=0), sem="relaxed")


@triton.jit
def _cast(  # type: ignore[no-untyped-def]
    x, straight, transposed, row, rows, columns, MOST: tl.constexpr,
    STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, RECORD_AMAX: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    n = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    values = tl.load(x + m[:, None] * columns + n[None, :], mask=mask, other=0.0).to(tl.float32)
    if RECORD_AMAX:
        _record_amax(row, values)
    fitting = _scale_and_clamp(values, tl.load(row + _SCALE), MOST)
    if STRAIGHT:
        tl.store(straight + m[:, None] * columns + n[None, :], fitting.to(straight.dtype.element_ty), mask=mask)
    if TRANSPOSED:
        turned = tl.trans(fitting.to(transposed.dtype.element_ty))
        mask_t = (n < columns)[:, None] & (m < rows)[None, :]
        tl.store(transposed + n[:, None].to(tl.int64) * rows + m[None, :], turned, mask=mask_t)


@triton.jit
def _load_pairs(ab, m, first, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a and b, (BLOCK_ROWS, BLOCK_COLUMNS) each, and return the offsets and the mask of their pairs, too."""
    both = 2 * first + tl.arange(0, 2 * BLOCK_COLUMNS)
    offsets = m[:, None] * (2 * columns) + both[None, :]
    mask = (m < rows)[:, None] & (both < 2 * columns)[None, :]
    pairs = tl.load(ab + offsets, mask=mask, other=0.0)
    a, b = tl.split(tl.reshape(pairs, (BLOCK_ROWS, BLOCK_COLUMNS, 2)))
    return a.to(tl.float32), b.to(tl.float32), offsets, mask


@triton.jit
def _gate(  # type: ignore[no-untyped-def]
    ab, h, row, rows, columns, MOST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1) * BLOCK_COLUMNS
    n = first + tl.arange(0, BLOCK_COLUMNS)
    a, b, _, _ = _load_pairs(ab, m, first, rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    gated = a * tl.sigmoid(a) * b
    _record_amax(row, gated)
    fitting = _scale_and_clamp(gated, tl.load(row + _SCALE), MOST).to(h.dtype.element_ty)
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    tl.store(h + m[:, None] * columns + n[None, :], fitting, mask=mask)


@triton.jit
def _gate_backward(  # type: ignore[no-untyped-def]
    dh, ab, d_ab, d_ab_t, h_t, d_row, h_row, rows, columns, D_MOST: tl.constexpr, H_MOST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1) * BLOCK_COLUMNS
    n = first + tl.arange(0, BLOCK_COLUMNS)
    a, b, offsets, both_mask = _load_pairs(ab, m, first, rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    mask = (m < rows)[:, None] & (n < columns)[None, :]
    gradient = tl.load(dh + m[:, None] * columns + n[None, :], mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    silu = a * sigmoid
    d_a = gradient * b * sigmoid * (1 + a * (1 - sigmoid))
    d_b = gradient * silu
    _record_amax(d_row, tl.maximum(tl.abs(d_a), tl.abs(d_b)))
    scale = tl.load(d_row + _SCALE)
    d_a, d_b = (
        _scale_and_clamp(d_a, scale, D_MOST).to(d_ab.dtype.element_ty),
        _scale_and_clamp(d_b, scale, D_MOST).to(d_ab.dtype.element_ty),
    )
    tl.store(d_ab + offsets, tl.reshape(tl.join(d_a, d_b), (BLOCK_ROWS, 2 * BLOCK_COLUMNS)), mask=both_mask)
    h = _scale_and_clamp(silu * b, tl.load(h_row + _SCALE), H_MOST).to(h_t.dtype.element_ty)
    across = n[:, None].to(tl.int64) * rows + m[None, :]
    mask_t = (n < columns)[:, None] & (m < rows)[None, :]
    tl.store(h_t + across, tl.trans(h), mask=mask_t)
    across += n[:, None].to(tl.int64) * rows  # a's columns are the even ones
    tl.store(d_ab_t + across, tl.trans(d_a), mask=mask_t)
    tl.store(d_ab_t + across + rows, tl.trans(d_b), mask=mask_t)
