"""Inputs of operations, their results with gradients, and how close backends must come to the reference."""

import math

import pytest
import torch

from tinyllama.ops import choice


def normal(*shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()


def forward_backward(function, *inputs):
    # the result and the gradients of its weighted sum, all in float64
    y = function(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.device, y.dtype)
    return [x.detach().double().cpu() for x in (y, *torch.autograd.grad((y * weights).sum(), inputs))]


# bf16: 8 bits of mantissa on values of order 1, and sums of T of them in the gradients
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def usable(operation, backend, device, dtype=torch.bfloat16):
    """The backend's function, or a skip with the reason."""
    found = choice.OPERATIONS[operation][backend]
    if problem := found.problem(torch.device(device), dtype):
        pytest.skip(problem)
    return found.call


# The largest element hides what happens to the others; the norm of the error does not. In bf16 a result rounded once is
# 1.7e-3 off, and one of several rounded matmuls up to 5e-3; gradients of scores cancel, most of all in fused kernels.
PRECISION = {"attention reference": 1e-2, "attention": 3e-2, "rms_norm": 9e-3, "swiglu": 8e-3, "cross_entropy": 5e-3}


def close(ours, expected, dtype, operation):
    limit = 1e-5 if dtype == torch.float32 else PRECISION[operation]
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=TOLERANCE[dtype] * max(1, theirs.abs().max()), rtol=0)
        assert (mine - theirs).norm() <= limit * theirs.norm() + 1e-7, operation
