"""SwiGLU's backends against its formula in fp64; the one in float8 is in test_float8.py."""

import pytest
import torch
from needs import gpu
from operations import TOLERANCE, close, forward_backward, normal, usable

from tinyllama.ops import swiglu


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("backend", [name for name in swiglu.BACKENDS if name != "float8"])
def test_swiglu_gates_with_its_first_matrix(backend, device, dtype):
    call = usable("swiglu", backend, device, dtype)
    x = normal(5, 16, dtype=dtype, device=device)
    matrices = [normal(*shape, dtype=dtype, device=device) for shape in ((24, 16), (24, 16), (16, 24))]

    def plain(x, w1, w2, w3):
        gate = x @ w1.T
        return (gate / (1 + torch.exp(-gate)) * (x @ w2.T)) @ w3.T

    def modules(x, *weights):
        linears = [torch.nn.Linear(w.size(1), w.size(0), bias=False) for w in weights]
        for linear, weight in zip(linears, weights, strict=True):
            del linear.weight
            linear.weight = weight  # the tensor itself, so that its gradient can be asked for
        return call(x, *linears)

    expected = forward_backward(plain, *(t.detach().double().requires_grad_() for t in (x, *matrices)))
    close(forward_backward(modules, x, *matrices), expected, dtype, "swiglu")
