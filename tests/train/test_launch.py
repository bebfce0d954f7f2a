"""How many ranks there are, by what srun, torchrun or nobody has set, and launches that cannot be meant."""

import os
from typing import Any

import pytest
import torch

from tinyllama import InputError
from tinyllama.config.args import ParallelArgs
from tinyllama.train.launch import World, find_world

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
    world = find_world(ParallelArgs(devices=devices))
    assert (world.local_ranks, world.nodes) == expected


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
        find_world(ParallelArgs(devices=devices))
    (fault,) = error.value.args
    assert said in fault


@pytest.mark.parametrize(("shard", "size"), [("full", 16), ("node", 8), ("none", 1), (4, 4), (16, 16)])
def test_ranks_that_share_the_weights(shard: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    world = find_world(ParallelArgs(shard=shard))
    assert world == World(nodes=2, local_ranks=8, shard=size)
    assert (world.size, world.copies) == (16, 16 // size)


def test_ranks_that_do_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"parallel.shard 5 does not divide the 16 ranks; valid: 1, 2, 4, 8, 16$"):
        find_world(ParallelArgs(shard=5))
