"""Apply rotary position embeddings (arXiv:2104.09864), in the halves order of lit_gpt and transformers.

Every backend takes qkv (B, T, G, nh/G + 2, hs), where the last heads of a group are its key and its value, and cos and
sin (T, hs/2) fp32, and returns q (B, nh, T, hs) and k, rotated, and v, (B, G, T, hs) each. cos and sin may be
(B, 1, T, hs/2), where each sequence has its own positions. Tables and rotation are in fp32: cosines and sines rounded
to bf16 are off by up to 2e-3 at any position, and angles in bf16 by up to 4 radians at 2048 tokens.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from tinyllama.ops.backend import Backend


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # training cannot use tables that were made in inference mode
def rope_tables(
    length: int, head_size: int, base: int, device: torch.device, condense_ratio: float = 1
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of all positions and frequencies, (length, head_size / 2) each, always fp32.

    Positions are divided by ``condense_ratio`` (arXiv:2306.15595), as upstream and transformers' linear scaling do.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1 / base**exponents / condense_ratio)
    return angles.cos(), angles.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + hs/2]) by its angle: x (B, nh, T, hs) -> like x."""
    a, b = x.float().chunk(2, dim=-1)  # (B, nh, T, hs/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def reference(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take the heads apart and rotate; torch.compile makes three kernels of it and its gradient."""
    q, k, v = qkv.split((qkv.size(3) - 2, 1, 1), dim=3)  # (B, T, G, nh/G or 1, hs)
    q, k, v = (heads.flatten(2, 3).transpose(1, 2) for heads in (q, k, v))  # (B, nh or G, T, hs)
    return rope(q, cos, sin), rope(k, cos, sin), v


def fused(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Call our kernel, one pass over memory each way."""
    q, k, v = (heads.transpose(1, 2) for heads in _Fused.apply(qkv, cos, sin))
    return q, k, v


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _apart(qkv, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _joined(*gradients, *ctx.saved_tensors), None, None


@torch.library.custom_op("tinyllama::rope_apart", mutates_args=())
def _apart(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B, T, nh, hs) and k, rotated, and v, (B, T, G, hs) each."""
    from tinyllama.ops.rope_kernels import turn

    q, k, v = _heads(qkv)
    turn(qkv.contiguous().flatten(0, 1), q, k, v, cos.contiguous(), sin.contiguous(), back=False)
    return q, k, v


@_apart.register_fake
def _(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _heads(qkv)


def _heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    B, T, G, slots, hs = qkv.shape
    return qkv.new_empty(B, T, G * (slots - 2), hs), qkv.new_empty(B, T, G, hs), qkv.new_empty(B, T, G, hs)


@torch.library.custom_op("tinyllama::rope_joined", mutates_args=())
def _joined(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of qkv, (B, T, G, nh/G + 2, hs), from those of q (B, T, nh, hs), k and v (B, T, G, hs)."""
    from tinyllama.ops.rope_kernels import turn

    qkv = _group(dq, dk)
    dq, dk, dv = (gradient.contiguous() for gradient in (dq, dk, dv))
    turn(qkv.flatten(0, 1), dq, dk, dv, cos.contiguous(), sin.contiguous(), back=True)
    return qkv


@_joined.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _group(dq, dk)


def _group(dq: Tensor, dk: Tensor) -> Tensor:
    B, T, G, hs = dk.shape
    return dq.new_empty(B, T, G, dq.size(2) // G + 2, hs)


BACKENDS = {
    "reference": Backend(reference),
    "triton": Backend(fused, cuda=True, capability=(8, 0), module="triton", package="triton"),
}
"""implementations by name"""
