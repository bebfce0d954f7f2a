"""Our kernel of AdamW against its formula in fp64: on a GPU, or without one by Triton's interpreter.

TRITON_INTERPRET=1 pytest -m gpu tests/ops/test_adamw_kernels.py tests/train/test_adamw.py
"""

import math

import numpy as np
import pytest
import torch
from needs import BF16_RTOL, a_gpu, triton_kernels
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu, triton_kernels]

LR, EPS, DECAY = 1e-2, 1e-8, 0.1
BETA1, BETA2 = 0.9, 0.95
ULP = 2.0**-23


def update(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, factor: float, rejected: bool = False, t: int = 3,
    copy: Tensor | None = None,
) -> None:  # fmt: skip
    from tinyllama.ops import adamw_kernels

    settings = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": DECAY}
    scalars = (torch.tensor(number, device=DEVICE) for number in (factor, float(rejected)))
    corrections = torch.tensor([1 - BETA1**t, math.sqrt(1 - BETA2**t)], device=DEVICE)
    adamw_kernels.update(p, g, m, v, copy, *scalars, corrections, **settings)


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("shape", [(1,), (7,), (2048,), (5001,), (64, 128), (0, 4)])
@pytest.mark.parametrize("t", [1, 2, 1000])
def test_the_kernel_is_its_formula(shape: tuple[int, ...], t: int) -> None:
    """Each number is within a few units of the last digit of the terms that it is a sum of.

    (1 - beta) g is fma(-beta, g, g), so that g is one; the interpreter rounds between product and sum.
    """
    buffer = normal((3, math.prod(shape) + 1), seed=0)
    p, m, v = (row[:-1].view(shape) for row in buffer)
    v.square_()
    g = normal(shape, seed=1)
    start, after = [x.double() for x in (p, g, m, v)], buffer[:, -1].clone()
    update(p, g, m, v, factor=0.3, t=t)
    assert torch.equal(buffer[:, -1], after)  # nothing is written behind the tensors

    p64, g64, m64, v64 = start
    beta1, beta2 = (float(np.float32(beta)) for beta in (BETA1, BETA2))  # the kernel's, as in torch's
    g64 = g64 * float(np.float32(0.3))
    m_terms, v_terms = m64.abs() + g64.abs(), v64 + g64.square()
    m64 = beta1 * m64 + (1 - beta1) * g64
    v64 = beta2 * v64 + (1 - beta2) * g64.square()
    step = LR / (1 - BETA1**t) / ((v64 / (1 - BETA2**t)).sqrt() + EPS)
    assert ((m - m64).abs() <= ULP * m_terms).all()
    assert ((v - v64).abs() <= ULP * v_terms).all()
    assert ((p - (p64 * (1 - LR * DECAY) - step * m64)).abs() <= ULP * (p64.abs() + 8 * step * m_terms)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (5001,), (3, 64), (5, 4099), (0, 4)])
@pytest.mark.parametrize("apart", [False, True])
def test_it_rounds_the_new_parameter_to_a_copy(shape: tuple[int, ...], dtype: torch.dtype, apart: bool) -> None:
    rows = torch.full((*shape[:-1], 3, shape[-1]), torch.nan, dtype=dtype, device=DEVICE)
    copy = rows[..., 1, :] if apart else torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
    found, expected = ([normal(shape, seed).abs() for seed in range(4)] for _ in range(2))
    update(*found, factor=0.3, copy=copy)
    update(*expected, factor=0.3)
    assert all(map(torch.equal, found, expected))
    rtol = BF16_RTOL if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(copy, expected[0].to(dtype), rtol=rtol, atol=0)
    assert rows[..., 0::2, :].isnan().all()  # nothing is written between the rows
    written = copy.clone()
    update(*found, factor=0.3, copy=copy, rejected=True)
    assert torch.equal(copy, written)


def test_a_rejected_step_changes_no_bit() -> None:
    p, g, m, v = (normal((100,), seed) for seed in range(4))
    g[3] = torch.nan
    before = [x.clone() for x in (p, m, v)]
    update(p, g, m, v, factor=math.nan, rejected=True)
    assert all(map(torch.equal, (p, m, v), before))


def test_other_strides_are_refused() -> None:
    p, m, v = (normal((4, 4), seed) for seed in range(3))
    with pytest.raises(AssertionError, match=r"strides \(1, 4\)"):
        update(p, normal((4, 4), 3).T, m, v, factor=1.0)


@a_gpu
def test_more_elements_than_32_bits_count() -> None:
    shape = (2**20 + 1, 2048)
    if torch.cuda.mem_get_info()[0] < 4 * 4 * math.prod(shape):
        pytest.skip("it takes 34 GB")
    p, m, v, g = (torch.zeros(shape, device=DEVICE) for _ in range(4))
    g[-1] = 1
    update(p, g, m, v, factor=1.0, t=1)
    assert not p[:-1].any()
    assert p[-1].cpu().numpy() == pytest.approx(-LR)
