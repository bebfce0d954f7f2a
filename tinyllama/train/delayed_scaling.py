"""The scales of a model's matmuls in float8 from step to step, the same on every rank and for every world size."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyllama import InputError
from tinyllama.model import Linear
from tinyllama.ops import float8
from tinyllama.ops.float8_casts import FACTOR, INVERSE, LARGEST


class DelayedScaling:
    """Makes every ``Linear`` in ``blocks`` multiply in float8; embedding and output matrix stay in bf16.

    A scale follows from what was cast in the step before. In a run's first step there is none before, and a cast looks
    at its tensor first, which takes a second pass.
    """

    def __init__(self, blocks: nn.Module, device: torch.device | str) -> None:
        self._known = torch.tensor(False)
        linears = [module for module in blocks.modules() if isinstance(module, Linear)]
        for linear in linears:
            linear.scales = float8.new_scales(self._known, device)
        scales = [linear.scales for linear in linears if linear.scales is not None]
        self._rows = {
            float8.E4M3: [scale.inputs for scale in scales],
            float8.E5M2: [scale.gradient for scale in scales],
        }

    def start_step(self) -> None:
        """Forget what was cast since the last step, in a validation."""
        torch._foreach_zero_([rows[:, LARGEST] for alike in self._rows.values() for rows in alike])

    def end_step(self, rejected: Tensor) -> None:
        """Collective. Set the scales of the next step, unless this step, () bool, was ``rejected``.

        A step that has a value that is not finite, or a spike, would say little about the next one's.
        """
        for dtype, alike in self._rows.items():
            rows = torch.stack(alike)  # (matmuls, 2 or 1, ROW)
            if dist.get_world_size() > 1:
                largest = rows[..., LARGEST].contiguous()
                dist.all_reduce(largest, dist.ReduceOp.MAX)
                rows[..., LARGEST] = largest
            before = rows.clone()
            float8.rescale(rows, dtype)
            # those of a first step stand, even if it was rejected
            torch._foreach_copy_(alike, list(torch.where(rejected, before, rows)))
        self._known.fill_(True)

    def exponents(self) -> list[int]:
        """The factors, as powers of two, or [] before the first step: what a checkpoint holds. Waits for the device."""
        if not self._known:
            return []
        factors = torch.cat([torch.stack(alike)[..., FACTOR] for alike in self._rows.values()], dim=1)  # (matmuls, 3)
        return (torch.frexp(factors)[1] - 1).flatten().tolist()

    def resume(self, exponents: list[int]) -> None:
        """Go on from what a checkpoint holds; a run that was not in float8 until then has a first step."""
        if not exponents:
            return
        inputs, gradients = self._rows.values()
        if len(exponents) != 3 * len(inputs):
            raise InputError(
                f"the checkpoint has {len(exponents)} scales of float8, and this model {3 * len(inputs)}: "
                "its state.json is damaged, resume from another step"
            )
        factors = float8.powers_of_two(torch.tensor(exponents, dtype=torch.int32)).view(-1, 3)
        for of_inputs, of_gradient, factor in zip(inputs, gradients, factors, strict=True):
            for rows, found in ((of_inputs, factor[:2]), (of_gradient, factor[2:])):
                rows[:, FACTOR] = found.to(rows.device)
                rows[:, INVERSE] = 1 / rows[:, FACTOR]
        self._known.fill_(True)
