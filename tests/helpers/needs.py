"""What tests need of a machine, and are skipped without: marks, and the GPU as a parameter beside "cpu"."""

import os

import pytest
import torch

from tinyllama.ops import float8


def _multiplies_float8() -> bool:
    """Whether this build of torch does on a CPU, as that of torch 2.11 does not."""
    x, row = torch.zeros(16, 16, dtype=float8.E4M3), torch.ones(float8.ROW)
    try:
        float8._matmul(x, x, row, row)
    except NotImplementedError:
        return False
    return True


HAS_GPU = torch.cuda.is_available()

BF16_RTOL = 0 if HAS_GPU else 2.0**-7
"""of what a Triton kernel has cast to bf16: its interpreter cuts the bits off that a GPU rounds"""

a_gpu = pytest.mark.skipif(not HAS_GPU, reason="no CUDA GPU")
gpu = pytest.param("cuda", marks=[pytest.mark.gpu, a_gpu])
triton_kernels = pytest.mark.skipif(
    not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="no CUDA GPU, and no TRITON_INTERPRET=1"
)
float8_on_gpu = pytest.mark.skipif(
    HAS_GPU and torch.cuda.get_device_capability() < float8.CAPABILITY, reason="no float8 on this GPU"
)
float8_on_cpu = pytest.mark.skipif(not _multiplies_float8(), reason="this torch has no matmul in float8 on a CPU")
