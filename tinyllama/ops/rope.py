"""Apply rotary position embeddings (arXiv:2104.09864), in the halves order of lit_gpt and transformers."""

import functools

import torch
from torch import Tensor


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
    """Rotate each pair (x[i], x[i + hs/2]) by its angle: x (B, nh, T, hs), cos and sin (T, hs/2) fp32 -> like x.

    cos and sin may be (B, 1, T, hs/2), where each sequence has its own positions. The rotation is in fp32 because bf16
    angles are off by up to 2e-3 at 2048 tokens, and by more beyond.
    """
    a, b = x.float().chunk(2, dim=-1)  # (B, nh, T, hs/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
