"""RMSNorm's backends against its formula in fp64."""

import pytest
import torch
from needs import gpu
from operations import TOLERANCE, close, forward_backward, normal, usable

from tinyllama.ops import rms_norm


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("backend", rms_norm.BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 5, 130), (3, 97, 2048)])
def test_rms_norm_divides_a_sum_by_its_root_mean_square(backend, device, shape, dtype):
    call = usable("rms_norm", backend, device)
    if backend == "quack" and shape[-1] % 8:
        pytest.skip("a shape that this kernel is not made for")

    def plain(weight, *summands):
        x = sum(summands)
        return torch.stack((x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.size(-1) + 1e-5) * weight, x))

    weight = normal(shape[-1], dtype=dtype, device=device)
    x, added = normal(2, *shape, dtype=dtype, device=device).unbind()
    for inputs in ((weight, x), (weight, x, added)):
        expected = forward_backward(plain, *(x.detach().double().requires_grad_() for x in inputs))
        ours = forward_backward(lambda weight, x, *added: torch.stack(call(x, weight, 1e-5, *added)), *inputs)
        close(ours, expected, dtype, "rms_norm")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_rms_norm_of_a_quiet_stream_is_ruled_by_eps(backend):
    # mean squares of 1e-6, a tenth of eps, which is added to them and not to their root
    x, weight = normal(5, 64).detach() * 1e-3, normal(64).detach()
    for eps in (1e-5, 3e-6):
        mean_square = x.double().square().mean(-1, keepdim=True)
        expected = x.double() / (mean_square + eps).sqrt() * weight.double()
        normed, _ = rms_norm.BACKENDS[backend].call(x, weight, eps)
        torch.testing.assert_close(normed.double(), expected, rtol=1e-6, atol=1e-7)


def test_rms_norm_of_bf16_is_rounded_before_its_weight_as_transformers_does_it():
    x, weight = (normal(*shape, dtype=torch.bfloat16).detach() for shape in ((64, 130), (130,)))
    x64 = x.double()
    normed = (x64 / (x64.square().mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
    found, _ = rms_norm.reference(x, weight, 1e-5)
    assert found.dtype == torch.bfloat16
    assert (found != normed * weight).double().mean() < 1e-3  # but where fp32 rounds to the other side


def test_rms_norm_of_bf16_divides_in_fp32():
    x, ones = normal(8, 130, dtype=torch.bfloat16), torch.ones(130, dtype=torch.bfloat16)
    normed, stream = rms_norm.reference(x, ones, 1e-5)
    assert torch.equal(normed, rms_norm.reference(x.float(), ones.float(), 1e-5)[0].bfloat16())
    assert torch.equal(stream, x)
