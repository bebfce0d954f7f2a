"""Many ranks as one: the launch, the layout of the model over them, and the stop they agree on."""

import functools
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tinyllama import InputError
from tinyllama.args import ParallelArgs, TrainArgs
from tinyllama.model import GPT, init_weights
from tinyllama.ops import attention, float8, swiglu

# what selective activation checkpointing keeps: the products, which are dear; the rest is cheap to do again
SAVED = [torch.ops.aten.mm.default, torch.ops.aten._scaled_mm.default, *attention.SAVED, *swiglu.SAVED]

NO_JOB = ("bash", "interactive")
"""Names of a Slurm job that make Fabric ignore Slurm."""


def launcher() -> str:
    """Who has started this process: ``torchrun``, ``srun``, or a user by plain ``python``."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    in_step = "SLURM_STEP_ID" in env  # a batch script has the other variables too
    if int(env.get("SLURM_NTASKS", 1)) > 1 or (in_step and env.get("SLURM_JOB_NAME") not in NO_JOB):
        return "srun"
    return "python"


def ranks(args: ParallelArgs) -> tuple[int, int]:
    """Ranks on each node, and nodes: as srun or torchrun started us, else ``parallel.devices`` on this machine.

    Raises InputError for a launch that would hang, or of which every process would train alone.
    """
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
        if env.get("SLURM_JOB_NAME") in NO_JOB:
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


def shard_size(args: ParallelArgs, devices: int, nodes: int) -> int:
    """Ranks that share one copy of the weights; raises InputError when the world is not a whole number of them."""
    world_size = devices * nodes
    size = {"full": world_size, "node": devices, "none": 1}.get(str(args.shard)) or int(args.shard)
    if world_size % size:
        valid = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise InputError(f"parallel.shard {size} does not divide the {world_size} ranks; valid: {valid}")
    return size


def build_fabric(args: ParallelArgs, train: TrainArgs) -> Fabric:
    """Lightning Fabric over every rank, with FSDP2 that lays out the model at ``fabric.setup``."""
    devices, nodes = ranks(args)
    for name in ("lightning.fabric", "lightning.pytorch"):  # whichever was imported last speaks for both
        logging.getLogger(name).setLevel(logging.WARNING)  # our card says what they would
    strategy = ModelParallelStrategy(
        parallelize_fn=lambda model, mesh: parallelize(model, mesh, args, shard_size(args, devices, nodes), train),
        data_parallel_size=devices * nodes,
        tensor_parallel_size=1,
        timeout=timedelta(seconds=train.start_timeout),
    )
    # else Fabric would take a batch script of one task for a task of srun
    here = LightningEnvironment() if launcher() == "python" else None
    return Fabric(devices=devices, num_nodes=nodes, strategy=strategy, precision="32-true", plugins=here)


def parallelize(model: GPT, mesh: DeviceMesh, args: ParallelArgs, shard: int, train: TrainArgs) -> GPT:
    """Shard each Block and then the rest of ``model``, which lies on the meta device, and draw its start weights.

    Master weights, optimizer state and the reduction of gradients are fp32; in ``bf16`` a pass computes in bf16.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.float32 if train.precision == "fp32" else torch.bfloat16,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the RoPE tables that a Block is given stay fp32
    )
    replicate_shard = init_device_mesh(
        mesh.device_type, (mesh.size() // shard, shard), mesh_dim_names=("replicate", "shard")
    )
    if train.precision == "float8":
        float8.convert(model.transformer["h"])
    for block in model.transformer["h"].children():
        block.forward = recomputing(block.forward, train.activation_checkpointing)
    if train.compiles(mesh.device_type):
        # the forward, not the module: hooks, FSDP's among them, stay outside, and names stay what they are
        whole = model.ops["swiglu"] != "xformers"  # which torch.compile cannot look into
        for module in [*model.transformer["h"].children(), model.transformer["ln_f"]]:
            module.forward = torch.compile(module.forward, fullgraph=whole, dynamic=False)
    for block in model.transformer["h"].children():
        fully_shard(block, mesh=replicate_shard, mp_policy=policy, reshard_after_forward=args.reshard_after_forward)
    fully_shard(model, mesh=replicate_shard, mp_policy=policy)
    model.to_empty(device="cuda" if mesh.device_type == "cuda" else "cpu")
    init_weights(model, train.seed)
    return model


def recomputing(forward: Callable[..., Tensor], what: str) -> Callable[..., Tensor]:
    """``forward``, whose backward pass computes ``what`` (train.activation_checkpointing) again."""
    if what == "none":
        return forward
    contexts = {"context_fn": functools.partial(create_selective_checkpoint_contexts, SAVED)}

    def checkpointed(*inputs: Any) -> Tensor:
        return checkpoint(forward, *inputs, use_reentrant=False, **(contexts if what == "selective" else {}))  # type: ignore[arg-type]

    return checkpointed


def sync_gradients(model: GPT, last: bool, args: ParallelArgs) -> None:
    """Whether the next backward pass, a step's ``last`` or not, reduces the gradients over the ranks.

    Those before the last keep what they gathered, if ``parallel.reshard_after_forward`` does not ask for the memory.
    """
    model.set_requires_gradient_sync(last or args.sync_every_micro_batch)  # type: ignore[operator]
    model.set_reshard_after_backward(last or args.reshard_after_forward)  # type: ignore[operator]


def reshard(model: GPT) -> None:
    """Free what FSDP leaves gathered after a forward pass without a backward pass."""
    for module in [model, *model.transformer["h"].children()]:
        module.reshard()  # type: ignore[operator]


def dtypes(model: GPT) -> str:
    """Dtypes of the master weights, of a pass, and of the gradients' reduction, as FSDP has them, in one line.

    Raises RuntimeError unless the first and the last are fp32: versions of Lightning and torch have differed.
    """
    master = {parameter.dtype for parameter in model.parameters()}
    modules = [model, *model.transformer["h"].children()]
    policies = {module._get_fsdp_state()._mp_policy for module in modules}  # type: ignore[operator]
    reduced = {policy.reduce_dtype for policy in policies}
    if master != {torch.float32} or reduced != {torch.float32}:
        raise RuntimeError(f"master weights are {master} and gradients are reduced in {reduced}, not in fp32")
    (computed,) = {policy.param_dtype for policy in policies}
    return f"master {torch.float32}, pass {computed}, reduction {torch.float32}".replace("torch.", "")


def rank_map() -> list[str]:
    """Which ranks run where, a line a host; every rank must ask."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    numbers = {host: [str(rank) for rank, where in enumerate(hosts) if where == host] for host in hosts}
    return [f"{host}: {'rank' if len(of) == 1 else 'ranks'} {' '.join(of)}" for host, of in numbers.items()]


class Preemption:
    """A stop that every rank agrees on, whichever of them the signal reached or whose time is over.

    Slurm sends SIGTERM before it kills, and what ``#SBATCH --signal`` asks for before a time limit. A second Ctrl-C is
    a KeyboardInterrupt.
    """

    MAX_TIME, FAILED_SAVE = 0x100, 0x101  # above every signal's number
    NAMES = {MAX_TIME: "train.max_time", FAILED_SAVE: "checkpoint.on_failure"}
    ONE_PRESS = 2.0  # seconds; a terminal sends SIGINT to all, and torchrun hands it on

    def __init__(self, max_time: float | None = None) -> None:
        self._asked = 0
        self._until = float("inf") if max_time is None else time.monotonic() + max_time
        self._interrupted: float | None = None  # when
        self._speaks = dist.get_rank() == 0
        # on the CPU, so that asking does not wait for the GPU
        self._group = dist.new_group(backend="gloo")
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._receive)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # in a script's background Ctrl-C is not for this run
            signal.signal(signal.SIGINT, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted is None:
                self._interrupted = time.monotonic()
                if self._speaks:
                    os.write(2, b"interrupted: saves after this step and stops; Ctrl-C again stops at once\n")
            elif time.monotonic() > self._interrupted + self.ONE_PRESS:
                raise KeyboardInterrupt
        self._asked = number

    def ask(self, number: int) -> None:
        """Ask for a stop, on any rank, as a signal does."""
        self._asked = self._asked or number

    def asked(self) -> str | None:
        """What any rank was asked to stop by: a signal's name or a setting's; None: nothing. All ranks must ask."""
        if time.monotonic() > self._until:
            self.ask(self.MAX_TIME)
        number = torch.tensor(self._asked)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        self._asked = int(number)
        if self._asked in self.NAMES:
            return self.NAMES[self._asked]
        return signal.Signals(self._asked).name if self._asked else None
