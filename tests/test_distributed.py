"""How many ranks there are, by what srun, torchrun or nobody has set, and launches that cannot be meant."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tinyllama import InputError
from tinyllama.args import ParallelArgs
from tinyllama.distributed import Preemption, ranks

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
