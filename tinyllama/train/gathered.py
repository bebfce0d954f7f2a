"""Mixed precision for ranks that gather all weights once a step and keep them until the step ends.

Each rank holds its shard of the fp32 master weights, of the optimizer state and of the averaged gradients, and all
weights in the compute dtype. FSDP2 with `reshard_after_forward=False` does the same, but it copies every weight out of
a flat buffer and every gradient into one, even where nothing is sharded. Here weights are gathered, and gradients
reduced, in place. FSDP2 also overlaps communication with computation, which pays on a network between nodes. Within a
node, collectives take a fiftieth of a step, and overlapping them slows the matmuls by more than that
(docs/benchmarks.md).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from tinyllama.model import GPT, Linear, SwiGLU
from tinyllama.ops import swiglu
from tinyllama.ops.linear import GradientSum, empty_sum
from tinyllama.train.collectives import all_gather, coalesced, reduce_scatter


@dataclass
class Weight:
    """A parameter in both its forms, and the module that it belongs to."""

    module: nn.Module
    name: str
    master: nn.Parameter
    """fp32, a DTensor: what optimizer and checkpoints see"""
    copy: nn.Parameter
    """in the compute dtype: what a pass computes with"""


@dataclass
class Copies:
    """This rank's rows of the low-precision copies, for an optimizer that writes them while it updates the masters."""

    by_master: dict[Tensor, Tensor]
    """by master, the copy of the rows that this rank has; the rows may lie apart"""
    are_kept: bool = False
    """whether the optimizer writes them in each of its steps"""


@dataclass
class Bucket:
    """Memory that one collective gathers and reduces: one weight, or several whose rows alternate.

    Every rank owns the same number of rows of the two tensors, so there may be a few more than the weights have.
    """

    weights: list[Weight]
    copy: Tensor
    """(rows, ...) in the compute dtype"""
    gradient: GradientSum
    """(rows, ...) of the micro-batches of a step"""


class Gathered:
    """The weights of ``model``, each as a sharded fp32 master for the optimizer and as a full copy for the passes.

    ``model`` must be on a device, and ``mesh`` must have the dimensions "replicate" and "shard". During a pass the
    modules hold the copies, between steps the masters. Each backward pass adds to the gradients: a ``Linear`` adds in
    its matmul, other modules when autograd has the gradient of the copy. The first addition of a step overwrites, which
    saves zeroing all gradients and reading them.

    With ``overlap``, for ranks that shard nothing, gradients are reduced while the backward pass continues.
    """

    reduces = True
    """whether a backward pass averages the gradients over the ranks: the last of a step must"""

    def __init__(self, model: GPT, mesh: DeviceMesh, dtype: torch.dtype, *, overlap: bool) -> None:
        self._mesh, self._dtype, self._overlap = mesh, dtype, overlap
        self._replicas, self._shards = mesh.shape
        self._shard = mesh.get_local_rank("shard")
        self._in_pass = False
        self._reductions: list[Any] = []  # what ``coalesced`` gives
        self.buckets: list[Bucket] = []
        self.copies = Copies({})
        self._copies_are_current = False  # for one pass: other code that changes the masters does not say so
        for block in model.layers:
            buckets = self._take(block)
            if overlap:
                block.forward = self._reducing(block.forward, buckets)  # type: ignore[method-assign]
        self._last = self._take(model)  # their backward pass is over when the whole is
        model.register_forward_pre_hook(lambda *_: self.start_pass())

    def _take(self, part: nn.Module) -> list[Bucket]:
        """Take over the parameters of ``part`` that are not taken yet."""
        found = []
        for module in part.modules():
            if isinstance(module, SwiGLU) and module.gated_mlp in swiglu.INTERLEAVED and module.w12 is None:
                bucket = self._lay_out([(one, "weight") for one in (module.w1, module.w2)])
                count = 2 * module.w1.weight.shape[0]
                total, empty = bucket.gradient
                module.w12 = swiglu.Interleaved(bucket.copy[:count], GradientSum(total[:count], empty))
                found.append(bucket)
            for name, parameter in module.named_parameters(recurse=False):
                if not isinstance(parameter, DTensor):
                    found.append(self._lay_out([(module, name)]))
        self.buckets += found
        return found

    def _lay_out(self, names: list[tuple[nn.Module, str]]) -> Bucket:
        """Lay out these parameters of the same shape, (R, ...), row by row in turn."""
        parameters = [getattr(module, name).data for module, name in names]
        count, *rest = parameters[0].shape
        owned = -(-count // self._shards)  # by each rank
        copy = parameters[0].new_empty(owned * self._shards * len(names), *rest, dtype=self._dtype)
        owned_copies = self._owned_in_turn(copy, len(names))
        bucket = Bucket([], copy, empty_sum(copy))
        for number, ((module, name), parameter) in enumerate(zip(names, parameters, strict=True)):
            turn = slice(number, count * len(names), len(names))
            local = parameter[self._shard * owned : (self._shard + 1) * owned].clone()
            master = nn.Parameter(self._dtensor(local, parameter))
            weight = Weight(module, name, master, nn.Parameter(copy[turn]))
            gradient = GradientSum(bucket.gradient.total[turn], bucket.gradient.empty)
            if isinstance(module, Linear):
                module.weight_gradient = gradient
            self.copies.by_master[master] = owned_copies[: len(local), number]
            weight.copy.register_post_accumulate_grad_hook(functools.partial(move_gradient, gradient))
            setattr(module, name, master)
            bucket.weights.append(weight)
        return bucket

    def _dtensor(self, local: Tensor, full: Tensor) -> DTensor:
        """Return the DTensor in the shape of ``full`` of which this rank has ``local``."""
        placements, shape, stride = [Replicate(), Shard(0)], full.shape, full.stride()
        return DTensor.from_local(local, self._mesh, placements, run_check=False, shape=shape, stride=stride)

    def _owned(self, rows: Tensor) -> Tensor:
        """Return this rank's part of ``rows``, (R, ...)."""
        return rows.chunk(self._shards)[self._shard]

    def _owned_in_turn(self, rows: Tensor, count: int) -> Tensor:
        """Return the same of ``count`` weights whose rows alternate, as (rows of each, count, ...)."""
        return self._owned(rows).unflatten(0, (-1, count))

    def _reducing(self, forward: Callable[..., Any], buckets: list[Bucket]) -> Callable[..., Any]:
        """Return a Block's ``forward`` that also reduces its gradients, as soon as its backward pass is done."""

        def reduce() -> None:
            if self.reduces:
                self._reduce(buckets)

        return lambda x, *inputs: forward(_Then.apply(x, reduce), *inputs)

    @torch.no_grad()
    def start_pass(self) -> None:
        """Give the modules the copies, new ones if they had the masters."""
        if self._in_pass:
            return
        for bucket in self.buckets:
            for weight in bucket.weights:
                setattr(weight.module, weight.name, weight.copy)
            bucket.gradient.empty.fill_(True)
        if not self._copies_are_current:
            masters = [cast(DTensor, master).to_local() for master in self.copies.by_master]
            torch._foreach_copy_([*self.copies.by_master.values()], masters)
        self._copies_are_current = False
        if self._shards > 1:
            group = self._mesh.get_group("shard")
            with coalesced(group):
                for bucket in self.buckets:
                    all_gather(bucket.copy, self._owned(bucket.copy), group)
        self._in_pass = True

    def end_pass(self) -> None:
        """Give the modules the masters."""
        for bucket in self.buckets:
            for weight in bucket.weights:
                setattr(weight.module, weight.name, weight.master)
        self._in_pass = False

    def _reduce(self, buckets: list[Bucket]) -> None:
        """Average these gradients over the ranks; each rank keeps its part. With overlap, only start to."""
        for bucket in buckets:
            if bucket.gradient.empty:  # no backward pass has reached the weight
                bucket.gradient.total.zero_()
                bucket.gradient.empty.fill_(False)
        totals = [bucket.gradient.total for bucket in buckets]
        operation = dist.ReduceOp.AVG if totals[0].is_cuda else dist.ReduceOp.SUM  # gloo has no average
        if self._shards > 1:
            group = self._mesh.get_group("shard")
            with coalesced(group):
                for total in totals:
                    reduce_scatter(self._owned(total), total, operation, group)
        if self._replicas > 1:
            group = self._mesh.get_group("replicate")
            with coalesced(group, async_ops=self._overlap) as reduction:
                for total in totals:
                    dist.all_reduce(self._owned(total), operation, group)
            self._reductions += [reduction] if reduction else []

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Give the modules the masters, with the gradients of the step over all ranks."""
        self._reduce(self._last if self._overlap else self.buckets)
        for reduction in self._reductions:
            reduction.wait()
        self._reductions.clear()
        for bucket in self.buckets:
            self._set_gradients(bucket)
        self.end_pass()
        self._copies_are_current = self.copies.are_kept

    def _set_gradients(self, bucket: Bucket) -> None:
        owned = self._owned_in_turn(bucket.gradient.total, len(bucket.weights))
        if self._mesh.size() > 1 and not owned.is_cuda:
            owned /= self._mesh.size()
        gradients = [owned.squeeze(1)]
        if len(bucket.weights) > 1:  # contiguous, as optimizers expect them
            size, count, columns = owned.shape
            gradients = [owned.new_empty(size, columns) for _ in bucket.weights]
            torch.split_with_sizes_copy(owned.flatten(1), [columns] * count, dim=1, out=gradients)
        for weight, gradient in zip(bucket.weights, gradients, strict=True):
            master = cast(DTensor, weight.master)
            weight.master.grad = self._dtensor(gradient[: len(master.to_local())], master)


class _Then(torch.autograd.Function):
    """The identity, which calls a function once the gradient of its result is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return gradients[0], None


def move_gradient(gradient: GradientSum, copy: Tensor) -> None:
    """Add the gradient of ``copy`` to its sum, and clear it; it has none if a ``Linear`` has added it."""
    if copy.grad is not None:
        gradient.add(copy.grad)
        copy.grad = None
