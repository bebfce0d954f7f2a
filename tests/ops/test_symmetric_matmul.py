"""The matmul of Muon's iterations, whose result is symmetric, against fp64."""

import pytest
import torch
from needs import gpu
from operations import normal, usable

from tinyllama.ops import symmetric_matmul


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("backend", symmetric_matmul.BACKENDS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 40, 136), (2, 264, 72)])
def test_symmetric_matmul_is_the_scaled_product_and_the_scaled_sum(backend, device, shape, dtype):
    call = usable("symmetric_matmul", backend, device, dtype)
    x = normal(*shape, dtype=dtype, device=device).detach() / shape[2] ** 0.5
    wide, exact = x, x.double() @ x.double().mT
    for a in (wide, wide.mT.contiguous().mT):  # each of the layouts that the iterations have
        square = call(a, a.mT)
        cubic = call(square, square, square, alpha=0.5, beta=-3.0)
        rounded = square.double()
        for found, expected in ((square, exact), (cubic, 0.5 * rounded @ rounded - 3 * rounded)):
            assert found.dtype == dtype
            limit = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
            assert (found.double() - expected).norm() <= limit * expected.norm()
