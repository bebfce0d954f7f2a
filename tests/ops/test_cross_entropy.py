"""Cross-entropy's backends and kernels against its formula in fp64, and the gradient of the output matrix."""

import math

import pytest
import torch
from needs import gpu
from operations import TOLERANCE, close, forward_backward, normal, usable

from tinyllama.ops import cross_entropy
from tinyllama.ops.cross_entropy import IGNORE_INDEX
from tinyllama.ops.linear import empty_sum


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("backend", cross_entropy.BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 5, 130), (3, 7, 11), (2, 128, 50)])
def test_cross_entropy_is_the_sum_over_targets_that_count(backend, device, shape, dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS_CHUNK", 4)  # several, the last one shorter
    call = usable("cross_entropy", backend, device)
    B, T, V = shape
    x, weight = normal(B, T, 8, dtype=dtype, device=device), normal(V, 8, dtype=dtype, device=device)
    targets = (torch.arange(B * T).view(B, T) % V).to(device)
    targets[-1, -1] = -100

    def plain(x, weight):
        logits = (x @ weight.T).flatten(0, 1)
        rows = [-torch.log_softmax(r, 0)[t] for r, t in zip(logits, targets.flatten(), strict=True) if t >= 0]
        return sum(rows, logits.sum() * 0)

    expected = forward_backward(plain, *(t.detach().double().requires_grad_() for t in (x, weight)))
    loss = call(x, weight, targets)
    assert loss.dtype == torch.float32
    close(forward_backward(lambda *inputs: call(*inputs, targets), x, weight), expected, dtype, "cross_entropy")
    with torch.no_grad():
        assert torch.equal(call(x, weight, targets), loss)


HALF_A_DIGIT = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def check_turned(logits, targets):
    # against PyTorch's loss of the same logits in float64
    exact = logits.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    (gradient,) = torch.autograd.grad(expected, exact)
    loss = cross_entropy._turn_into_gradient(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6 * len(logits))
    # a rounding to the dtype, which in fp16 may be to its smallest number, after those in fp32 of exponents of up to 70
    # and of what the target's softmax lacks to 1; a GPU's exp2 and log2 are off by up to 2^-22 (PTX ISA: ex2, lg2)
    smallest = 2**-25 if logits.dtype == torch.float16 else 0.0
    of_target = 3e-7 + (1 + math.log(2)) * 2**-22 * logits.is_cuda
    limit = gradient.abs() * (HALF_A_DIGIT[logits.dtype] + 5e-6) + smallest + of_target * (gradient < 0)
    assert ((logits.double() - gradient).abs() <= limit).all()
    assert (logits[targets == IGNORE_INDEX] == 0).all()


@pytest.mark.parametrize("dtype", HALF_A_DIGIT)
@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("V", [1, 7, 8192, 8200, 20001])  # the kernel's block is 8192
def test_logits_turn_into_the_gradient_of_their_loss(device, V, dtype):
    wide = 3 * normal(6, V + 24, dtype=dtype, device=device).detach()
    wide[:, V:] = 77  # greater than all logits
    wide[0, V - 1] = 20  # the target of this row is certain
    targets = torch.tensor([V - 1, 0, IGNORE_INDEX, V // 2, V - 1, IGNORE_INDEX], device=device)
    check_turned(wide[:, :V].clone(), targets)
    check_turned(wide[:1, :V].clone(), targets[:1])
    check_turned(wide[:, :V], targets)  # rows apart in memory
    assert (wide[:, V:] == 77).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", gpu])
def test_large_logits_and_those_that_cannot_be_have_a_gradient(device, dtype):
    targets = torch.tensor([0, 9000, IGNORE_INDEX, 19999], device=device)
    for sign in (1, -1):
        check_turned(sign * 1e4 + 8 * normal(4, 20000, dtype=dtype, device=device).detach(), targets)
    logits = normal(4, 20000, dtype=dtype, device=device).detach()
    logits[:, 1:8999] = -torch.inf  # all but one of the first block
    logits[1:, 0] = -torch.inf
    logits[:, 9001:19999:2] = -torch.inf
    logits[2, 0] = 0  # that of an ignored target
    check_turned(logits, targets)
    logits = torch.full((2, 20000), -torch.inf, dtype=dtype, device=device)
    logits[:, 15000] = 1
    check_turned(logits, torch.tensor([15000, 15000], device=device))


@pytest.mark.parametrize("dtype", HALF_A_DIGIT)
@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_tells_of_logits_that_are_not_finite(device, value, dtype):
    for places in ([0], [8999], [0, 8999], range(9000)):
        if value == -torch.inf and 0 not in places:
            continue  # only what is not the target can have no probability
        logits = normal(3, 9000, dtype=dtype, device=device).detach()
        logits[1, places] = value
        loss = cross_entropy._turn_into_gradient(logits, torch.zeros(3, dtype=torch.int64, device=device))
        assert not loss.isfinite()
        assert logits[::2].isfinite().all()


@pytest.mark.parametrize("device", ["cpu", gpu])
def test_no_rows_have_no_loss(device):
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert cross_entropy._turn_into_gradient(torch.empty(0, 100, device=device), none) == 0


@pytest.mark.parametrize("device", [gpu])
def test_logits_may_be_more_than_32_bits_can_count(device):
    logits = torch.empty(2**31 + 100, dtype=torch.bfloat16, device=device).as_strided((3, 100), (2**30, 1))
    logits.copy_(normal(3, 100).detach())
    check_turned(logits, torch.tensor([0, 50, 99], device=device))


@pytest.mark.parametrize("backend", cross_entropy.BACKENDS)
def test_a_loss_of_bf16_logits_is_summed_in_fp32(backend, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS_CHUNK", 16)
    x, weight = (normal(*shape, dtype=torch.bfloat16).detach() for shape in ((200, 16), (40, 16)))
    targets = torch.arange(200) % 40
    targets[::7] = -100
    logits = (x @ weight.T).double()
    expected = sum(logits[i].logsumexp(0) - logits[i, t] for i, t in enumerate(targets.tolist()) if t != -100)
    assert cross_entropy.BACKENDS[backend].call(x, weight, targets).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("wanted", ["x", "w", "xw"])
def test_the_chunked_loss_gives_the_gradients_that_are_asked_for(wanted):
    x, weight, targets = normal(9, 16), normal(40, 16), torch.arange(9)
    expected = dict(
        zip("xw", torch.autograd.grad(cross_entropy.reference(x, weight, targets), (x, weight)), strict=True)
    )
    for tensor, name in ((x, "x"), (weight, "w")):
        tensor.requires_grad_(name in wanted)
    cross_entropy.chunked(x, weight, targets).backward()
    for tensor, name in ((x, "x"), (weight, "w")):
        if name in wanted:
            torch.testing.assert_close(tensor.grad, expected[name], atol=1e-6, rtol=1e-6)
        else:
            assert tensor.grad is None


def test_the_chunked_loss_of_a_validation_computes_no_gradient(monkeypatch):
    x, weight, targets = normal(9, 16), normal(40, 16), torch.arange(9)
    expected = cross_entropy.chunked(x, weight, targets)
    monkeypatch.setattr(cross_entropy, "add_matmul", None)
    with torch.no_grad():
        assert torch.equal(cross_entropy.chunked(x, weight, targets, empty_sum(weight)), expected)


@pytest.mark.parametrize("device", ["cpu", gpu])
def test_the_scale_of_a_loss_is_not_rounded(device):
    x, weight = (normal(*shape, dtype=torch.bfloat16, device=device) for shape in ((9, 16), (40, 16)))
    targets = torch.arange(9, device=device)
    sums = []
    for scale in (1.0, 1.3):  # in bf16 1.297
        gradients = torch.autograd.grad(cross_entropy.chunked(x, weight, targets) * scale, (x, weight))
        sums.append([gradient.double().abs().sum().item() for gradient in gradients])
    assert [scaled / plain for scaled, plain in zip(sums[1], sums[0], strict=True)] == pytest.approx(
        [1.3] * 2, abs=5e-4
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("backend", cross_entropy.BACKENDS)
def test_the_gradient_of_the_output_matrix_may_be_added_to_a_sum(backend, device, dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS_CHUNK", 4)
    call = cross_entropy.BACKENDS[backend].call
    x, weight = (normal(*shape, dtype=dtype, device=device) for shape in ((9, 16), (40, 16)))
    targets = torch.arange(9, device=device)
    dx, dw = (g.double() for g in torch.autograd.grad(call(x, weight, targets) * 1.3, (x, weight)))
    gradient = empty_sum(weight)
    gradient.total.fill_(torch.nan)  # the first addition does not read it
    for times in (1, 2, 3):
        x.grad = None
        (call(x, weight, targets, gradient) * 1.3).backward()
        assert weight.grad is None
        assert gradient.total.dtype == torch.float32
        close([x.grad.double(), gradient.total.double()], [dx, times * dw], dtype, "cross_entropy")


def test_a_sum_has_the_gradient_of_the_output_matrix_before_it_is_rounded():
    x, weight, targets = normal(9, 16, dtype=torch.bfloat16), normal(40, 16, dtype=torch.bfloat16), torch.arange(9)
    sums = []
    for scale in (1.0, 1.3):
        sums.append(empty_sum(weight))
        (cross_entropy.chunked(x, weight, targets, sums[-1]) * scale).backward()
    assert torch.equal(sums[1].total, sums[0].total * 1.3)
    assert not torch.equal(sums[1].total, sums[1].total.bfloat16().float())


def test_what_is_not_counted_and_how_much_is_done_at_a_time():
    assert IGNORE_INDEX == -100  # PyTorch's own
    assert cross_entropy.LOGITS_CHUNK == 8192
