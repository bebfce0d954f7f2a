"""How many ranks there are, by what srun, torchrun or nobody has set, and launches that cannot be meant."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tinyllama import InputError, distributed
from tinyllama.args import OptimArgs, ParallelArgs, TrainArgs
from tinyllama.config import ModelConfig
from tinyllama.distributed import Preemption, dtypes, parallelize, ranks, recomputing, shard_size
from tinyllama.model import GPT, OPS
from tinyllama.optim import build_optimizer, clip, local_gradients

BATCH = {"SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NNODES": "2", "SLURM_PROCID": "0"}
SRUN = BATCH | {"SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "tinyllama"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}
SHELL = {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "bash"}  # srun --pty bash
ONE_A_NODE = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


GOOD: dict[str, tuple[dict[str, str], int | None, tuple[int, int]]] = {
    "python": ({}, None, (1, 1)),
    "python with devices": ({}, 4, (4, 1)),
    "srun": (SRUN, None, (8, 2)),
    "srun with the right devices": (SRUN, 8, (8, 2)),
    "srun of one task": ({"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_STEP_ID": "0"}, None, (1, 1)),
    "torchrun": (TORCHRUN, None, (4, 2)),
    "torchrun, once a node": (SRUN | TORCHRUN | ONE_A_NODE, None, (4, 2)),
    "torchrun in a batch script": (BATCH | TORCHRUN, None, (4, 2)),
    "python in a shell of Slurm": (SHELL, 2, (2, 1)),
    "python in a job of one task": ({"SLURM_NTASKS": "1", "SLURM_NNODES": "1"}, None, (1, 1)),
}


@pytest.mark.parametrize("case", GOOD)
def test_ranks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env, devices, expected = GOOD[case]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert ranks(ParallelArgs(devices=devices)) == expected


BAD: dict[str, tuple[dict[str, str | None], int | None, int, str]] = {
    "in the batch script": (BATCH, None, 0, "the job has 16 tasks and this is none of them: start it with srun"),
    "named bash": (SRUN | {"SLURM_JOB_NAME": "bash"}, None, 0, "the Slurm job is named bash"),
    "from salloc": (
        SRUN | {"SLURM_JOB_NAME": "interactive"},
        None,
        0,
        "its 16 tasks would train alone, each of them",
    ),
    "ntasks alone": (SRUN | {"SLURM_NTASKS_PER_NODE": None}, None, 0, "srun has --ntasks 16 without --ntasks-per-node"),
    "uneven": (SRUN | {"SLURM_NTASKS": "15"}, None, 0, "--ntasks 15, which is not 2 nodes x --ntasks-per-node 8"),
    "torchrun for each task": (SRUN | TORCHRUN, None, 0, "srun starts torchrun 16 times on 2 nodes"),
    "devices under srun": (SRUN, 4, 0, "parallel.devices is 4 and srun started 8 ranks on each node: leave it out"),
    "devices under torchrun": (TORCHRUN, 8, 0, "parallel.devices is 8 and torchrun started 4 ranks on each node"),
    "a GPU a task": (SRUN, None, 1, "8 ranks on each node and 1 GPUs to be seen here: start fewer, or give --gpus-per"),
    "more ranks than GPUs": ({}, 3, 2, "3 ranks on each node and 2 GPUs to be seen here"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_launch_that_cannot_be_meant(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env, devices, gpus, said = BAD[case]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in env.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        ranks(ParallelArgs(devices=devices))
    (fault,) = error.value.args
    assert said in fault


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of this process, and its signals as they were."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("inherited", "by"), [(signal.default_int_handler, "SIGINT"), (signal.SIG_IGN, None)], ids=["answered", "ignored"]
)
def test_ctrl_c_that_a_script_has_turned_off_stays_off(alone: None, inherited: Any, by: str | None) -> None:
    signal.signal(signal.SIGINT, inherited)
    preemption = Preemption()
    os.kill(os.getpid(), signal.SIGINT)
    assert preemption.asked() == by
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.asked() == "SIGTERM"


def test_ranks_that_share_the_weights() -> None:
    sizes = {"full": 16, "node": 8, "none": 1, 4: 4, 16: 16}
    for shard, size in sizes.items():
        assert shard_size(ParallelArgs(shard=shard), 8, 2) == size  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"parallel.shard 5 does not divide the 16 ranks; valid: 1, 2, 4, 8, 16$"):
        shard_size(ParallelArgs(shard=5), 8, 2)


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
    converted: list[torch.nn.Module] = []
    model = on_meta()
    monkeypatch.setattr(torch, "compile", lambda forward, **how: compiled.append((forward, how)) or forward)
    monkeypatch.setattr(distributed.float8, "convert", converted.append)
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
    assert converted == ([model.transformer["h"]] if train.get("precision") == "float8" else [])
    assert all(not parameter.is_meta for parameter in model.parameters())


def test_dtypes_are_told_and_refused_unless_what_is_kept_is_fp32(mesh: DeviceMesh) -> None:
    for precision, computed in (("fp32", "float32"), ("bf16", "bfloat16")):
        model = parallelize(on_meta(), mesh, ParallelArgs(), 1, TrainArgs(precision=precision))  # type: ignore[arg-type]
        assert dtypes(model) == f"master float32, pass {computed}, reduction float32"
        for block in model.transformer["h"].children():
            state = block._get_fsdp_state()
            assert state._mp_policy.cast_forward_inputs is False
    last = [*model.transformer["h"].children()][-1]._get_fsdp_state()
    last._mp_policy = dataclasses.replace(last._mp_policy, reduce_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="gradients are reduced in .*bfloat16.*, not in fp32"):
        dtypes(model)
    with torch.device("meta"):
        half = on_meta().bfloat16()
    parallelize(half, mesh, ParallelArgs(), 1, TrainArgs())
    with pytest.raises(RuntimeError, match=r"master weights are \{torch.bfloat16\}"):
        dtypes(half)


def test_without_checkpointing_a_forward_is_left_alone() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x

    assert recomputing(forward, "none") is forward
    assert recomputing(forward, "full") is not forward


def test_the_optimizer_has_every_setting_and_every_parameter() -> None:
    model = GPT(on_meta().config)
    args = OptimArgs(lr=0.5, beta1=0.25, beta2=0.75, weight_decay=0.125)
    (group,) = build_optimizer(model, args).param_groups  # one: norms and embeddings decay too, as upstream
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in model.parameters()}
    found = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "fused")}
    assert found == {"lr": 0.5, "betas": (0.25, 0.75), "eps": 1e-8, "weight_decay": 0.125} | {
        "amsgrad": False,
        "maximize": False,
        "fused": True,  # the one that skips a step on the device
    }


def test_clipping_scales_what_the_optimizer_sees() -> None:
    model = torch.nn.Linear(2, 1)
    model(torch.tensor([[3.0, 4.0]])).sum().backward()  # gradients 3, 4 and 1
    gradients = local_gradients(model)
    norm = torch.tensor(26.0).sqrt()
    clip(gradients, norm, 10.0)
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[3.0, 4.0]]
    clip(gradients, norm, 0.5)
    scale = 0.5 / 26**0.5
    assert model.weight.grad.tolist()[0] == pytest.approx([3 * scale, 4 * scale], rel=1e-6)
    assert model.bias.grad.tolist() == pytest.approx([scale], rel=1e-6)
    model.bias.grad = None
    assert len(local_gradients(model)) == 1
