"""AdamW (Loshchilov & Hutter, arXiv:1711.05101) on a GPU: one pass over memory for a tensor, in Triton.

The arithmetic is that of torch's fused AdamW, in fp32 (ATen/native/cuda/fused_adam_utils.cuh), so that a run may go on
with either. With torch's, clipping needs a pass of its own.
"""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


def update(
    parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, copy: Tensor | None,
    factor: Tensor, found_inf: Tensor, corrections: Tensor,
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """Update a parameter and its moments in place from ``gradient * factor``; where ``found_inf`` is 1, leave them.

    The new parameter is also written to ``copy``, in its dtype; the rows of ``copy`` may lie apart. All else is fp32
    and contiguous. The first five have one shape. factor and found_inf are (); corrections (2,) are 1 - beta1^t and the
    root of 1 - beta2^t of step t.
    """
    assert gradient.is_contiguous(), f"a gradient has the strides {gradient.stride()}"
    if size := parameter.numel():
        columns = stride = size  # what is contiguous is one row
        if copy is not None and not copy.is_contiguous():
            columns, stride = copy.size(1), copy.stride(0)
        blocks = triton.cdiv(columns, _BLOCK)
        _adamw[(size // columns * blocks,)](
            parameter, gradient, exp_avg, exp_avg_sq, copy, factor, found_inf, corrections, columns, stride, blocks,
            lr, lr * weight_decay, beta1, beta2, eps, _BLOCK, num_warps=8,
        )  # fmt: skip


@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["corrections"])
def _adamw(  # type: ignore[no-untyped-def]
    parameter, gradient, exp_avg, exp_avg_sq, copy, factor, found_inf, corrections, columns, stride, blocks,
    lr, decay, beta1, beta2, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(found_inf) == 1:
        return
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = row * columns + column
    mask = column < columns
    p, g = tl.load(parameter + here, mask=mask), tl.load(gradient + here, mask=mask)
    m, v = tl.load(exp_avg + here, mask=mask), tl.load(exp_avg_sq + here, mask=mask)
    g *= tl.load(factor)
    p -= decay * p
    m = tl.fma(beta1, m, tl.fma(-beta1, g, g))
    v = tl.fma(beta2, v, tl.fma(-beta2, g * g, g * g))
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.load(corrections + 1)) + eps
    p -= tl.div_rn(tl.div_rn(lr, tl.load(corrections)) * m, denominator)
    tl.store(parameter + here, p, mask=mask)
    tl.store(exp_avg + here, m, mask=mask)
    tl.store(exp_avg_sq + here, v, mask=mask)
    if copy is not None:
        tl.store(copy + row * stride + column, p.to(copy.dtype.element_ty), mask=mask)
