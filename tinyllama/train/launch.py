"""Find out who started this process and how many ranks there are where, and tell Fabric."""

import os
import socket
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from tinyllama import InputError
from tinyllama.config.args import ParallelArgs

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""what a launcher sets for each process, be it torchrun, Kubernetes or a script"""
RANK_0 = "TINYLLAMA_RANK_0"
"""its process id, for the ranks that rank 0 starts: Fabric gives them VARIABLES as well, but no RANK"""
OTHER_LAUNCHER = "a launcher"
"""any other launcher that sets VARIABLES, as messages call it"""
SHELL_JOB_NAMES = ("bash", "interactive")
"""names of interactive Slurm jobs, in whose single task plain ``python`` starts ranks of its own"""
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""variables that name the network interfaces of gloo and of NCCL"""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class LaunchError(InputError):
    """The launch is wrong in the same way for all of its processes."""


@dataclass(frozen=True)
class Launch:
    """What the launcher told this process."""

    launcher: str
    """torchrun, srun, or OTHER_LAUNCHER"""
    rank: int
    local_rank: int
    size: int
    """ranks in all"""
    local_size: int
    """ranks on each node"""
    address: str
    """host of rank 0"""
    port: int
    """port of the ranks' store on that host"""

    @property
    def on_one_machine(self) -> bool:
        """Return whether every rank is on this machine and reaches rank 0 by its loopback, as far as can be told."""
        return self.size == self.local_size and self.address in LOOPBACK


@dataclass(frozen=True)
class World:
    """The ranks of a run, and how many of them share one copy of the weights."""

    nodes: int
    local_ranks: int
    """ranks on each node"""
    shard: int
    """ranks that share one copy of the weights"""
    launcher: str | None = field(default=None, compare=False)
    """who started the ranks, as in ``Launch``; None: a user, by plain ``python``"""

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.local_ranks

    @property
    def replicas(self) -> int:
        """Number of complete copies of the weights over all ranks (1 unless HSDP or DDP)."""
        return self.size // self.shard


def find_world(args: ParallelArgs) -> World:
    """Return the world as its launcher started it, else ``parallel.devices`` ranks on this machine.

    Raises InputError for a launch that would hang or in which every process would train alone, and for a number of
    ranks that ``parallel.shard`` does not divide.
    """
    launch, gpus = find_launch(), torch.cuda.device_count()
    local = launch.local_size if launch else args.devices or max(gpus, 1)
    size = launch.size if launch else local
    if launch and args.devices not in (None, local):
        raise InputError(
            f"parallel.devices is {args.devices} and {launch.launcher} started {local} ranks on each node: leave it out"
        )
    if 0 < gpus < local:
        raise InputError(
            f"{local} ranks on each node, but only {gpus} visible {'GPU' if gpus == 1 else 'GPUs'}: start fewer, or "
            "give --gpus-per-node instead of --gpus-per-task"
        )
    shard = {"full": size, "node": local, "none": 1}.get(str(args.shard)) or int(args.shard)
    if size % shard:
        valid = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise InputError(f"parallel.shard {shard} does not divide the {size} ranks; valid: {valid}")
    return World(size // local, local, shard, launch.launcher if launch else None)


def find_launch() -> Launch | None:
    """Return what a launcher has told this process; None if a user started it by plain ``python``.

    A complete set of VARIABLES is a launch, whoever set it; without one, a task of srun is. Raises InputError for an
    incomplete set, be it what is left of another launch, and for launchers under which every process would train alone.
    """
    env = os.environ
    tasks = _of_step("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if "RANK" in env:
        return _launch_by_variables(tasks)
    if (processes := _mpi_processes(tasks)) != "1":
        raise LaunchError(
            f"mpirun started {processes} processes that do not know of each other, so each would train alone: use "
            f"torchrun or srun, or set {', '.join(VARIABLES)} for each (see pretrain/README.md)"
        )
    if "SLURM_STEP_ID" in env and (tasks > 1 or env.get("SLURM_JOB_NAME") not in SHELL_JOB_NAMES):
        return _launch_by_srun(tasks)
    if (in_job := env_number("SLURM_NTASKS", 1)) > 1:
        raise LaunchError(f"the job has {in_job} tasks, and this is not one of them: start it with srun python ...")
    _check_nothing_is_left()
    return None


def _check_nothing_is_left() -> None:
    """Raise LaunchError for variables of a launch without RANK, which Fabric would follow, or start a rank of many.

    What users export for other programs does no harm: MASTER_ADDR and MASTER_PORT, or WORLD_SIZE, which Fabric sets
    anew. Only all three are a launch that lacks its RANK: each of its processes would train alone.
    """
    env = os.environ
    if env.get(RANK_0) == str(os.getpid() if env.get("LOCAL_RANK", "0") == "0" else os.getppid()):
        return  # Fabric has set them, here in rank 0 or in a rank that it has started
    of_one_node = {"NODE_RANK": "0", "GROUP_RANK": "0"}  # which some platforms export always
    left = [n for n in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK") if n in env and env[n] != of_one_node.get(n)]
    if all(env.get(name) for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")) and env["WORLD_SIZE"] != "1":
        left.append("WORLD_SIZE")
    if left:
        names = " and ".join(left)
        raise LaunchError(
            f"{names} {'is' if len(left) == 1 else 'are'} set without RANK: a launch sets {', '.join(VARIABLES)}; "
            f"unset {names} to train on this machine alone"
        )


def _launch_by_variables(tasks: int) -> Launch:
    env, gpus = os.environ, torch.cuda.device_count()
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else OTHER_LAUNCHER
    missing = [name for name in VARIABLES if not env.get(name)]
    one_a_node = missing == ["LOCAL_RANK"]  # Kubernetes' PyTorchJob sets the others, for one process in each pod
    if missing and not one_a_node:
        raise LaunchError(
            f"RANK is set without {', '.join(missing)}: a launch sets {', '.join(VARIABLES)}; unset RANK to train on "
            "this machine alone"
        )
    if one_a_node and gpus > 1:
        raise LaunchError(
            f"RANK is set without LOCAL_RANK, which means one process on each machine, and this one has {gpus} GPUs: "
            "start it with torchrun, or unset RANK to train on this machine alone"
        )
    nodes = _of_step("SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    if launcher == "torchrun" and "SLURM_STEP_ID" in env and tasks > nodes:
        raise LaunchError(
            f"srun starts torchrun {tasks} times on {nodes} nodes: give srun --ntasks-per-node 1, or leave torchrun out"
        )
    size, address = env_number("WORLD_SIZE", least=1), env["MASTER_ADDR"]
    if one_a_node:
        local_size = 1
    elif address in LOOPBACK:
        local_size = size
    else:
        local_size = min(gpus or size, size)
    local_size = env_number("LOCAL_WORLD_SIZE", env_number("OMPI_COMM_WORLD_LOCAL_SIZE", local_size, least=1), least=1)
    if size % local_size:
        raise InputError(
            f"WORLD_SIZE {size} is not a multiple of the {local_size} ranks of this machine: set LOCAL_WORLD_SIZE to "
            "the ranks on each, the same on all"
        )
    if env_number("LOCAL_WORLD_SIZE", 0) == size and not torchrun_serves():
        address = "127.0.0.1"
    rank, local_rank = env_number("RANK", below=size), env_number("LOCAL_RANK", 0, below=local_size)
    return Launch(launcher, rank, local_rank, size, local_size, address, env_number("MASTER_PORT", below=2**16))


def _launch_by_srun(tasks: int) -> Launch:
    env = os.environ
    nodes = _of_step("SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    if tasks % nodes or "," in env.get("SLURM_STEP_TASKS_PER_NODE", ""):
        raise LaunchError(
            f"srun spreads its {tasks} tasks unevenly over {nodes} nodes: give --nodes and --ntasks-per-node"
        )
    hosts = env.get("SLURM_STEP_NODELIST", env.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    host_of_rank_0 = env.get("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(hosts))
    address = host_of_rank_0 if nodes > 1 else "127.0.0.1"
    # another port for each job, and for each step of a job, that may share a node
    port = 15000 + (env_number("SLURM_JOB_ID", 0) + 1000 * env_number("SLURM_STEP_ID", 0)) % 10000
    rank = env_number("SLURM_PROCID", 0, below=tasks)
    local_rank = env_number("SLURM_LOCALID", 0, below=tasks // nodes)
    port = env_number("MASTER_PORT", port, below=2**16)
    return Launch("srun", rank, local_rank, tasks, tasks // nodes, address, port)


def _mpi_processes(tasks: int) -> str:
    """Return how many processes mpirun started, as far as it says; srun, which may set the same, is not mpirun."""
    env = os.environ
    if "OMPI_COMM_WORLD_SIZE" in env:
        return env["OMPI_COMM_WORLD_SIZE"]
    if "SLURM_STEP_ID" in env and env.get("PMI_SIZE") in (None, str(tasks)):
        return "1"
    return env.get("PMI_SIZE", "several" if "PMIX_RANK" in env else "1")


def _of_step(step: str, job: str) -> int:
    """Return the variable ``step`` of a Slurm step, or the variable ``job`` of its job where it is not set; else 1."""
    return env_number(step, env_number(job, 1, least=1), least=1)


def env_number(name: str, default: int | None = None, *, least: int = 0, below: int | None = None) -> int:
    """Return the environment variable ``name``; raises InputError if it is no number from ``least`` to ``below``."""
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isdecimal() or int(value) < least or (below is not None and int(value) >= below):
        limits = f"from {least}" if below is None else f"from {least} to {below - 1}"
        raise InputError(f"the environment variable {name} is {value!r}: it must be a whole number {limits}")
    return int(value)


def start_ranks(fabric: Fabric, start_timeout: float) -> None:
    """Start the ranks that no launcher has started, and let all meet; an error says where they should have met."""
    try:
        fabric.launch()
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        error.add_note(  # the last line of the traceback
            f"error: the ranks did not meet at {where} within train.start_timeout {start_timeout:g} s: look for a rank "
            "that ended or was never started, and check that every node reaches this address"
        )
        raise


def cluster_environment() -> ClusterEnvironment:
    """Return the launch as Fabric takes it; rank 0 opens the ranks' store.

    Sets the launch's variables in os.environ for Fabric. On one machine, the store and, unless their interfaces are
    set, gloo and NCCL use the loopback, so that no rank listens for other machines.
    """
    env, launch = os.environ, find_launch()
    environment = LightningEnvironment() if launch is None else TorchElasticEnvironment()
    if launch is not None:
        alone = launch.on_one_machine or env_number("LOCAL_WORLD_SIZE", 0) == launch.size
        values = (launch.rank, launch.local_rank, launch.size, launch.address, launch.port)
        env.update({name: str(value) for name, value in zip(VARIABLES, values, strict=True)})
        env["GROUP_RANK"] = str(launch.rank // launch.local_size)  # as torchrun does; Fabric reads it
        serves = launch.rank == 0 and launch.on_one_machine and not torchrun_serves()
    else:
        alone, serves = True, not environment.creates_processes_externally
        if serves:
            env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(env_number("MASTER_PORT", 0, below=2**16)))
            env[RANK_0] = str(os.getpid())
    if alone:  # gloo and NCCL else listen where every machine can reach them
        for name in INTERFACES:
            env.setdefault(name, _loopback_interface())
    _check_interfaces()
    if serves and not dist.is_initialized():
        # the process group's own store shares the server of this one, for as long as this one is there
        environment.store = _loopback_store(int(env["MASTER_PORT"]))  # type: ignore[union-attr]
    return environment


def _loopback_store(port: int) -> dist.TCPStore:
    """Serve a store that only this machine can reach, on a free port if ``port`` is 0; left alone, torch serves all."""
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise InputError(f"cannot listen on port {port} ({error.strerror}): set MASTER_PORT to a free one") from None
    port = listener.getsockname()[1]
    os.environ["MASTER_PORT"] = str(port)
    return dist.TCPStore(
        "127.0.0.1", port, None, True, wait_for_workers=False, multi_tenant=True, master_listen_fd=listener.detach()
    )


def _check_interfaces() -> None:
    """Raise InputError if a variable of INTERFACES names none of this machine, which gloo and NCCL end with in C++.

    gloo takes whole names, and NCCL beginnings of names, whole ones after ``=``, and after ``^`` those to leave out.
    """
    gloo, nccl = (os.environ.get(name, "") for name in INTERFACES)
    here = [name for _, name in socket.if_nameindex()]
    absent = {}
    if any(name and name not in here for name in gloo.split(",")):
        absent[INTERFACES[0]] = gloo
    fits = str.__eq__ if nccl.startswith("=") else str.startswith
    names = nccl.removeprefix("=").split(",")
    if (
        torch.cuda.is_available()
        and nccl[:1] not in ("", "^")
        and not any(fits(one, name) for one in here for name in names)
    ):
        absent[INTERFACES[1]] = nccl
    if absent:
        raise InputError(
            *(
                f"the environment variable {variable} is {value!r}, and the network interfaces of "
                f"{socket.gethostname()} are {', '.join(here)}: name one of these, or unset it"
                for variable, value in absent.items()
            )
        )


def _loopback_interface() -> str:
    return next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")


def torchrun_serves() -> bool:
    """Return whether torchrun serves the ranks' store, which rank 0 does otherwise."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
