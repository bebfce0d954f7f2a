"""Multiply matrices in 8-bit floating point (arXiv:2209.05433), by torchao."""

import importlib.util

import torch
from torch import nn

CAPABILITY = (8, 9)
"""least compute capability of a GPU with float8 matmuls"""


def problem(device: torch.device) -> str | None:
    """Return why float8 cannot be used on ``device``, with a hint; None when it can."""
    if device.type != "cuda":
        return "it needs a CUDA GPU of compute capability 8.9 or more: use bf16 or fp32"
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"it needs compute capability {CAPABILITY}, this GPU has {found}: use bf16"
    if importlib.util.find_spec("torchao") is None:
        return "it needs torchao: pip install torchao, or use bf16"
    return None


def convert(blocks: nn.Module) -> None:
    """Make every Linear in ``blocks`` multiply in float8 with a dynamic scale per tensor; names and dtypes stay.

    This covers the forward and both backward matmuls of attention and MLP. The embedding and the output matrix stay in
    bf16, as in published large-scale runs.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(blocks, config=Float8LinearConfig.from_recipe_name("tensorwise"))
