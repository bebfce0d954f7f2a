"""Rotary position embedding against rotation of complex numbers."""

import math

import pytest
import torch
from needs import gpu
from operations import TOLERANCE, normal, usable

from tinyllama.ops.rope import BACKENDS as ROPES
from tinyllama.ops.rope import rope, rope_tables


def test_rope_turns_each_pair_of_halves_by_position_times_frequency():
    x = normal(2, 3, 37, 10)
    pairs = torch.complex(*x.detach().double().chunk(2, dim=-1))
    angles = torch.outer(torch.arange(37.0).double(), 10000 ** (-torch.arange(5).double() / 5))
    turned = torch.view_as_real(torch.polar(torch.ones(()).double(), angles) * pairs)
    cos, sin = rope_tables(37, 10, 10000, torch.device("cpu"))
    torch.testing.assert_close(rope(x, cos, sin).double(), torch.cat(turned.unbind(-1), -1), atol=1e-5, rtol=0)
    assert cos.dtype == sin.dtype == torch.float32


@pytest.mark.parametrize("ratio", [1, 4, 0.5])
def test_condensed_positions_have_the_angles_of_nearer_ones(ratio):
    cos, sin = rope_tables(64, 8, 500, torch.device("cpu"), ratio)
    angles = [[position / ratio / 500 ** (2 * i / 8) for i in range(4)] for position in range(64)]
    for table, function in ((cos, math.cos), (sin, math.sin)):
        expected = torch.tensor([[function(angle) for angle in row] for row in angles], dtype=torch.float64)
        torch.testing.assert_close(table.double(), expected, atol=2e-5, rtol=0)


def test_rope_gradient_turns_back():
    x = normal(1, 2, 9, 8)
    cos, sin = rope_tables(9, 8, 10000, torch.device("cpu"))
    y = rope(x, cos, sin)
    (gradient,) = torch.autograd.grad((y * y.detach()).sum(), x)
    torch.testing.assert_close(gradient, x.detach())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("backend", ROPES)
@pytest.mark.parametrize(("B", "T", "G", "queries", "hs"), [(2, 40, 2, 3, 16), (3, 7, 1, 1, 24), (1, 129, 4, 8, 64)])
@pytest.mark.parametrize("own_positions", [False, True])
def test_heads_are_taken_apart_and_rotated(backend, device, dtype, B, T, G, queries, hs, own_positions):
    call = usable("rope", backend, device, dtype)
    qkv = normal(B, T, G, queries + 2, hs, dtype=dtype, device=device)
    cos, sin = rope_tables(T, hs, 10000, torch.device(device))
    if own_positions:
        own = torch.randint(T, (B, T), generator=torch.Generator().manual_seed(3))
        cos, sin = (table[own.to(device)][:, None] for table in (cos, sin))  # (B, 1, T, hs/2)

    def plain(qkv):
        places = range(queries), [queries], [queries + 1]
        q, k, v = (
            torch.stack([qkv[:, :, g, i] for g in range(G) for i in of], dim=1) for of in places
        )  # (B, ., T, hs)
        turn = torch.complex(cos.double(), sin.double())
        turned = [torch.complex(*x.chunk(2, dim=-1)) * turn for x in (q, k)]
        return *(torch.cat((x.real, x.imag), dim=-1) for x in turned), v

    expected = plain(qkv.detach().double().requires_grad_())
    found = call(qkv, cos, sin)
    limit = 1e-6 if dtype == torch.float32 else 4e-3
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= limit * other.norm()
    weights = [normal(*x.shape, device=device).detach() for x in found]
    exact = qkv.detach().double().requires_grad_()
    (d_expected,) = torch.autograd.grad(plain(exact), exact, [w.double() for w in weights])
    (d_found,) = torch.autograd.grad(found, qkv, [w.to(dtype) for w in weights])
    assert (d_found.double() - d_expected).norm() <= limit * d_expected.norm()


def test_rope_of_bf16_is_computed_in_fp32():
    x = normal(1, 2, 2048, 64, dtype=torch.bfloat16)
    cos, sin = rope_tables(2048, 64, 10000, torch.device("cpu"))
    assert torch.equal(rope(x, cos, sin), rope(x.float(), cos, sin).bfloat16())


def test_rope_tables_are_exact_at_the_end_of_the_context():
    cos, _ = rope_tables(2048, 64, 10000, torch.device("cpu"))
    assert cos[2047, 1].item() == pytest.approx(math.cos(2047 * 10000 ** (-2 / 64)), abs=2e-4)
    assert cos[0].tolist() == [1.0] * 32
