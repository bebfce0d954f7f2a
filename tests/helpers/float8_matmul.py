"""Whether this build of torch multiplies in float8 on a CPU, which that of torch 2.11 does not."""

import pytest
import torch

from tinyllama.ops import float8


def _multiplies() -> bool:
    x, row = torch.zeros(16, 16, dtype=float8.E4M3), torch.ones(float8.ROW)
    try:
        float8._matmul(x, x, row, row)
    except NotImplementedError:
        return False
    return True


on_cpu = pytest.mark.skipif(not _multiplies(), reason="this build of torch has no matmul in float8 on a CPU")
