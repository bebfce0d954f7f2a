"""How many ranks there are, by what a launcher has set, launches that cannot be meant, and what ranks do together."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Process
from runs import metrics

from tinyllama import InputError
from tinyllama.config.args import ParallelArgs
from tinyllama.train import launch
from tinyllama.train.launch import LaunchError, World, find_launch, find_world

ROOT = Path(__file__).parents[2]
LAUNCHED = ROOT / "tests" / "helpers" / "launched.py"

JOB = {"SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NNODES": "2", "SLURM_PROCID": "0"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"}
SRUN = JOB | STEP | {"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_JOB_NAME": "tinyllama"}
STEP_OF_ONE = {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
STEP_OF_ONE |= {"SLURM_STEP_TASKS_PER_NODE": "1"}
ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
FIVE = ADDRESS | {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
KUBERNETES = ADDRESS | {"RANK": "5", "WORLD_SIZE": "8"}
TORCHRUN = FIVE | {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
SHELL = {"SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "bash"}  # srun --pty bash
ONE_A_NODE = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
LAUNCHERS = ("SLURM_", "TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE")
LAUNCHERS += ("NODE_RANK", "GROUP_RANK", "TINYLLAMA_RANK_0")


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)


GOOD: dict[str, tuple[dict[str, str], int | None, int, tuple[int, int]]] = {
    "python": ({}, None, 0, (1, 1)),
    "python with devices": ({}, 4, 0, (4, 1)),
    "python with GPUs": ({}, None, 4, (4, 1)),
    "srun": (SRUN, None, 8, (8, 2)),
    "srun with the right devices": (SRUN, 8, 0, (8, 2)),
    "srun without --ntasks-per-node": (SRUN | {"SLURM_NTASKS_PER_NODE": ""}, None, 0, (8, 2)),
    "srun in a job named bash": (SRUN | {"SLURM_JOB_NAME": "bash"}, None, 0, (8, 2)),
    "srun from salloc": (SRUN | {"SLURM_JOB_NAME": "interactive"}, None, 0, (8, 2)),
    "srun that says less of its step": (JOB | {"SLURM_STEP_ID": "0"}, None, 0, (8, 2)),
    "srun -n 1": (SRUN | STEP_OF_ONE, None, 1, (1, 1)),
    "srun -n 1 beside 8 GPUs": (SRUN | STEP_OF_ONE, None, 8, (1, 1)),
    "srun of MPI": (SRUN | {"PMI_SIZE": "16", "PMI_RANK": "3", "PMIX_RANK": "3"}, None, 0, (8, 2)),
    "torchrun": (TORCHRUN, None, 4, (4, 2)),
    "torchrun, once a node": (SRUN | TORCHRUN | ONE_A_NODE, None, 0, (4, 2)),
    "torchrun in a batch script": (JOB | TORCHRUN, None, 0, (4, 2)),
    "five variables": (FIVE, None, 4, (4, 2)),
    "five variables on this machine": (FIVE | {"LOCAL_RANK": "5", "MASTER_ADDR": "localhost"}, None, 0, (8, 1)),
    "five variables and the ranks of a node": (FIVE | {"LOCAL_WORLD_SIZE": "2"}, None, 8, (2, 4)),
    "five variables by mpirun": (MPIRUN | FIVE, None, 0, (4, 2)),
    "five variables by srun": (SRUN | FIVE | {"LOCAL_WORLD_SIZE": "4"}, None, 0, (4, 2)),
    "PyTorchJob": (KUBERNETES, None, 1, (1, 8)),
    "PyTorchJob's master": (KUBERNETES | {"RANK": "0", "MASTER_ADDR": "localhost"}, None, 0, (1, 8)),
    "mpirun of one process": ({"OMPI_COMM_WORLD_SIZE": "1", "PMIX_RANK": "0"}, 2, 0, (2, 1)),
    "python where an address is exported": (ADDRESS, 2, 0, (2, 1)),
    "python where a size is exported": ({"WORLD_SIZE": "4", "MASTER_PORT": "29500"}, 2, 0, (2, 1)),
    "python where a node is exported": (ADDRESS | {"NODE_RANK": "0", "GROUP_RANK": "0"}, 2, 0, (2, 1)),
    "python where a launch of one is exported": (ADDRESS | {"WORLD_SIZE": "1"}, 2, 0, (2, 1)),
    "srun where a launch is exported": (SRUN | ADDRESS | {"WORLD_SIZE": "16", "NODE_RANK": "1"}, None, 0, (8, 2)),
    "python in a shell of Slurm": (SHELL, 2, 0, (2, 1)),
    "python in a job of one task": ({"SLURM_NTASKS": "1", "SLURM_NNODES": "1"}, None, 0, (1, 1)),
}


@pytest.mark.parametrize("case", GOOD)
def test_ranks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env, devices, gpus, expected = GOOD[case]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    world = find_world(ParallelArgs(devices=devices))
    assert (world.local_ranks, world.nodes) == expected


BAD: dict[str, tuple[dict[str, str], int | None, int, str]] = {
    "in the batch script": (JOB, None, 0, "the job has 16 tasks, and this is not one of them: start it with srun"),
    "in a shell of salloc": (
        JOB | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_JOB_NAME": "interactive"},
        None,
        0,
        "the job has 16 tasks, and this is not one of them: start it with srun",
    ),
    "uneven": (
        SRUN | {"SLURM_STEP_NUM_TASKS": "15", "SLURM_STEP_TASKS_PER_NODE": "8,7"},
        None,
        0,
        "srun spreads its 15 tasks unevenly over 2 nodes: give --nodes and --ntasks-per-node",
    ),
    "uneven, though it divides": (
        SRUN | {"SLURM_STEP_TASKS_PER_NODE": "10,6"},
        None,
        0,
        "srun spreads its 16 tasks unevenly over 2 nodes",
    ),
    "torchrun for each task": (SRUN | TORCHRUN, None, 0, "srun starts torchrun 16 times on 2 nodes"),
    "devices under srun": (SRUN, 4, 0, "parallel.devices is 4 and srun started 8 ranks on each node: leave it out"),
    "devices under torchrun": (TORCHRUN, 8, 0, "parallel.devices is 8 and torchrun started 4 ranks on each node"),
    "devices under another": (FIVE, 1, 4, "parallel.devices is 1 and a launcher started 4 ranks on each node"),
    "a GPU a task": (SRUN, None, 1, "8 ranks on each node, but only 1 visible GPU: start fewer, or give --gpus-per"),
    "more ranks than GPUs": ({}, 3, 2, "3 ranks on each node, but only 2 visible GPUs: start fewer"),
    "mpirun": (MPIRUN, None, 0, "mpirun started 8 processes that do not know of each other, so each would train alone"),
    "mpirun in a batch script": (JOB | MPIRUN, None, 0, "use torchrun or srun, or set RANK, LOCAL_RANK, WORLD_SIZE, "),
    "mpirun by Hydra": ({"PMI_SIZE": "4", "PMI_RANK": "0"}, None, 0, "mpirun started 4 processes"),
    "mpirun by Hydra by srun": (SRUN | {"PMI_SIZE": "4", "PMI_RANK": "0"}, None, 0, "mpirun started 4 processes"),
    "mpirun by PMIx": ({"PMIX_RANK": "0"}, None, 0, "mpirun started several processes"),
    "an address that is missing": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"},
        None,
        0,
        "RANK is set without LOCAL_RANK, MASTER_ADDR: a launch sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, ",
    ),
    "a local rank that is left": (
        {"LOCAL_RANK": "0"},
        2,
        0,
        "LOCAL_RANK is set without RANK: a launch sets RANK, LOCAL_",
    ),
    "a local rank of nothing": ({"LOCAL_RANK": ""}, None, 0, "; unset LOCAL_RANK to train on this machine alone"),
    "a node that is left": ({"NODE_RANK": "x"}, None, 0, "NODE_RANK is set without RANK: a launch sets RANK, LOCAL_"),
    "a group that is left": (ADDRESS | {"GROUP_RANK": "1"}, None, 0, "GROUP_RANK is set without RANK: a launch sets "),
    "a launch without its rank": (
        ADDRESS | {"WORLD_SIZE": "4", "LOCAL_RANK": "0", "NODE_RANK": "0"},
        None,
        0,
        "LOCAL_RANK and WORLD_SIZE are set without RANK: a launch sets RANK, LOCAL_RANK, WORLD_SIZE, ",
    ),
    "PyTorchJob without its rank": (
        ADDRESS | {"WORLD_SIZE": "4"},
        None,
        0,
        "WORLD_SIZE is set without RANK: a launch sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; unset ",
    ),
    "PyTorchJob without torchrun": (KUBERNETES, None, 8, "and this one has 8 GPUs: start it with torchrun, or unset"),
    "a rank that is none": (FIVE | {"RANK": "8"}, None, 4, "RANK is '8': it must be a whole number from 0 to 7"),
    "a word for a rank": (FIVE | {"RANK": "one"}, None, 4, "the environment variable RANK is 'one': it must be a"),
    "a port that is none": (FIVE | {"MASTER_PORT": "tcp"}, None, 4, "MASTER_PORT is 'tcp': it must be a whole number"),
    "no nodes": (
        SRUN | {"SLURM_STEP_NUM_NODES": "0"},
        None,
        0,
        "SLURM_STEP_NUM_NODES is '0': it must be a whole number",
    ),
    "no nodes in a job": (SHELL | JOB | {"SLURM_NNODES": "0"}, None, 0, "SLURM_NNODES is '0': it must be a whole"),
    "no tasks": (SRUN | {"SLURM_STEP_NUM_TASKS": "0"}, None, 0, "SLURM_STEP_NUM_TASKS is '0': it must be a whole"),
    "a task that is none": (
        SRUN | {"SLURM_PROCID": "16"},
        None,
        0,
        "SLURM_PROCID is '16': it must be a whole number from",
    ),
    "a port of srun's that is none": (SRUN | {"MASTER_PORT": "65536"}, None, 0, "MASTER_PORT is '65536': it must be a"),
    "nobody's rank": (FIVE | {"LOCAL_WORLD_SIZE": "3"}, None, 4, "WORLD_SIZE 8 is not a multiple of the 3 ranks of "),
}


@pytest.mark.parametrize("case", BAD)
def test_a_launch_that_cannot_be_meant(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env, devices, gpus, said = BAD[case]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as error:
        find_world(ParallelArgs(devices=devices))
    (problem,) = error.value.args
    assert said in problem
    assert "\n" not in problem


OF_FABRIC = ADDRESS | {"WORLD_SIZE": "2", "NODE_RANK": "0"}


@pytest.mark.parametrize(
    ("local_rank", "rank_0", "is_of_fabric"),
    [
        (None, os.getpid, True),  # rank 0, of which a user has exported the others
        ("0", os.getpid, True),  # rank 0 once it has started the others
        ("1", os.getppid, True),
        ("1", os.getpid, False),
        ("0", os.getppid, False),  # a run that log.on_event of another starts
        ("1", lambda: 2**22 + 1, False),  # rank 0 is gone
    ],
)
def test_ranks_that_fabric_starts_are_told_from_what_is_left(
    local_rank: str | None, rank_0: Callable[[], int], is_of_fabric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = OF_FABRIC | {"TINYLLAMA_RANK_0": str(rank_0())} | ({"LOCAL_RANK": local_rank} if local_rank else {})
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    if is_of_fabric:
        assert find_launch() is None
    else:
        with pytest.raises(LaunchError, match="are set without RANK"):
            find_launch()


@pytest.mark.parametrize(("shard", "size"), [("full", 16), ("node", 8), ("none", 1), (4, 4), (16, 16)])
def test_ranks_that_share_the_weights(shard: Any, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    world = find_world(ParallelArgs(shard=shard))
    assert world == World(nodes=2, local_ranks=8, shard=size)
    assert (world.size, world.replicas) == (16, 16 // size)


def test_ranks_that_do_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"parallel.shard 5 does not divide the 16 ranks; valid: 1, 2, 4, 8, 16$"):
        find_world(ParallelArgs(shard=5))


@pytest.mark.parametrize(
    ("env", "address", "port"),
    [
        (SRUN | {"SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "123456"}, "gpu07", 18456),
        (SRUN | {"SLURM_STEP_NODELIST": "a,b", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2"}, "a", 17007),
        (SRUN | {"SLURM_STEP_NODELIST": "a,b"} | ADDRESS, "node1", 29500),
        (SRUN | STEP_OF_ONE | {"SLURM_STEP_NODELIST": "b", "SLURM_JOB_ID": "7"}, "127.0.0.1", 15007),
        (FIVE, "node1", 29500),
        (FIVE | {"LOCAL_WORLD_SIZE": "8"}, "127.0.0.1", 29500),  # all on this machine
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_USE_AGENT_STORE": "True"}, "node1", 29500),
        (KUBERNETES | {"RANK": "0", "MASTER_ADDR": "localhost"}, "localhost", 29500),
    ],
)
def test_where_ranks_meet(env: dict[str, str], address: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = find_launch()
    assert found is not None
    assert (found.address, found.port, found.on_one_machine) == (address, port, address == "127.0.0.1")


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    """A function that starts a process with these variables of a launcher."""
    started = []

    def begin(env: dict[str, str], *command: object, warm: int | None = None) -> Process:
        started.append(Process(*command, warm=warm, env=os.environ | env, cwd=ROOT))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def two_ranks() -> list[dict[str, str]]:
    """What a launcher sets for two ranks on this machine, and nothing else."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def test_five_variables_make_processes_one_run(
    start: Callable[..., Process], config_file: Path, tmp_path: Path
) -> None:
    flags = ("--config", config_file, "--out_dir", tmp_path / "run", "--train.max_steps", "6")
    first, second = two_ranks()
    ranks = [start(first, sys.executable, "pretrain/train.py", *flags)]
    ranks += [start(second, sys.executable, "pretrain/train.py", *flags, warm=1)]
    (code, said, errors), other = [rank.end() for rank in ranks]
    assert (code, *other[:2]) == (0, 0, ""), errors + other[2]
    assert f"ranks    {socket.gethostname()}: ranks 0 1" in said
    assert [row["step"] for row in metrics(tmp_path / "run") if row["loss"]] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize(
    ("first", "second", "printed"),
    [
        (["a", "b"], ["a", "b"], ["a", "b"]),
        (["a"], ["a", "of one rank"], ["a", "of one rank"]),
    ],
)
def test_ranks_print_an_error_once(
    start: Callable[..., Process], first: list[str], second: list[str], printed: list[str]
) -> None:
    found = zip(two_ranks(), (first, second), strict=True)
    ranks = [start(env, sys.executable, LAUNCHED, "fail", *errors, warm=0) for env, errors in found]
    ends = [rank.end() for rank in ranks]
    assert [code for code, _, _ in ends] == [2, 2]
    said = "".join(errors for _, _, errors in ends).splitlines()
    assert sorted(line for line in said if line.startswith("error: ")) == [f"error: {line}" for line in printed]
    assert "Traceback" not in said


def test_mpirun_is_refused_in_one_line(start: Callable[..., Process]) -> None:
    ranks = [MPIRUN | {"OMPI_COMM_WORLD_RANK": rank} for rank in ("0", "1")]
    ends = [start(env, sys.executable, LAUNCHED, "wait", warm=0) for env in ranks]
    (code, said, errors), other = [process.end() for process in ends]
    assert (code, said, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: mpirun started 8 processes")
    assert other == (2, "", "")


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RANK": "1"}, "RANK is set without LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: a launch sets "),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK is set without LOCAL_RANK, MASTER_ADDR, MASTER_PORT: a launch sets "),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK is set without RANK: a launch sets "),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "the job has 2 tasks, and this is not one of them: start it "),
        ({"PMIX_RANK": "1"}, "mpirun started several processes that do not know of each other, so each would train "),
    ],
)
def test_a_number_that_is_left_silences_nobody(start: Callable[..., Process], env: dict[str, str], said: str) -> None:
    code, out, errors = start(env, sys.executable, LAUNCHED, "wait", warm=0).end()
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"error: {said}")


def test_on_one_machine_the_store_is_served_to_that_machine_only(start: Callable[..., Process]) -> None:
    code, said, errors = start({}, sys.executable, LAUNCHED, "served", warm=0).end()
    assert (code, said) == (0, "0100007F\n"), errors  # 127.0.0.1, the bytes reversed


TORCHRUN_OF_FORKS = """
import os, runpy, sys
from pathlib import Path
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

def rank(*argv):  # in a fork of this process, where torchrun starts a Python
    for link in list(Path("/proc/self/fd").iterdir()):
        if link.is_symlink() and os.readlink(link).startswith("socket:"):  # the agent's store, which a Python lacks
            os.close(int(link.name))
    sys.argv = list(argv)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code

flags = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--start-method", "fork"]
args = get_args_parser().parse_args([*flags, "--nproc-per-node", "2", *sys.argv[1:]])
config, _, _ = config_from_args(args)
elastic_launch(config, rank)(*sys.argv[1:])
"""


def test_on_one_machine_no_rank_listens_to_others(start: Callable[..., Process], monkeypatch) -> None:
    """Neither the store nor gloo, by a launcher of variables and by torchrun, whose agent serves the store."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    ranks = [start(env, sys.executable, LAUNCHED, "listeners", warm=0) for env in two_ranks()]
    torchrun = start({}, sys.executable, "-c", TORCHRUN_OF_FORKS, LAUNCHED, "listeners", warm=0)
    for process, lines in [(ranks[0], 1), (ranks[1], 1), (torchrun, 2)]:
        code, said, errors = process.end()
        assert code == 0, errors
        assert said == "0100007F\n" * lines  # 127.0.0.1, the bytes reversed


INTERFACES: dict[str, tuple[dict[str, str], str | None]] = {
    "python": ({}, "lo"),
    "python with an interface": ({"NCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth1"}, "eth1"),
    "srun on one node": (SRUN | STEP_OF_ONE | {"SLURM_STEP_NODELIST": "b"}, "lo"),
    "srun": (SRUN | {"SLURM_STEP_NODELIST": "a,b", "SLURM_PROCID": "1"}, None),
    "torchrun on one node": (TORCHRUN | {"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_USE_AGENT_STORE": "True"}, "lo"),
    "torchrun": (TORCHRUN, None),
    "five variables": (FIVE, None),
    "five variables, without GPUs": (FIVE | {"MASTER_ADDR": "10.0.0.7"}, None),
    "PyTorchJob": (KUBERNETES, None),
    "PyTorchJob's master": (KUBERNETES | {"RANK": "0", "MASTER_ADDR": "localhost"}, None),
}


@pytest.fixture
def lo_and_eth1(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network interfaces of this machine, on which no store is served."""
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth1")])
    monkeypatch.setattr(launch, "_loopback_store", lambda port: None)


@pytest.mark.usefixtures("lo_and_eth1")
@pytest.mark.parametrize("case", INTERFACES)
def test_the_interface_is_the_loopback_on_one_machine(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env, expected = INTERFACES[case]
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in names} | env)
    launch.cluster_environment()
    assert [os.environ.get(name) for name in names] == [expected, expected]


@pytest.mark.usefixtures("lo_and_eth1")
def test_a_group_that_is_none_does_not_reach_fabric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ | TORCHRUN | {"GROUP_RANK": "x"})
    assert launch.cluster_environment().node_rank() == 1


@pytest.mark.usefixtures("lo_and_eth1")
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("GLOO_SOCKET_IFNAME", value) for value in ("ib0", "lo,ib0", "l", "=lo", "^ib0")),
        *(("NCCL_SOCKET_IFNAME", value) for value in ("ib0", "=e", "=ib", "ib,eth2")),
    ],
)
def test_an_interface_that_is_not_here_is_named(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "environ", os.environ | {variable: value})
    with pytest.raises(InputError) as error:
        launch.cluster_environment()
    (problem,) = error.value.args
    said = f"the environment variable {variable} is {value!r}, and the network interfaces of {socket.gethostname()} are"
    assert problem == f"{said} lo, eth1: name one of these, or unset it"


@pytest.mark.usefixtures("lo_and_eth1")
@pytest.mark.parametrize("value", ["eth1", "eth", "=eth1", "^docker,lo", "ib,eth", "=ib0,eth1"])
def test_interfaces_as_nccl_takes_them(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "environ", os.environ | {"NCCL_SOCKET_IFNAME": value})
    launch.cluster_environment()
    assert os.environ["NCCL_SOCKET_IFNAME"] == value


@pytest.mark.parametrize("port", ["tcp", "65536", "-1"])
def test_a_port_that_is_none_is_named_without_a_launcher(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(InputError, match=f"MASTER_PORT is '{port}': it must be a whole number from 0 to 65535"):
        launch.cluster_environment()


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_waits_in_vain_says_where(rank: str, start: Callable[..., Process], config_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = (sys.executable, "pretrain/train.py", "--config", config_file, "--train.start_timeout", 1)
    code, _, errors = start(env, *command, warm=0).end()
    assert code == 1  # the job is retried
    assert errors.splitlines()[-1] == (
        f"error: the ranks did not meet at localhost:{port} within train.start_timeout 1 s: look for a rank that ended "
        "or was never started, and check that every node reaches this address"
    )


GONE = "the launcher of this rank is gone: the rank ends\n"
START_ONE = """
import os, runpy, sys
os.environ["TINYLLAMA_RANK_0"] = str(os.getpid())
if os.fork():
    os.wait()
else:
    del sys.argv[0]
    if os.environ.get("LOG"):
        os.dup2(os.open(os.environ["LOG"], os.O_WRONLY), 2)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("env", "how", "watched", "last", "said"),
    [
        ({"TORCHELASTIC_RUN_ID": "none"}, (), "launcher", "SIGTERM\n", GONE),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, (), "launcher", "SIGTERM\n", GONE),
        ({"TORCHELASTIC_RUN_ID": "none", "LOG": "/dev/full"}, (), "launcher", "SIGTERM\n", ""),
        ({"RANK": ""}, ("in C",), "launcher", "", ""),  # started by rank 0, without which nothing can be saved
        ({}, (), "", "told\n", ""),  # a script may start ranks in the background, and end
    ],
)
def test_a_rank_whose_launcher_is_gone_ends(
    start: Callable[..., Process], env: dict[str, str], how: tuple[str, ...], watched: str, last: str, said: str
) -> None:
    variables = {name: value for name, value in (two_ranks()[1] | env).items() if value}
    launcher = start(variables, sys.executable, "-c", START_ONE, LAUNCHED, "wait", *how, warm=0)
    assert launcher.line() == f"{watched}\n"
    os.kill(launcher.pid, signal.SIGKILL)
    if not watched:
        launcher.tell("told")
    _, rest, errors = launcher.end()  # once nobody holds its stdout any more
    assert rest == last
    assert errors == said


@pytest.mark.slow
def test_ranks_whose_torchrun_was_killed_save_and_end(
    start: Callable[..., Process], config_file: Path, tmp_path: Path
) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pretrain/train.py"]
    flags = ["--config", config_file, "--out_dir", tmp_path / "run", "--train.max_steps", "1000000"]
    flags += ["--checkpoint.interval", "1000000"]
    launcher = start({}, sys.executable, *command, *flags)
    while launcher.line().split()[:2] != ["step", "2/1000000"]:
        pass
    os.kill(launcher.pid, signal.SIGKILL)
    _, said, errors = launcher.end()
    assert "stopped by SIGTERM at step " in said, errors
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*[0-9]")
    assert int(saved.name[-8:]) == int(metrics(tmp_path / "run")[-1]["step"])
