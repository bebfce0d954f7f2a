"""Matrix products in 8-bit floating point (arXiv:2209.05433), by torchao."""

import importlib.util

import torch
from torch import nn

CAPABILITY = (8, 9)
"""least compute capability of a GPU with such products"""


def fault(device: torch.device) -> str | None:
    """Why float8 cannot be used on ``device``, with the remedy; None when it can."""
    if device.type != "cuda":
        return "it needs a CUDA GPU of compute capability 8.9 or more: use bf16 or fp32"
    if (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"it needs compute capability {CAPABILITY}, this GPU has {found}: use bf16"
    if importlib.util.find_spec("torchao") is None:
        return "it needs torchao: pip install torchao, or use bf16"
    return None


def convert(blocks: nn.Module) -> None:
    """Let every Linear in ``blocks`` multiply in float8, one dynamic scale a tensor; weights keep names and dtypes.

    Forward and both backward products of attention and MLP. The embedding and the output matrix are not among them:
    they stay in bf16, as they do everywhere that this was tried at scale.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(blocks, config=Float8LinearConfig.from_recipe_name("tensorwise"))
