"""Mixed precision on ranks that each hold all of the weights, without FSDP2's copies of weights and gradients.

FSDP2 gathers and scatters where there is nothing to share, too: it copies every weight and gradient several times.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from tinyllama.model import GPT, Linear, SwiGLU
from tinyllama.ops import swiglu
from tinyllama.ops.linear import GradientSum, empty_sum


@dataclass
class Weight:
    """A parameter in both of its forms, and the module that has it."""

    module: nn.Module
    name: str
    master: nn.Parameter
    """fp32, a DTensor of one shard: what optimizer and checkpoints see"""
    copy: nn.Parameter
    """in the dtype of a pass: what a pass computes with"""
    gradient: GradientSum
    """of the micro-batches of a step"""


class Unsharded:
    """The weights of ``model``, which lies on a device, as its passes and as its optimizer need them.

    In a pass the modules have the copies, between steps the masters. Each backward pass adds to the gradients: where a
    ``Linear`` multiplies, in its matmul, else when autograd has the gradient of a copy. A step's first addition to a
    gradient writes it, which saves setting all of them to 0 and reading that.
    """

    reduces = True
    """whether a backward pass averages the gradients over the ranks: the last of a step must"""

    def __init__(self, model: GPT, mesh: DeviceMesh, dtype: torch.dtype) -> None:
        self._mesh, self._dtype = mesh, dtype
        self._in_pass = False
        self._reductions: list[dist.Work] = []
        self._weights: dict[tuple[nn.Module, str], Weight] = {}
        self._gradients: list[GradientSum] = []
        self._pairs: list[tuple[list[Weight], swiglu.Interleaved]] = []
        for block in model.layers:
            gradients = self._take(block)
            if mesh.size() > 1:
                reducing = self._reducing(block.forward, gradients)
                block.forward = reducing  # type: ignore[method-assign]
        self._last = self._take(model)  # their backward pass is over when the whole is
        model.register_forward_pre_hook(lambda *_: self.start_pass())

    def _take(self, part: nn.Module) -> list[GradientSum]:
        """Take over the parameters of ``part`` that are not taken yet; returns the sums of their gradients."""
        taken, gradients = [], []
        for module in part.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if (module, name) not in self._weights:
                    master = nn.Parameter(self._dtensor(parameter.data))
                    copy = nn.Parameter(torch.empty_like(parameter, dtype=self._dtype))
                    taken.append(Weight(module, name, master, copy, empty_sum(parameter.data)))
                    self._weights[module, name] = taken[-1]
        for module in part.modules():
            if isinstance(module, SwiGLU) and module.gated_mlp in swiglu.INTERLEAVED and module.w12 is None:
                pair = [self._weights[one, "weight"] for one in (module.w1, module.w2)]
                module.w12 = interleave(*pair)
                self._pairs.append((pair, module.w12))
                gradients.append(module.w12.gradient)
        for weight in taken:
            if isinstance(weight.module, Linear):
                weight.module.weight_gradient = weight.gradient
            if weight.gradient.total.is_contiguous():  # not a part of another
                gradients.append(weight.gradient)
            weight.copy.register_post_accumulate_grad_hook(functools.partial(move_gradient, weight.gradient))
            setattr(weight.module, weight.name, weight.master)
        self._gradients += gradients
        return gradients

    def _dtensor(self, local: Tensor) -> DTensor:
        return DTensor.from_local(local, self._mesh, [Replicate(), Shard(0)], run_check=False)

    def _reducing(self, forward: Callable[..., Any], gradients: list[GradientSum]) -> Callable[..., Any]:
        """A Block's ``forward``, with a reduction of these ``gradients`` as soon as its backward pass is done."""

        def reduce() -> None:
            if self.reduces:
                self._reduce(gradients)

        return lambda x, *inputs: forward(_Then.apply(x, reduce), *inputs)

    def _reduce(self, gradients: list[GradientSum]) -> None:
        for gradient in totals(gradients):
            operation = dist.ReduceOp.AVG if gradient.is_cuda else dist.ReduceOp.SUM  # gloo has no average
            work = dist.all_reduce(gradient, operation, self._mesh.get_group("replicate"), async_op=True)
            assert work is not None
            self._reductions.append(work)

    @torch.no_grad()
    def start_pass(self) -> None:
        """Give the modules the copies, new ones if they had the masters."""
        if self._in_pass:
            return
        masters = [weight.master.to_local() for weight in self._weights.values()]  # type: ignore[attr-defined]
        torch._foreach_copy_([weight.copy for weight in self._weights.values()], masters)
        for _, empty in self._gradients:
            empty.fill_(True)
        for weight in self._weights.values():
            setattr(weight.module, weight.name, weight.copy)
        self._in_pass = True

    def end_pass(self) -> None:
        """Give the modules the masters."""
        for weight in self._weights.values():
            setattr(weight.module, weight.name, weight.master)
        self._in_pass = False

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Give the modules the masters, with the gradients of the step over all ranks."""
        if self._mesh.size() > 1:
            self._reduce(self._last)
            for work in self._reductions:
                work.wait()
            self._reductions.clear()
        gradients = totals(self._gradients)
        if self._mesh.size() > 1 and not gradients[0].is_cuda:
            torch._foreach_div_(gradients, self._mesh.size())
        for weight in self._weights.values():
            if weight.gradient.total.is_contiguous():
                weight.master.grad = self._dtensor(weight.gradient.total)
        for pair, both in self._pairs:
            total = both.gradient.total
            rows, columns = pair[0].master.shape
            parts = [torch.empty(rows, columns, device=total.device) for _ in pair]
            torch.split_with_sizes_copy(total.view(rows, 2 * columns), [columns, columns], dim=1, out=parts)
            for weight, gradient in zip(pair, parts, strict=True):
                weight.master.grad = self._dtensor(gradient)
        self.end_pass()


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


def interleave(w1: Weight, w2: Weight) -> swiglu.Interleaved:
    """Lay out w1 and w2, (I, C) each, row by row in turn, as the kernel wants them."""
    rows, columns = w1.copy.shape
    weight = w1.copy.new_empty(2 * rows, columns)
    gradient = empty_sum(weight)
    for number, one in enumerate((w1, w2)):
        one.copy = nn.Parameter(weight[number::2])
        one.gradient = GradientSum(gradient.total[number::2], gradient.empty)
    return swiglu.Interleaved(weight, gradient)


def move_gradient(gradient: GradientSum, copy: Tensor) -> None:
    """Add the gradient of ``copy`` to its sum, and clear it; it has none if a ``Linear`` has added it."""
    if copy.grad is not None:
        gradient.add(copy.grad)
        copy.grad = None


def totals(gradients: list[GradientSum]) -> list[Tensor]:
    """The totals of these sums, 0 where no backward pass has reached the weight."""
    for total, empty in gradients:
        if empty:
            total.zero_()
            empty.fill_(False)
    return [total for total, _ in gradients]
