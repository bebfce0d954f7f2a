"""Rotate queries and keys and take them and the values apart, or the reverse, in one pass over memory, in Triton."""

import triton
import triton.language as tl
from torch import Tensor


def turn(qkv: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    """Write q (N, G, Q, hs), k and v (N, G, hs), rotated, from qkv (N, G, Q + 2, hs), or ``back`` from them into qkv.

    Token n takes row n, modulo the number of rows, of cos and sin (..., hs/2) fp32. Everything is contiguous.
    """
    tokens, groups, slots, head_size = qkv.shape
    half, block = head_size // 2, 32
    sizes = (tokens, cos.numel() // half, groups, slots - 2, half)
    grid = (triton.cdiv(tokens, block), groups)
    _turn[grid](qkv, q, k, v, cos, sin, *sizes, back, block, triton.next_power_of_2(half))


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    qkv, q, k, v, cos, sin, tokens, table_rows, GROUPS: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr,
    BACK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group = n * GROUPS + tl.program_id(1)
    d = tl.arange(0, WIDTH)[None, :]
    mask = (n < tokens)[:, None] & (d < HALF)
    angle = (n % table_rows)[:, None] * HALF + d
    c, s = tl.load(cos + angle, mask=mask), tl.load(sin + angle, mask=mask)
    if BACK:
        s = -s
    for slot in tl.static_range(QUERIES + 2):
        joined = qkv + (group * (QUERIES + 2) + slot)[:, None] * (2 * HALF) + d
        if slot < QUERIES:
            apart = q + (group * QUERIES + slot)[:, None] * (2 * HALF) + d
        elif slot == QUERIES:
            apart = k + group[:, None] * (2 * HALF) + d
        else:
            apart = v + group[:, None] * (2 * HALF) + d
        source = apart if BACK else joined
        a, b = tl.load(source, mask=mask).to(tl.float32), tl.load(source + HALF, mask=mask).to(tl.float32)
        if slot <= QUERIES:
            a, b = a * c - b * s, b * c + a * s
        goal = joined if BACK else apart
        tl.store(goal, a.to(qkv.dtype.element_ty), mask=mask)
        tl.store(goal + HALF, b.to(qkv.dtype.element_ty), mask=mask)
