"""Our AdamW is torch's, and clips: by torch's kernel and, on a GPU or in Triton's interpreter, by ours."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from needs import BF16_RTOL, triton_kernels
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch_calls import Calls

from tinyllama.checkpoint.tensors import materialize_optimizer_state
from tinyllama.config.args import OptimArgs, ParallelArgs, TrainArgs
from tinyllama.config.model import ModelConfig
from tinyllama.model import GPT, OPS
from tinyllama.train import adamw
from tinyllama.train.adamw import AdamW, local
from tinyllama.train.optim import build_optimizer
from tinyllama.train.parallel import finish_gradients, parallelize

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
SHAPES = [(5,), (6, 8), (0, 4), (3, 2100)]
FACTORS = [0.3, None, 0.7, 1.0, None, 0.1]
REJECTED = [True, False, False, True, False, False]
ULP = 2.0**-23


@pytest.fixture(params=["torch", pytest.param("kernel", marks=[pytest.mark.gpu, triton_kernels])])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where torch's kernel or ours makes the steps of our AdamW."""
    monkeypatch.setattr(adamw, "has_kernel", lambda _: request.param == "kernel")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[dist.DeviceMesh]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (1,))
    dist.destroy_process_group()


def normal(shape: tuple[int, ...], seed: int, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def parameters(device: str, mesh: dist.DeviceMesh | None = None) -> list[torch.nn.Parameter]:
    values = [normal(shape, number, device) for number, shape in enumerate(SHAPES)]
    return [torch.nn.Parameter(value if mesh is None else sharded(value, mesh)) for value in values]


def sharded(value: Tensor, mesh: dist.DeviceMesh) -> DTensor:
    return DTensor.from_local(value, mesh, [Shard(0)], run_check=False)


def gradient(parameter: Tensor, number: int, seed: int) -> Tensor:
    value = normal(tuple(parameter.shape), 100 * seed + number, str(local(parameter).device))
    return sharded(value, parameter.device_mesh) if isinstance(parameter, DTensor) else value


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Train with these factors, which torch's optimizer does not know, and gradients of NaN in steps to be rejected."""
    ours = isinstance(optimizer, AdamW)
    (group,) = optimizer.param_groups
    for step in steps:
        factor = FACTORS[step]
        for number, parameter in enumerate(group["params"]):
            parameter.grad = gradient(parameter, number, step)
            if REJECTED[step]:
                local(parameter.grad).fill_(torch.nan)
            if factor is not None and not ours:
                parameter.grad.mul_(factor)
        device = local(group["params"][0]).device
        if factor is not None and ours:
            optimizer.gradient_factor = torch.tensor(factor, device=device)
        optimizer.found_inf = torch.tensor(float(REJECTED[step]), device=device)  # type: ignore[attr-defined]
        group["lr"] = 1e-2 / (1 + step) if step < 5 else 0
        optimizer.step()
        optimizer.zero_grad()


def compare(ours: torch.optim.Optimizer, torchs: torch.optim.Optimizer, exact: bool) -> None:
    """The very numbers or, where ours are of our kernel, to a few units of the last digit of the largest."""
    for mine, theirs in zip(ours.param_groups[0]["params"], torchs.param_groups[0]["params"], strict=True):
        found, expected = ({"p": p.detach()} | opt.state[p] for p, opt in ((mine, ours), (theirs, torchs)))
        assert [*found] == [*expected] == ["p", "step", "exp_avg", "exp_avg_sq"]
        assert found["step"] == expected["step"] == 4
        assert found["step"].dtype == torch.float32
        assert all(isinstance(found[key], DTensor) == isinstance(mine, DTensor) for key in ("exp_avg", "exp_avg_sq"))
        for key, value in expected.items():
            one, other = local(found[key]), local(value)
            atol = 0.0 if exact or not other.numel() else 8 * ULP * other.abs().max().item()
            torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["tensors", "DTensors"])
def test_it_is_torchs(kind: str, device: str, mesh: dist.DeviceMesh) -> None:
    ours = AdamW(parameters(device, mesh if kind == "DTensors" else None), **SETTINGS)
    torchs = torch.optim.AdamW(parameters(device), **SETTINGS, fused=True)
    for optimizer in (ours, torchs):
        train(optimizer, range(len(FACTORS)))
    compare(ours, torchs, exact=not adamw.has_kernel(torch.device(device)))


torchs = functools.partial(torch.optim.AdamW, fused=True)


@pytest.mark.parametrize("first", [AdamW, torchs])
def test_either_goes_on_with_the_state_of_the_other(first: Any, device: str) -> None:
    second = {AdamW: torchs, torchs: AdamW}[first]
    begun = first(parameters(device), **SETTINGS)
    train(begun, range(3))
    resumed = second(begun.param_groups[0]["params"], **SETTINGS)
    resumed.load_state_dict(begun.state_dict())
    whole = torch.optim.AdamW(parameters(device), **SETTINGS, fused=True)
    for optimizer, steps in ((resumed, range(3, 6)), (whole, range(6))):
        train(optimizer, steps)
    compare(resumed, whole, exact=not adamw.has_kernel(torch.device(device)))


@pytest.mark.parametrize("rejected", [False, True])
def test_a_factor_is_of_one_step(rejected: bool, device: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(3, device=device))
    optimizer = AdamW([weight], **SETTINGS)
    weight.grad = torch.full((3,), 8.0, device=device)
    optimizer.gradient_factor = torch.tensor(0.5, device=device)
    optimizer.found_inf = torch.tensor(float(rejected), device=device)
    optimizer.step()
    first = optimizer.state[weight]["exp_avg"].clone()
    assert first.tolist() == pytest.approx([0.0 if rejected else 0.4] * 3)
    assert optimizer.gradient_factor is None
    weight.grad = torch.full((3,), 8.0, device=device)
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].tolist() == pytest.approx((0.9 * first + 0.8).tolist())


def test_parameters_without_a_gradient_and_found_inf_are_as_torch_has_them(device: str) -> None:
    ours, torchs = AdamW(parameters(device), **SETTINGS), torch.optim.AdamW(parameters(device), **SETTINGS, fused=True)
    for optimizer in (ours, torchs):
        first, second, *_ = optimizer.param_groups[0]["params"]
        optimizer.step()
        first.grad = torch.ones_like(first)
        optimizer.step()
        assert [*optimizer.state] == [first]
        second.grad = torch.ones_like(second)
        optimizer.step()
        assert [optimizer.state[one]["step"].item() for one in (first, second)] == [2, 1]
    for one, other in zip(ours.param_groups[0]["params"], torchs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(one, other, rtol=4 * ULP, atol=4 * ULP)


@pytest.mark.parametrize("gate", ["reference", "quack"])  # quack's has the rows of w1 and w2 alternate
def test_a_pass_computes_with_what_the_last_step_made_of_the_weights(
    gate: str, device: str, mesh: dist.DeviceMesh
) -> None:
    sizes = {"n_layer": 1, "n_head": 2, "n_query_groups": 1, "n_embd": 24, "intermediate_size": 36}
    with torch.device("meta"):
        gpt = GPT(ModelConfig("tiny", block_size=8, vocab_size=32, **sizes), OPS | {"swiglu": gate})
    model = parallelize(gpt, mesh, ParallelArgs(), 1, TrainArgs(precision="bf16"))
    gathered = model.gathered
    optimizer = build_optimizer(model, OptimArgs(lr=0.1))
    assert gathered.copies.are_kept == adamw.has_kernel(torch.device(device))

    def fill(tensors: Iterable[Any], seed: int) -> None:
        for number, tensor in enumerate(tensors):
            local(tensor.detach()).copy_(normal(tuple(tensor.shape), 100 * seed + number, device))

    def check_pass(rtol: float = 0) -> None:
        masters = [local(master.detach()) for master in model.parameters()]
        gathered.start_pass()
        for weight, master in zip(model.parameters(), masters, strict=True):
            torch.testing.assert_close(weight.detach(), master.bfloat16(), rtol=rtol, atol=0)

    materialize_optimizer_state(optimizer)
    fill(model.parameters(), 1)  # a checkpoint is loaded
    for step, rejected in enumerate((False, True, False), 2):
        check_pass()
        finish_gradients(model)
        fill((parameter.grad for parameter in model.parameters()), step)
        before = [local(parameter).clone() for parameter in model.parameters()]
        for bucket in [] if rejected else gathered.buckets:
            bucket.copy.fill_(torch.nan)
        optimizer.found_inf = torch.tensor(float(rejected), device=device)  # type: ignore[attr-defined]
        optimizer.step()
        assert all(torch.equal(local(p), old) == rejected for p, old in zip(model.parameters(), before, strict=True))
        check_pass(BF16_RTOL if gathered.copies.are_kept else 0)  # a validation
        gathered.end_pass()
        fill(model.parameters(), 100 + step)


def test_the_host_reads_nothing_from_the_device(device: str) -> None:
    """It would wait for the whole step, and the device then for the host."""
    optimizer, read = AdamW(parameters(device), **SETTINGS), "aten._local_scalar_dense.default"
    with Calls() as calls:
        train(optimizer, range(len(FACTORS)))
        assert calls.counts[read] == 0
        optimizer.state[optimizer.param_groups[0]["params"][0]]["step"].item()
        assert calls.counts[read] == 1


def test_hooks_are_called_once() -> None:
    """An optimizer that called its parent's step would call them again, if one of the parent's class had been made."""
    torch.optim.AdamW(parameters("cpu"), **SETTINGS, fused=True)
    optimizer = AdamW(parameters("cpu"), **SETTINGS)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    with torch.profiler.profile() as profile:
        train(optimizer, range(1))
    assert calls == ["before", "after"]
    assert [event.count for event in profile.key_averages() if event.key == "Optimizer.step#AdamW.step"] == [1]
