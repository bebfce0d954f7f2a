"""Ranks that hold all of the weights: their gradients are those of FSDP2, whatever computes them."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tinyllama.config.args import ParallelArgs, TrainArgs
from tinyllama.config.model import ModelConfig
from tinyllama.model import GPT, OPS, init_weights
from tinyllama.ops import swiglu
from tinyllama.ops.linear import empty_sum, linear
from tinyllama.train.optim import local_gradients
from tinyllama.train.parallel import finish_gradients, mixed_precision, parallelize, reshard, sync_gradients

CONFIG = ModelConfig(
    "tiny", block_size=16, vocab_size=64, n_layer=2, n_head=4, n_query_groups=2, n_embd=32, intermediate_size=48
)


LIMIT = {"fp32": 1e-6, "bf16": 1e-3}
"""0 on the CPUs seen so far; a matmul may round by where its operands lie"""


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quack's two kernels in plain PyTorch: what they compute, from the interleaved layout that they have."""

    def gemm_gated(x: torch.Tensor, w12: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        pre_gate = x @ w12
        return pre_gate, F.silu(pre_gate[:, 0::2]) * pre_gate[:, 1::2]

    def gemm_dgated(
        d: torch.Tensor, w3: torch.Tensor, pre: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up, d_gated = pre[:, 0::2], pre[:, 1::2], d @ w3
        sigmoid = gate.sigmoid()
        d_gate = d_gated * up * sigmoid * (1 + gate * (1 - sigmoid))
        return torch.stack((d_gate, d_gated * F.silu(gate)), dim=2).flatten(1), F.silu(gate) * up

    interface = ModuleType("quack.gemm_interface")
    interface.__dict__.update(gemm_gated=gemm_gated, gemm_dgated=gemm_dgated)
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", interface)
    monkeypatch.setattr(swiglu, "_tile", lambda: None)


def meta_model(config: ModelConfig = CONFIG, **ops: str) -> GPT:
    with torch.device("meta"):
        return GPT(config, OPS | ops)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    blocks = torch.randint(CONFIG.vocab_size, (count, 2, 17), generator=torch.Generator().manual_seed(1))
    return [(block[:, :-1], block[:, 1:]) for block in blocks]


def gathered_gradients(model: GPT, count: int = 2) -> dict[str, torch.Tensor]:
    for number, (ids, targets) in enumerate(batches(count)):
        sync_gradients(model, number == count - 1, ParallelArgs())
        model(ids, targets).backward()
    finish_gradients(model)
    return gradients(model)


def gradients(model: GPT) -> dict[str, torch.Tensor]:
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, local_gradients(model), strict=True))


def fsdp_gradients(mesh: DeviceMesh, train: TrainArgs, config: ModelConfig = CONFIG) -> dict[str, torch.Tensor]:
    model = meta_model(config)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=mixed_precision(train))
    fully_shard(model, mesh=mesh, mp_policy=mixed_precision(train))
    model.to_empty(device="cpu")
    init_weights(model, train.seed)
    for number, (ids, targets) in enumerate(batches(2)):
        model.set_requires_gradient_sync(number == 1)
        model(ids, targets).backward()
    return gradients(model)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradients_are_those_of_fsdp(mesh: DeviceMesh, precision: Any, checkpointing: Any) -> None:
    train = TrainArgs(precision=precision, activation_checkpointing=checkpointing)
    model = parallelize(meta_model(), mesh, ParallelArgs(), 1, train)
    expected = fsdp_gradients(mesh, train)
    for _ in range(2):  # those of a step are not in the next
        found = gathered_gradients(model)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert gradient.dtype == torch.float32
            assert apart(gradient, expected[name]) <= LIMIT[precision], name
            gradient.fill_(torch.nan)  # as in a skipped step
        model.zero_grad()


def test_a_weight_that_no_pass_reaches_has_a_gradient_of_0(mesh: DeviceMesh) -> None:
    model = parallelize(meta_model(), mesh, ParallelArgs(), 1, TrainArgs(precision="bf16"))
    first = gathered_gradients(model)
    assert all(gradient.norm() > 0 for gradient in first.values())
    model.zero_grad()
    model.gathered.start_pass()
    model.transformer["wte"](torch.tensor([3, 3, 5])).sum().backward()
    finish_gradients(model)
    found = gradients(model)
    assert found.pop("transformer.wte.weight").sum(1).tolist() == [0, 0, 0, 64, 0, 32] + [0] * (
        len(first["transformer.wte.weight"]) - 6
    )
    assert found.keys() == first.keys() - {"transformer.wte.weight"}
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("gate", ["reference", "quack"])
def test_a_compiled_block_writes_the_first_gradient_and_adds_the_others(
    mesh: DeviceMesh, kernels: None, monkeypatch: pytest.MonkeyPatch, gate: str
) -> None:
    train = TrainArgs(precision="fp32")
    expected = gathered_gradients(parallelize(meta_model(swiglu=gate), mesh, ParallelArgs(), 1, train), 3)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")  # what surrounds our operations is not what is asked
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, **how: compiled(forward, backend=counter, **how))
    model = parallelize(meta_model(swiglu=gate), mesh, ParallelArgs(), 1, TrainArgs(precision="fp32", compile=True))
    for _ in range(2):
        for name, gradient in gathered_gradients(model, 3).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
            gradient.fill_(torch.nan)
        model.zero_grad()
    assert counter.frame_count == 3  # the first block, the others, and the last norm, for all micro-batches


def test_the_output_matrix_may_be_the_embedding(mesh: DeviceMesh) -> None:
    config = ModelConfig(**(vars(CONFIG) | {"tie_embeddings": True}))
    train = TrainArgs(precision="bf16")
    model = parallelize(meta_model(config), mesh, ParallelArgs(), 1, train)
    expected = fsdp_gradients(mesh, train, config)
    found = gathered_gradients(model)
    assert all(apart(found[name], expected[name]) <= LIMIT["bf16"] for name in expected)


def test_w1_and_w2_alternate_in_memory_for_the_kernel_that_wants_it(mesh: DeviceMesh, kernels: None) -> None:
    train = TrainArgs(precision="fp32")
    plain = parallelize(meta_model(), mesh, ParallelArgs(), 1, train)
    quack = parallelize(meta_model(swiglu="quack"), mesh, ParallelArgs(), 1, train)
    expected = gathered_gradients(plain)
    sums = {id(layer.mlp.swiglu.w12.gradient) for layer in quack.layers}  # type: ignore[union-attr]
    for _ in range(2):
        found = gathered_gradients(quack)
        for name, gradient in found.items():
            assert gradient.is_contiguous()
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
        quack.zero_grad()
    for layer in quack.layers:
        module = layer.mlp.swiglu
        weight, gradient = module.w12  # type: ignore[misc]
        assert id(gradient) in sums
        for rows, matrix in ((weight[0::2], module.w1), (weight[1::2], module.w2)):
            assert torch.equal(rows, matrix.weight.full_tensor())  # type: ignore[operator]


def test_the_modules_have_the_masters_between_passes(mesh: DeviceMesh) -> None:
    model = parallelize(meta_model(), mesh, ParallelArgs(), 1, TrainArgs(precision="bf16"))
    masters = dict(model.named_parameters())
    assert all(isinstance(master, DTensor) and master.dtype == torch.float32 for master in masters.values())
    ids, targets = batches(1)[0]

    def loss() -> torch.Tensor:
        with torch.no_grad():
            return model(ids, targets)

    first = loss()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    reshard(model)
    assert all(parameter is masters[name] for name, parameter in model.named_parameters())
    with torch.no_grad():
        for master in masters.values():
            master.mul_(0)
    assert loss() != first  # a pass takes what the optimizer made of the masters
    assert loss().item() == pytest.approx(2 * 16 * torch.tensor(64.0).log().item(), rel=1e-2)


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_adds_its_gradient_to_a_sum(
    shape: tuple[int, ...], dtype: torch.dtype, seeded: Callable[..., Any]
) -> None:
    x, weight, d = seeded(*shape, dtype=dtype), seeded(7, 5, dtype=dtype), seeded(*shape[:-1], 7, dtype=dtype)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weight)]
    F.linear(*inputs).backward(d)
    gradient = empty_sum(weight)
    gradient.total.fill_(torch.nan)  # the first addition does not read it
    for times in (1, 2, 3):
        mine = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        out = linear(*mine, gradient)
        assert torch.equal(out, F.linear(x, weight))
        out.backward(d)
        assert torch.equal(mine[0].grad, inputs[0].grad)
        assert mine[1].grad is None
        assert gradient.total.dtype == torch.float32
        assert torch.equal(gradient.total, times * inputs[1].grad.float())


@pytest.fixture
def seeded() -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype: torch.randn(*shape, generator=generator).to(dtype)
