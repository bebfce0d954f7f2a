"""The model laid over the ranks: what is compiled, recomputed and computed in which dtype."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import flex_attention

from tinyllama.config.args import ParallelArgs, TrainArgs
from tinyllama.config.model import ModelConfig
from tinyllama.model import GPT, OPS, Linear
from tinyllama.train.optim import local_gradients
from tinyllama.train.parallel import check_dtypes, finish_gradients, mixed_precision, parallelize, recomputing, saved


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One rank, here."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def on_meta(**ops: str) -> GPT:
    sizes = {"block_size": 8, "vocab_size": 64, "n_layer": 2, "n_head": 2, "n_query_groups": 1, "n_embd": 16}
    with torch.device("meta"):
        return GPT(ModelConfig("tiny", **sizes, intermediate_size=24), OPS | ops)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("train", "whole"),
    [
        ({}, None),
        ({"compile": False}, None),
        ({"compile": True}, True),
        ({"compile": True, "activation_checkpointing": "full"}, True),
        ({"compile": True, "precision": "float8"}, True),
    ],
)
def test_which_modules_are_compiled(
    mesh: DeviceMesh, train: dict[str, Any], whole: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks and the last norm, whole, and each for one shape; a compiler that compiles nothing is enough to tell."""
    compiled: list[Any] = []
    model = on_meta()
    monkeypatch.setattr(torch, "compile", lambda forward, **how: compiled.append((forward, how)) or forward)
    parallelize(model, mesh, ParallelArgs(), 1, TrainArgs(**train))
    blocks = [*model.transformer["h"].children()]
    if whole is None:
        assert compiled == []
    else:
        assert [how for _, how in compiled] == [{"fullgraph": whole, "dynamic": False}] * 3
        owners = [getattr(forward, "__self__", None) for forward, _ in compiled]
        if "activation_checkpointing" not in train:
            assert owners == [*blocks, model.transformer["ln_f"]]
        else:  # what is computed again is inside what is compiled
            assert [forward.__name__ for forward, _ in compiled] == ["checkpointed", "checkpointed", "forward"]
    in_float8 = [
        module.scales is not None for block in blocks for module in block.modules() if isinstance(module, Linear)
    ]
    assert in_float8 == [train.get("precision") == "float8"] * 10
    assert all(not parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("recomputed", ["none", "selective", "full"])
def test_flex_without_documents_is_compiled_and_computed_again(
    mesh: DeviceMesh, recomputed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that traces and generates no code: for a CPU Inductor has none that trains with flex."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    ids = torch.arange(16).view(2, 8) % 7
    found = []
    for name in ("reference", "flex"):
        train = TrainArgs(precision="fp32", compile=name == "flex", activation_checkpointing=recomputed)
        model = parallelize(on_meta(attention=name), mesh, ParallelArgs(), 1, train)
        with torch.no_grad():
            model(ids[:1])  # as a validation that continues prompts does
        loss = model(ids, ids)
        loss.backward()
        finish_gradients(model)
        found.append([loss.detach(), *local_gradients(model)])
    for reference, flex in zip(*found, strict=True):
        torch.testing.assert_close(flex, reference, rtol=1e-4, atol=1e-5)


def test_master_weights_and_the_reduction_are_fp32(mesh: DeviceMesh) -> None:
    for precision, computed in (("fp32", "float32"), ("bf16", "bfloat16")):
        train = TrainArgs(precision=precision)  # type: ignore[arg-type]
        model = parallelize(on_meta(), mesh, ParallelArgs(), 1, train)
        assert check_dtypes(model, train) == f"master float32, compute {computed}, reduction float32"
        policy = mixed_precision(train)
        assert policy.reduce_dtype == torch.float32
        assert policy.param_dtype == getattr(torch, computed)
        assert policy.cast_forward_inputs is False
        ids = torch.zeros(1, 8, dtype=torch.int64)
        model(ids, ids).backward()
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, computed)}
        finish_gradients(model)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert {gradient.dtype for gradient in local_gradients(model)} == {torch.float32}
    with pytest.raises(RuntimeError, match="the master weights are .*bfloat16.*, not fp32"):
        check_dtypes(on_meta().bfloat16(), TrainArgs())


@pytest.mark.parametrize("what", ["full", "selective"])
def test_checkpointing_keeps_the_residual_stream_as_one_tensor(what: str) -> None:
    seen = []

    def forward(x: torch.Tensor, added: torch.Tensor | None, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((x.tolist(), added))
        return x * factor, x.square()

    x, added = (torch.tensor(values, requires_grad=True) for values in ([1.0, 2.0], [5.0, 7.0]))
    first, second = recomputing(forward, what)(x, added, 3.0)
    assert (first.tolist(), second.tolist()) == ([18.0, 27.0], [36.0, 81.0])
    second.sum().backward()
    assert seen == [([6.0, 9.0], None)] * 2
    assert x.grad.tolist() == added.grad.tolist() == [12.0, 18.0]
    assert recomputing(forward, what)(x, None, 3.0)[0].tolist() == [3.0, 6.0]


class FlashAttention(torch.autograd.Function):
    """As flash-attn calls its operation, with (out, lse) kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor) -> torch.Tensor:
        out, lse = torch.ops.flash_attn._flash_attn_forward(q)
        ctx.save_for_backward(out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        out, lse = ctx.saved_tensors
        return gradients[0] * out * lse


@pytest.mark.parametrize(("what", "calls"), [("selective", 1), ("full", 2)])
def test_selective_checkpointing_keeps_the_result_of_flash_attn(what: str, calls: int) -> None:
    """Its operation does not exist before flash-attn is imported: this one has its name."""
    seen = []

    def attend(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(q)
        return q.exp(), torch.ones_like(q)

    library = torch.library.Library("flash_attn", "DEF")
    library.define("_flash_attn_forward(Tensor q) -> (Tensor, Tensor)")
    library.impl("_flash_attn_forward", attend, "CPU")
    try:
        q = torch.tensor([0.0, 1.0], requires_grad=True)
        recomputing(lambda x, added: FlashAttention.apply(2 * x), what)(q, None).sum().backward()
    finally:
        library._destroy()
    assert len(seen) == calls
    torch.testing.assert_close(q.grad, 2 * (2 * q).exp())


def test_without_checkpointing_a_forward_is_left_alone() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x

    assert recomputing(forward, "none") is forward
    assert recomputing(forward, "full") is not forward


def test_selective_checkpointing_keeps_products_and_attention() -> None:
    aten, ours = torch.ops.aten, torch.ops.tinyllama
    assert set(saved()) == {
        aten.mm.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.higher_order.flex_attention,
        ours.flash_attn_4.default,
        ours.swiglu_quack.default,
        ours.float8_linear.default,
        ours.float8_swiglu.default,
    }
