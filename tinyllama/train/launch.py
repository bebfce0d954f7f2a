"""Launch detection: who started this process, how many ranks there are, and which run where."""

import os
import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tinyllama import InputError
from tinyllama.config.args import SHELL_JOB_NAMES, ParallelArgs


def launcher() -> str:
    """Who has started this process: ``torchrun``, ``srun``, or a user by plain ``python``."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    in_step = "SLURM_STEP_ID" in env  # a batch script has the other variables too
    if int(env.get("SLURM_NTASKS", 1)) > 1 or (in_step and env.get("SLURM_JOB_NAME") not in SHELL_JOB_NAMES):
        return "srun"
    return "python"


@dataclass(frozen=True)
class World:
    """The ranks of a run, and how many of them share one copy of the weights."""

    nodes: int
    local_ranks: int
    """ranks on each node"""
    shard: int
    """ranks that share one copy of the weights"""

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.local_ranks

    @property
    def copies(self) -> int:
        """Copies of the weights."""
        return self.size // self.shard


def find_world(args: ParallelArgs) -> World:
    """The world as srun or torchrun started it, else ``parallel.devices`` ranks on this machine.

    Raises InputError for a launch that would hang or in which every process would train alone, and for a number of
    ranks that ``parallel.shard`` does not divide.
    """
    local_ranks, nodes = _ranks(args)
    size = nodes * local_ranks
    shard = {"full": size, "node": local_ranks, "none": 1}.get(str(args.shard)) or int(args.shard)
    if size % shard:
        valid = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise InputError(f"parallel.shard {shard} does not divide the {size} ranks; valid: {valid}")
    return World(nodes, local_ranks, shard)


def _ranks(args: ParallelArgs) -> tuple[int, int]:
    """Ranks on each node, and nodes."""
    env = os.environ
    started_by, tasks = launcher(), int(env.get("SLURM_NTASKS", 1))
    in_step = "SLURM_STEP_ID" in env
    if started_by == "torchrun":
        local = int(env["LOCAL_WORLD_SIZE"])
        nodes = int(env["WORLD_SIZE"]) // local
        if in_step and tasks > int(env["SLURM_NNODES"]):
            raise InputError(
                f"srun starts torchrun {tasks} times on {env['SLURM_NNODES']} nodes: give srun --ntasks-per-node 1, or "
                "leave torchrun out"
            )
    elif started_by == "srun":
        local = int(env.get("SLURM_NTASKS_PER_NODE", 1 if tasks == 1 else 0))
        nodes = int(env["SLURM_NNODES"])
        if not in_step:
            raise InputError(f"the job has {tasks} tasks and this is none of them: start it with srun python ...")
        if env.get("SLURM_JOB_NAME") in SHELL_JOB_NAMES:
            raise InputError(
                f"the Slurm job is named {env['SLURM_JOB_NAME']}, which means no job: its {tasks} tasks would train "
                "alone, each of them; give srun another --job-name"
            )
        if local == 0:
            raise InputError(f"srun has --ntasks {tasks} without --ntasks-per-node: give --nodes and --ntasks-per-node")
        if local * nodes != tasks:
            raise InputError(
                f"srun has --ntasks {tasks}, which is not {nodes} nodes x --ntasks-per-node {local}: leave --ntasks out"
            )
    else:
        local, nodes = args.devices or max(torch.cuda.device_count(), 1), 1
    if args.devices not in (None, local):
        raise InputError(
            f"parallel.devices is {args.devices} and {started_by} started {local} ranks on each node: leave it out"
        )
    if 0 < torch.cuda.device_count() < local:
        raise InputError(
            f"{local} ranks on each node and {torch.cuda.device_count()} GPUs to be seen here: start fewer, or give "
            "--gpus-per-node in place of --gpus-per-task"
        )
    return local, nodes


def rank_map() -> list[str]:
    """Which ranks run where, a line a host. Collective."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    numbers = {host: [str(rank) for rank, where in enumerate(hosts) if where == host] for host in hosts}
    return [f"{host}: {'rank' if len(of) == 1 else 'ranks'} {' '.join(of)}" for host, of in numbers.items()]
