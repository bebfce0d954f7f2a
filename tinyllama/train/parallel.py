"""Shard and compile the model, recompute its activations, and decide when its gradients are reduced.

Where all ranks are of one node and the weights that a pass gathers may stay until the step ends, and where nothing is
sharded, train/gathered.py does what FSDP2 does elsewhere.
"""

import functools
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tinyllama.config.args import ParallelArgs, TrainArgs
from tinyllama.model import GPT, init_weights
from tinyllama.ops import attention, swiglu
from tinyllama.train.delayed_scaling import DelayedScaling
from tinyllama.train.gathered import Gathered
from tinyllama.train.launch import World, cluster_environment


def build_fabric(world: World, args: ParallelArgs, train: TrainArgs) -> Fabric:
    """Return Lightning Fabric over every rank, whose ``setup_module`` calls ``parallelize``."""
    for name in ("lightning.fabric", "lightning.pytorch"):  # whichever was imported last speaks for both
        logging.getLogger(name).setLevel(logging.WARNING)  # our summary says what they would
    strategy = ModelParallelStrategy(
        parallelize_fn=lambda model, mesh: parallelize(model, mesh, args, world.shard, train, world.nodes),
        data_parallel_size=world.size,
        tensor_parallel_size=1,
        timeout=timedelta(seconds=train.start_timeout),
    )
    return Fabric(
        accelerator="cuda" if torch.cuda.is_available() else "cpu",  # not Apple's GPU, which no such strategy runs on
        devices=world.local_ranks,
        num_nodes=world.nodes,
        strategy=strategy,
        precision="32-true",
        plugins=cluster_environment(),  # Fabric's own detection knows fewer launches
    )


def parallelize(model: GPT, mesh: DeviceMesh, args: ParallelArgs, shard: int, train: TrainArgs, nodes: int = 1) -> GPT:
    """Shard each Block and then the rest of ``model``, which lies on the meta device, and draw its initial weights.

    Master weights, optimizer state and the reduction of gradients are fp32; in ``bf16`` a pass computes in bf16.
    """
    policy = mixed_precision(train)
    replicate_shard = init_device_mesh(
        mesh.device_type, (mesh.size() // shard, shard), mesh_dim_names=("replicate", "shard")
    )
    device = "cuda" if mesh.device_type == "cuda" else "cpu"
    if train.precision == "float8":
        loss_scale = mesh.size() / (train.global_batch_size * model.config.block_size)  # train/step.py
        model.scaling = DelayedScaling(model.transformer["h"], device, loss_scale)
    for block in model.layers:
        block.forward = recomputing(block.forward, train.activation_checkpointing)  # type: ignore[method-assign]
    if train.compiles(mesh.device_type):
        # the forward, not the module: hooks, FSDP's among them, stay outside, and names stay what they are
        whole = model.ops["swiglu"] != "xformers"  # which torch.compile cannot look into
        for module in [*model.layers, model.transformer["ln_f"]]:
            module.forward = torch.compile(module.forward, fullgraph=whole, dynamic=False)
    if args.keeps_gathered(shard, nodes):
        model.to_empty(device=device)
        model.gathered = Gathered(model, replicate_shard, cast(torch.dtype, policy.param_dtype), overlap=nodes > 1)
    else:
        for block in model.layers:
            fully_shard(block, mesh=replicate_shard, mp_policy=policy, reshard_after_forward=args.reshard_after_forward)
        fully_shard(model, mesh=replicate_shard, mp_policy=policy)
        model.to_empty(device=device)
    init_weights(model, train.seed)
    return model


def mixed_precision(train: TrainArgs) -> MixedPrecisionPolicy:
    """Return the dtypes of the computation and of the reduction of its gradients."""
    return MixedPrecisionPolicy(
        param_dtype=torch.float32 if train.precision == "fp32" else torch.bfloat16,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the RoPE tables that a Block is given stay fp32
    )


def recomputing(forward: Callable[..., Any], what: str) -> Callable[..., Any]:
    """Return a Block's ``forward`` that recomputes ``what`` (train.activation_checkpointing) in its backward pass."""
    if what == "none":
        return forward
    contexts = {"context_fn": functools.partial(create_selective_checkpoint_contexts, saved())}

    def checkpointed(x: Tensor, added: Tensor | None, *inputs: Any) -> Any:
        x = x if added is None else x + added  # which is all that is kept of the two
        return checkpoint(forward, x, None, *inputs, use_reentrant=False, **(contexts if what == "selective" else {}))  # type: ignore[arg-type]

    return checkpointed


def saved() -> list[Any]:
    """Return the operations whose results ``selective`` keeps, as matmuls; the others are cheap to recompute."""
    return [torch.ops.aten.mm.default, *attention.saved(), *swiglu.SAVED]


def sync_gradients(model: GPT, last: bool, args: ParallelArgs) -> None:
    """Set whether the next backward pass, a step's ``last`` or not, reduces the gradients over the ranks.

    Passes before the last keep the gathered weights, unless ``parallel.reshard_after_forward`` frees their memory.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or args.sync_every_micro_batch)
        model.set_reshard_after_backward(last or args.reshard_after_forward)
    else:
        gathered(model).reduces = last


def finish_gradients(model: GPT) -> None:
    """Complete the gradients after a step's last backward pass, so that every parameter has its own."""
    if not isinstance(model, FSDPModule):  # which does so itself
        gathered(model).finish_gradients()


def reshard(model: GPT) -> None:
    """Free what is left gathered after a forward pass without a backward pass."""
    if isinstance(model, FSDPModule):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    else:
        gathered(model).end_pass()


def gathered(model: GPT) -> Gathered:
    """Return the weights of a model that FSDP2 does not shard."""
    return cast(Gathered, model.gathered)


def check_dtypes(model: GPT, train: TrainArgs) -> str:
    """Return the dtypes of the master weights, of the computation, and of the reduction of gradients, in one line.

    Raises RuntimeError on a rank whose master weights are not fp32: versions of Lightning and torch have differed.
    """
    master = {parameter.dtype for parameter in model.parameters()}
    if master != {torch.float32}:
        raise RuntimeError(f"the master weights are {master}, not fp32")
    policy = mixed_precision(train)
    return f"master {torch.float32}, compute {policy.param_dtype}, reduction {policy.reduce_dtype}".replace(
        "torch.", ""
    )
