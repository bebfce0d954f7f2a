"""Mixed precision on ranks that gather all weights once a step and keep them until it ends.

Each rank has its shard of the master weights, of the optimizer's state and of the gradients' mean, and a copy of all
weights in the compute dtype. FSDP2 does the same with `reshard_after_forward=False`, but copies every weight out of
a flat buffer and every gradient into one, where nothing is sharded, too; here both lie where they are gathered to and
reduced from. And FSDP2 communicates beside what computes, as a network between nodes asks for. Between the GPUs of a
node collectives take a fiftieth of a step, and matmuls beside them lose more than that (docs/benchmarks.md).
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
    """A parameter in both of its forms, and the module that has it."""

    module: nn.Module
    name: str
    master: nn.Parameter
    """fp32, a DTensor: what optimizer and checkpoints see"""
    copy: nn.Parameter
    """in the compute dtype: what a pass computes with"""


@dataclass
class Copies:
    """This rank's part of the copies, for an optimizer that writes them as it updates the masters."""

    by_master: dict[Tensor, Tensor]
    """of each master the copy of the rows that this rank has; rows may lie apart"""
    are_kept: bool = False
    """whether the optimizer writes them in each of its steps"""


@dataclass
class Rows:
    """What is gathered and reduced at once: a weight, or several whose rows alternate in memory.

    Every rank owns the same number of rows of the two tensors, so there may be a few more than the weights have.
    """

    weights: list[Weight]
    copy: Tensor
    """(rows, ...) in the compute dtype"""
    gradient: GradientSum
    """(rows, ...) of the micro-batches of a step"""


class Gathered:
    """The weights of ``model``, which lies on a device, as its passes and as its optimizer need them.

    ``mesh`` has the dimensions "replicate" and "shard". In a pass the modules have the copies, between steps the
    masters. Each backward pass adds to the gradients: where a ``Linear`` multiplies, in its matmul, else when autograd
    has the gradient of a copy. A step's first addition to a gradient overwrites it, which saves setting all of them
    to 0 and reading them.

    With ``overlap``, for ranks that share nothing, gradients are reduced while the backward pass goes on.
    """

    reduces = True
    """whether a backward pass averages the gradients over the ranks: the last of a step must"""

    def __init__(self, model: GPT, mesh: DeviceMesh, dtype: torch.dtype, *, overlap: bool) -> None:
        self._mesh, self._dtype, self._overlap = mesh, dtype, overlap
        self._replicas, self._shards = mesh.shape
        self._shard = mesh.get_local_rank("shard")
        self._in_pass = False
        self._reductions: list[Any] = []  # what ``coalesced`` gives
        self.rows: list[Rows] = []
        self.copies = Copies({})
        self._copies_are_current = False  # until the next pass only: whatever else changes the masters does not say so
        for block in model.layers:
            rows = self._take(block)
            if overlap:
                block.forward = self._reducing(block.forward, rows)  # type: ignore[method-assign]
        self._last = self._take(model)  # their backward pass is over when the whole is
        model.register_forward_pre_hook(lambda *_: self.start_pass())

    def _take(self, part: nn.Module) -> list[Rows]:
        """Take over the parameters of ``part`` that are not taken yet."""
        found = []
        for module in part.modules():
            if isinstance(module, SwiGLU) and module.gated_mlp in swiglu.INTERLEAVED and module.w12 is None:
                rows = self._lay_out([(one, "weight") for one in (module.w1, module.w2)])
                count = 2 * module.w1.weight.shape[0]
                total, empty = rows.gradient
                module.w12 = swiglu.Interleaved(rows.copy[:count], GradientSum(total[:count], empty))
                found.append(rows)
            for name, parameter in module.named_parameters(recurse=False):
                if not isinstance(parameter, DTensor):
                    found.append(self._lay_out([(module, name)]))
        self.rows += found
        return found

    def _lay_out(self, names: list[tuple[nn.Module, str]]) -> Rows:
        """Lay out these parameters of the same shape, (R, ...), row by row in turn."""
        parameters = [getattr(module, name).data for module, name in names]
        count, *rest = parameters[0].shape
        owned = -(-count // self._shards)  # by each rank
        copy = parameters[0].new_empty(owned * self._shards * len(names), *rest, dtype=self._dtype)
        owned_copies = self._owned_in_turn(copy, len(names))
        rows = Rows([], copy, empty_sum(copy))
        for number, ((module, name), parameter) in enumerate(zip(names, parameters, strict=True)):
            turn = slice(number, count * len(names), len(names))
            local = parameter[self._shard * owned : (self._shard + 1) * owned].clone()
            master = nn.Parameter(self._dtensor(local, parameter))
            weight = Weight(module, name, master, nn.Parameter(copy[turn]))
            gradient = GradientSum(rows.gradient.total[turn], rows.gradient.empty)
            if isinstance(module, Linear):
                module.weight_gradient = gradient
            self.copies.by_master[master] = owned_copies[: len(local), number]
            weight.copy.register_post_accumulate_grad_hook(functools.partial(move_gradient, gradient))
            setattr(module, name, master)
            rows.weights.append(weight)
        return rows

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

    def _reducing(self, forward: Callable[..., Any], rows: list[Rows]) -> Callable[..., Any]:
        """Return a Block's ``forward`` that also reduces its gradients, as soon as its backward pass is done."""

        def reduce() -> None:
            if self.reduces:
                self._reduce(rows)

        return lambda x, *inputs: forward(_Then.apply(x, reduce), *inputs)

    @torch.no_grad()
    def start_pass(self) -> None:
        """Give the modules the copies, new ones if they had the masters."""
        if self._in_pass:
            return
        for rows in self.rows:
            for weight in rows.weights:
                setattr(weight.module, weight.name, weight.copy)
            rows.gradient.empty.fill_(True)
        if not self._copies_are_current:
            masters = [cast(DTensor, master).to_local() for master in self.copies.by_master]
            torch._foreach_copy_([*self.copies.by_master.values()], masters)
        self._copies_are_current = False
        if self._shards > 1:
            group = self._mesh.get_group("shard")
            with coalesced(group):
                for rows in self.rows:
                    all_gather(rows.copy, self._owned(rows.copy), group)
        self._in_pass = True

    def end_pass(self) -> None:
        """Give the modules the masters."""
        for rows in self.rows:
            for weight in rows.weights:
                setattr(weight.module, weight.name, weight.master)
        self._in_pass = False

    def _reduce(self, part: list[Rows]) -> None:
        """Average these gradients over the ranks, of which each keeps its part; with overlap, only begin to."""
        for rows in part:
            if rows.gradient.empty:  # no backward pass has reached the weight
                rows.gradient.total.zero_()
                rows.gradient.empty.fill_(False)
        totals = [rows.gradient.total for rows in part]
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
        self._reduce(self._last if self._overlap else self.rows)
        for reduction in self._reductions:
            reduction.wait()
        self._reductions.clear()
        for rows in self.rows:
            self._set_gradients(rows)
        self.end_pass()
        self._copies_are_current = self.copies.are_kept

    def _set_gradients(self, rows: Rows) -> None:
        owned = self._owned_in_turn(rows.gradient.total, len(rows.weights))
        if self._mesh.size() > 1 and not owned.is_cuda:
            owned /= self._mesh.size()
        gradients = [owned.squeeze(1)]
        if len(rows.weights) > 1:  # contiguous, as optimizers expect them
            size, count, columns = owned.shape
            gradients = [owned.new_empty(size, columns) for _ in rows.weights]
            torch.split_with_sizes_copy(owned.flatten(1), [columns] * count, dim=1, out=gradients)
        for weight, gradient in zip(rows.weights, gradients, strict=True):
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
