"""Update by AdamW (Loshchilov & Hutter, arXiv:1711.05101), with clipping inside: by torch, on a GPU by our kernel."""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from tinyllama.ops.backend import is_importable
from tinyllama.train.gathered import Copies


class Shards(NamedTuple):
    """This rank's part of some parameters, and of what belongs to them."""

    parameters: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    copies: list[Tensor | None]
    """where our kernel also writes the new parameters, in the dtype of the copy; torch's does not"""
    steps: list[Tensor]
    """how many steps have been accepted, () fp32 each"""


class Settings(TypedDict):
    """The settings of a group of parameters."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class AdamW(torch.optim.AdamW):
    """Torch's fused AdamW, with the same state, which multiplies gradients by a factor.

    As torch's does, ``step`` obeys ``found_inf``: where it is 1, weights and state stay as they are, and the host does
    not wait to learn it.
    """

    found_inf: Tensor | None = None
    gradient_factor: Tensor | None = None
    """multiplies the gradients in the next step, and in no other, () fp32"""

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 1e-8,
        copies: Copies | None = None,
    ) -> None:  # fmt: skip
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self._copies = copies or Copies({})
        self._copies.are_kept = all(has_kernel(parameter.device) for parameter in self._copies.by_master)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch overloads it by the closure
        """Update every parameter that has a gradient."""
        factor, self.gradient_factor = self.gradient_factor, None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(group, parameters, factor)

    def _update(self, group: dict[str, Any], parameters: list[Tensor], factor: Tensor | None) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        shards = Shards(
            [local(parameter) for parameter in parameters],
            [local(parameter.grad) for parameter in parameters if parameter.grad is not None],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [self._copies.by_master.get(parameter) for parameter in parameters],
            [state["step"] for state in states],
        )
        beta1, beta2 = group["betas"]
        lr, eps, weight_decay = (float(group[key]) for key in ("lr", "eps", "weight_decay"))  # Triton tells 0 from 0.0
        settings = Settings(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
        update = with_kernel if has_kernel(parameters[0].device) else with_torch
        update(shards, factor, self.found_inf, settings)


def has_kernel(device: torch.device) -> bool:
    """Return whether our kernel runs on ``device``."""
    return device.type == "cuda" and is_importable("triton") and torch.cuda.get_device_capability(device) >= (8, 0)


def with_kernel(shards: Shards, factor: Tensor | None, found_inf: Tensor | None, settings: Settings) -> None:
    """Update parameters and state by our kernel, which does everything in one pass over memory."""
    from tinyllama.ops.adamw_kernels import update

    parameters, gradients, exp_avgs, exp_avg_sqs, copies, steps = shards
    if found_inf is None:
        found_inf = torch.zeros_like(steps[0])
    if factor is None:
        factor = torch.ones_like(steps[0])
    torch._foreach_add_(steps, [1 - found_inf] * len(steps))  # the host would wait to read it without the list
    t = torch.stack(steps)
    corrections = torch.stack((1 - settings["beta1"] ** t, (1 - settings["beta2"] ** t).sqrt()), dim=1)  # (steps, 2)
    each = zip(parameters, gradients, exp_avgs, exp_avg_sqs, copies, corrections.unbind(), strict=True)
    for p, g, m, v, copy, correction in each:
        update(p, g, m, v, copy, factor, found_inf, correction, **settings)


def with_torch(shards: Shards, factor: Tensor | None, found_inf: Tensor | None, settings: Settings) -> None:
    """Do the same by torch's kernel, which takes gradients that have been multiplied by the factor."""
    parameters, gradients, exp_avgs, exp_avg_sqs, _, steps = shards
    if factor is not None:
        torch._foreach_mul_(gradients, factor)
    adamw(
        parameters, gradients, exp_avgs, exp_avg_sqs, [], steps,
        fused=True, found_inf=found_inf, amsgrad=False, maximize=False, **settings,
    )  # fmt: skip


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of ``tensor``, which is all of it if it is not a DTensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
