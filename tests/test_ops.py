import math

import pytest
import torch
import torch.nn.functional as F

from tinyllama.ops.attention import BACKENDS, attention, reference
from tinyllama.ops.cross_entropy import IGNORE_INDEX, cross_entropy
from tinyllama.ops.rms_norm import rms_norm
from tinyllama.ops.rope import rope, rope_tables
from tinyllama.ops.swiglu import swiglu

gpu = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])


def normal(*shape, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()


def forward_backward(function, *inputs):
    # the result and the gradients of its weighted sum, all in float64
    y = function(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.device, y.dtype)
    return [x.detach().double().cpu() for x in (y, *torch.autograd.grad((y * weights).sum(), inputs))]


def plain_attention(q, k, v):
    # one query at a time, one head at a time, only over what it may see
    group = q.size(1) // k.size(1)
    out = torch.zeros_like(q)
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])):
        keys, values = k[b, h // group, : t + 1], v[b, h // group, : t + 1]
        out[b, h, t] = torch.softmax(keys @ q[b, h, t] / q.size(-1) ** 0.5, dim=0) @ values
    return out


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (2, 8, 2, 7, 6), (1, 3, 3, 33, 16), (2, 4, 1, 65, 10)])
def test_attention_reference_is_causal_attention_over_groups(shape):
    B, nh, G, T, hs = shape
    inputs = normal(B, nh, T, hs), normal(B, G, T, hs), normal(B, G, T, hs)
    expected = forward_backward(plain_attention, *(x.detach().double().requires_grad_() for x in inputs))
    for ours, theirs in zip(forward_backward(reference, *inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)


# bf16: 8 bits of mantissa on values of order 1, and sums of T of them in the gradients
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 8), (2, 8, 2, 7, 16), (1, 3, 3, 130, 32), (2, 32, 4, 65, 64)])
@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_backends_agree_with_the_reference(backend, device, shape, dtype, atol):
    B, nh, G, T, hs = shape
    inputs = [normal(B, heads, T, hs, dtype=dtype, device=device) for heads in (nh, G, G)]
    expected = forward_backward(reference, *(x.detach().double().requires_grad_() for x in inputs))
    for ours, theirs in zip(forward_backward(lambda *x: attention(*x, backend), *inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol * max(1, theirs.abs().max()), rtol=0)


def test_rope_turns_each_pair_of_halves_by_position_times_frequency():
    x = normal(2, 3, 37, 10)
    pairs = torch.complex(*x.detach().double().chunk(2, dim=-1))
    angles = torch.outer(torch.arange(37.0).double(), 10000 ** (-torch.arange(5).double() / 5))
    turned = torch.view_as_real(torch.polar(torch.ones(()).double(), angles) * pairs)
    cos, sin = rope_tables(37, 10, 10000, torch.device("cpu"))
    torch.testing.assert_close(rope(x, cos, sin).double(), torch.cat(turned.unbind(-1), -1), atol=1e-5, rtol=0)
    assert cos.dtype == sin.dtype == torch.float32


def test_rope_gradient_turns_back():
    x = normal(1, 2, 9, 8)
    cos, sin = rope_tables(9, 8, 10000, torch.device("cpu"))
    y = rope(x, cos, sin)
    (gradient,) = torch.autograd.grad((y * y.detach()).sum(), x)
    torch.testing.assert_close(gradient, x.detach())


def test_rope_of_bf16_is_computed_in_fp32():
    x = normal(1, 2, 2048, 64, dtype=torch.bfloat16)
    cos, sin = rope_tables(2048, 64, 10000, torch.device("cpu"))
    assert torch.equal(rope(x, cos, sin), rope(x.float(), cos, sin).bfloat16())


def test_rope_tables_are_exact_at_the_end_of_the_context():
    cos, _ = rope_tables(2048, 64, 10000, torch.device("cpu"))
    assert cos[2047, 1].item() == pytest.approx(math.cos(2047 * 10000 ** (-2 / 64)), abs=2e-4)
    assert cos[0].tolist() == [1.0] * 32


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 130)])
def test_rms_norm_divides_by_the_root_mean_square(shape):
    def plain(x, weight):
        return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.size(-1) + 1e-5) * weight

    inputs = normal(*shape), normal(shape[-1])
    expected = forward_backward(plain, *(x.detach().double().requires_grad_() for x in inputs))
    for ours, theirs in zip(forward_backward(lambda x, w: rms_norm(x, w, 1e-5), *inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_rms_norm_of_bf16_divides_in_fp32():
    x, ones = normal(8, 130, dtype=torch.bfloat16), torch.ones(130, dtype=torch.bfloat16)
    assert torch.equal(rms_norm(x, ones, 1e-5), rms_norm(x.float(), ones.float(), 1e-5).bfloat16())


def test_swiglu_gates_the_first_argument():
    gate, up = normal(5, 7), normal(7, 5)
    expected = forward_backward(
        lambda g, u: g / (1 + torch.exp(-g)) * u,
        gate.detach().double().requires_grad_(),
        up.detach().double().view(5, 7).requires_grad_(),
    )
    ours = forward_backward(swiglu, gate, up.detach().view(5, 7).requires_grad_())
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 5, 130), (3, 7, 11)])
def test_cross_entropy_is_the_sum_over_targets_that_count(shape):
    logits = normal(*shape)
    targets = torch.arange(math.prod(shape[:2])).view(shape[:2]) % shape[2]
    targets[-1, -1] = IGNORE_INDEX

    def plain(x):
        rows = [-torch.log_softmax(r, 0)[t] for r, t in zip(x.flatten(0, 1), targets.flatten(), strict=True) if t >= 0]
        return sum(rows, x.sum() * 0)

    expected = forward_backward(plain, logits.detach().double().requires_grad_())
    for ours, theirs in zip(forward_backward(lambda x: cross_entropy(x, targets), logits), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_cross_entropy_of_bf16_logits_is_fp32():
    logits, targets = normal(4, 9, 1000, dtype=torch.bfloat16), torch.arange(36).view(4, 9)
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
