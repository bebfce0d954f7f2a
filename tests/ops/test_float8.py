"""Casts and matmuls in float8: the numbers, and on a GPU the kernels, against what they stand for."""

import pytest
import torch
import torch.nn.functional as F
from needs import a_gpu, float8_on_cpu, gpu
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_compiler

from tinyllama.model import Linear
from tinyllama.ops import float8, float8_casts
from tinyllama.ops.float8_casts import AMAX, ROW, SCALE, SCALE_INV
from tinyllama.ops.linear import GradientSum

E4M3, E5M2 = float8.E4M3, float8.E5M2


def row(device: str, scale: float = 8.0) -> torch.Tensor:
    row = torch.zeros(ROW, device=device)
    row[SCALE], row[SCALE_INV] = scale, 1 / scale
    return row


def normal(*shape: int, device: str, std: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * std).bfloat16().to(device)


def casts(device: str):
    return float8._casts(torch.empty(0, device=device))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("device", ["cpu", gpu])
def test_a_cast_writes_both_layouts_and_records_amax(device: str, dtype: torch.dtype) -> None:
    x = normal(200, 144, device=device, std=20.0)
    x[0, :4] = torch.tensor([-3000.0, float("inf"), float("-inf"), float("nan")])
    straight, transposed = (torch.zeros(shape, dtype=dtype, device=device) for shape in (x.shape, x.shape[::-1]))
    scale = row(device)
    casts(device).cast(x[1:], scale, straight[1:], None)
    assert scale[AMAX] == x[1:].float().abs().max()
    casts(device).cast(x[:1], row(device), straight[:1], None)
    casts(device).cast(x, row(device), None, transposed)
    assert torch.equal(straight.float().nan_to_num(7), transposed.T.float().nan_to_num(7))
    most = torch.finfo(dtype).max
    assert torch.equal(straight[1:].float(), (x[1:].float() * 8).clamp(-most, most).to(dtype).float())
    assert straight[0, 0].item() == max(-most, torch.tensor(-24000.0).to(E5M2).item())
    assert straight[0, 1:4].isnan().all()


@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("shape", [(64, 48), (16, 16), (144, 272), (512, 2048)])
def test_the_gate_and_its_gradient_are_autograds(device: str, shape: tuple[int, int]) -> None:
    N, hidden = shape
    ab = normal(N, 2 * hidden, device=device).double().requires_grad_()
    expected = F.silu(ab[:, 0::2]) * ab[:, 1::2]
    dh = normal(N, hidden, device=device, seed=1)
    (d_expected,) = torch.autograd.grad(expected, ab, dh.double())
    h, h_t = (torch.zeros(size, dtype=E4M3, device=device) for size in (shape, shape[::-1]))
    d_ab, d_ab_t = (torch.zeros(size, dtype=E5M2, device=device) for size in (ab.shape, ab.shape[::-1]))
    h_row, d_row = row(device), row(device, 64.0)
    casts(device).gate(ab.detach().bfloat16(), h_row, h)
    casts(device).gate_backward(dh, ab.detach().bfloat16(), d_row, h_row, d_ab, d_ab_t, h_t)
    assert torch.equal(h.float(), h_t.T.float())
    assert torch.equal(d_ab.float(), d_ab_t.T.float())
    for found, of, scale, step in ((h, expected, h_row, 2**-4), (d_ab, d_expected, d_row, 2**-3)):
        error = (found.double() * scale[SCALE_INV] - of).abs()
        smallest = {E4M3: 2**-9, E5M2: 2**-16}[found.dtype] * scale[SCALE_INV].item()
        assert (error <= of.abs() * step * 1.01 + smallest).all()  # half of the last digit
        assert error.norm() > 1e-3 * of.norm()  # it has been rounded
        assert scale[AMAX].item() == pytest.approx(of.abs().max().item(), rel=1e-5)


@pytest.mark.gpu
@a_gpu
def test_the_kernels_are_pytorchs_operations() -> None:
    x = normal(4096, 2048, device="cuda", std=30.0)
    found, expected = (torch.zeros(x.shape, dtype=E4M3, device="cuda") for _ in range(2))
    casts("cuda").cast(x, row("cuda"), found, None)
    float8_casts.cast(x, row("cuda"), expected, None)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_zeros_and_tiny_numbers_have_a_scale() -> None:
    rows = torch.zeros(3, ROW)
    rows[:, SCALE] = torch.tensor([1.0, 1.0, 4.0])
    rows[1, AMAX] = 1e-38
    float8.rescale(rows, E4M3)
    assert rows[:, SCALE].tolist() == [1.0, 2.0**100, 4.0]
    assert rows[:, SCALE_INV].tolist() == [1.0, 2.0**-100, 0.25]
    assert float8.powers_of_two(torch.tensor([-126, 0, 127], dtype=torch.int32)).tolist() == [2.0**-126, 1.0, 2.0**127]


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=float8_on_cpu), gpu])
def test_a_weights_gradient_is_added_in_fp32(device: str) -> None:
    x, gradient = normal(64, 32, device=device), normal(64, 48, device=device, seed=1)
    weight = normal(48, 32, device=device, seed=2).requires_grad_()
    scales = float8.new_scales(torch.tensor(False), device)
    float8.linear(x, weight, scales).backward(gradient)
    total = torch.full((48, 32), 3.0, device=device)
    kept = GradientSum(total, torch.tensor(False))
    float8.linear(x.requires_grad_(), weight.detach(), scales, kept).backward(gradient)
    assert weight.grad is not None
    assert (total - 3 - weight.grad.float()).norm() < 3e-3 * weight.grad.float().norm()
    assert (total - 3 - gradient.float().T @ x.float()).norm() < 8e-2 * weight.grad.float().norm()
    kept.empty.fill_(True)
    float8.linear(x, weight.detach(), scales, kept, x_is_kept=True).backward(gradient)
    assert (total - weight.grad.float()).norm() < 3e-3 * weight.grad.float().norm()
    assert not kept.empty


@float8_on_cpu
@pytest.mark.parametrize(("summed", "gradient"), [(False, "float8_weight_matmul"), (True, "float8_add_matmul")])
def test_torch_compile_sees_no_matmul_in_float8(summed: bool, gradient: str) -> None:
    """Which torch 2.11 cannot trace; with FSDP2 no gradient is added to a sum."""
    called: list[str] = []

    def collect(graph: torch.fx.GraphModule, inputs: object) -> object:
        for node in graph.graph.nodes:
            if node.op == "call_function":
                mutates = "auto_functionalized" in str(node.target)
                called.append(str(node.args[0] if mutates else node.target))
        return graph

    scales = float8.new_scales(torch.tensor(False), "cpu")
    sums = GradientSum(torch.zeros(48, 32), torch.tensor(True)) if summed else None
    x, weight = normal(64, 32, device="cpu").requires_grad_(), normal(48, 32, device="cpu", seed=1).requires_grad_()
    backend = aot_autograd(fw_compiler=make_boxed_compiler(collect))
    torch.compile(float8.linear, backend=backend, fullgraph=True)(x, weight, scales, sums).sum().backward()
    ours = [name for name in called if "tinyllama" in name]
    assert ours == [f"tinyllama.{name}.default" for name in ("float8_linear", "float8_linear_backward", gradient)]
    assert not [name for name in called if "mm" in name.replace("matmul", "")]


@float8_on_cpu
def test_only_linear_modules_with_scales_are_in_float8() -> None:
    linear = Linear(32, 16)
    x = normal(64, 32, device="cpu").float()
    with torch.no_grad():
        linear.weight.copy_(normal(16, 32, device="cpu", seed=1))
        plain = linear(x)
        linear.scales = float8.new_scales(torch.tensor(False), "cpu")
        linear.bfloat16()
        rounded = linear(x.bfloat16())
    assert 1e-2 < (rounded - plain).norm() / plain.norm() < 8e-2
