"""Replace logits by the gradient of their cross entropy while they are read from memory once, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E, _LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def turn_into_gradient(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Return the loss of each row of logits (n, V), fp32 (n,), and replace them by its gradient in place.

    A row whose target is ``ignored`` has neither, unless it holds NaN or inf. Each row must be contiguous.
    """
    n, V = logits.shape
    losses = torch.empty(n, device=logits.device)
    width = 16 // logits.element_size()  # 16 bytes are the most that a thread loads at once
    _cross_entropy[(n,)](
        logits, targets.contiguous(), losses, logits.stride(0), V, ignored, 8192 // width, width, num_warps=16
    )
    return losses


@triton.jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits, targets, losses, stride, V: tl.constexpr, IGNORED: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row).to(tl.int32)
    counted = target != IGNORED
    # read before it is overwritten: no warp stores a gradient until all have passed the barriers of the reductions
    at_target = tl.load(logits + target, mask=counted, other=0.0).to(tl.float32)
    block = tl.arange(0, PARTS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    # each part is within a thread and has a maximum and a sum of its own, so that the loop needs no barrier
    largest = tl.full((PARTS,), _LOWEST, tl.float32)  # not -inf, which minus itself is NaN
    total = tl.zeros((PARTS,), tl.float32)
    for start in range(0, V, PARTS * WIDTH):
        column = start + block
        x = tl.load(logits + column, mask=column < V, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, axis=1))
        exps = tl.exp2((x - larger[:, None]) * _LOG2E)
        total = total * tl.exp2((largest - larger) * _LOG2E) + tl.sum(exps, axis=1)
        largest = larger
    most = tl.max(largest, axis=0)
    log2_total = tl.log2(tl.sum(total * tl.exp2((largest - most) * _LOG2E), axis=0))
    tl.store(losses + row, (most - at_target + log2_total * _LN2) * counted)
    for start in range(0, V, PARTS * WIDTH):  # now from the L2 cache
        column = start + block
        x = tl.load(logits + column, mask=column < V, eviction_policy="evict_first").to(tl.float32)
        softmax = tl.exp2((x - most) * _LOG2E - log2_total)
        gradient = (softmax - (column == target)) * counted
        tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < V)
