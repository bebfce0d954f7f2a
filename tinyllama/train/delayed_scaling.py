"""The scales of a model's matmuls in float8 from step to step, the same on every rank.

From the second step on they are the same for every world size, too: the first step has no maxima of a step before, so
each rank finds those of its own micro-batches.
"""

import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinyllama.checkpoint.reader import TO_RESUME, DamagedError
from tinyllama.checkpoint.state import MOST_EXPONENT
from tinyllama.model import Linear, SwiGLU
from tinyllama.ops import float8
from tinyllama.ops.float8_casts import AMAX, SCALE

GRADIENT = 2
"""column of a matmul's scales in a checkpoint, after those of its inputs"""


class DelayedScaling:
    """Makes every ``Linear`` in ``blocks`` multiply in float8; embedding and output matrix stay in bf16.

    A scale follows from what was cast in the step before. In a run's first step there is none before, and a cast looks
    at its tensor first, which takes a second pass. ``loss_scale`` is what a backward pass multiplies the loss by.
    """

    def __init__(self, blocks: nn.Module, device: torch.device | str, loss_scale: float = 1.0) -> None:
        self._loss_power = round(math.log2(loss_scale))
        self._known = torch.tensor(False)
        linears = [module for module in blocks.modules() if isinstance(module, Linear)]
        for linear in linears:
            linear.scales = float8.new_scales(self._known, device)
        for module in blocks.modules():
            if isinstance(module, SwiGLU) and module.gated_mlp is float8.swiglu:
                # one matmul; a checkpoint holds its scales twice, so that a run may go on with another ops.swiglu
                module.w2.scales = module.w1.scales
        scales = [linear.scales for linear in linears if linear.scales is not None]
        self._inputs = [scale.inputs for scale in scales]  # (2, ROW) each
        self._gradients = [scale.gradient for scale in scales]  # (1, ROW) each

    def start_step(self) -> None:
        """Forget the magnitudes that a validation has seen since the last step: they must not set the next scales."""
        torch._foreach_zero_([rows[:, AMAX] for rows in [*self._inputs, *self._gradients]])

    def end_step(self, rejected: Tensor) -> None:
        """Collective. Set the scales of the next step, unless this step, () bool, was ``rejected``.

        A step that has a value that is not finite, or a spike, would say little about the next one's.
        """
        inputs, gradients = torch.stack(self._inputs), torch.stack(self._gradients)  # (matmuls, 2 and 1, ROW)
        if dist.get_world_size() > 1:
            amax = torch.cat((inputs[..., AMAX], gradients[..., AMAX]), dim=1)  # (matmuls, 3)
            dist.all_reduce(amax, dist.ReduceOp.MAX)
            inputs[..., AMAX], gradients[..., AMAX] = amax[:, :GRADIENT], amax[:, GRADIENT:]
        for scales, rows, dtype in (
            (self._inputs, inputs, float8.E4M3),
            (self._gradients, gradients, float8.E5M2),
        ):
            before = rows.clone()
            float8.rescale(rows, dtype)
            torch._foreach_copy_(scales, list(torch.where(rejected, before, rows)))
        if not self._known:  # waits for the device, in the first step only; after a rejected one, the next is the first
            self._known.copy_(~rejected)

    def exponents(self) -> list[int]:
        """Return the scales as a checkpoint holds them: as exponents of two; [] before the first step.

        Those of gradients are as if the loss was not scaled, which depends on the number of ranks and on the batch. It
        waits for the device.
        """
        if not self._known:
            return []
        rows = torch.cat((torch.stack(self._inputs), torch.stack(self._gradients)), dim=1)  # (matmuls, 3, ROW)
        powers = torch.frexp(rows[..., SCALE])[1] - 1
        powers[:, GRADIENT] += self._loss_power
        return powers.clamp(-MOST_EXPONENT, MOST_EXPONENT).flatten().tolist()

    def resume(self, exponents: list[int], step_dir: Path) -> None:
        """Restore the scales from the checkpoint ``step_dir``; a run that was not in float8 has its first step again.

        Raises DamagedError, on every rank.
        """
        if not exponents:
            return
        if len(exponents) != 3 * len(self._inputs):
            found = f"its state.json has {len(exponents)} scales of float8, and this model {3 * len(self._inputs)}"
            raise DamagedError(f"{step_dir} is damaged ({found})", TO_RESUME)
        powers = torch.tensor(exponents, dtype=torch.int32).view(-1, 3)
        powers[:, GRADIENT] -= self._loss_power
        scales = float8.powers_of_two(powers.clamp(-MOST_EXPONENT, MOST_EXPONENT))
        for inputs, gradient, scale in zip(self._inputs, self._gradients, scales, strict=True):
            float8.set_scales(inputs, scale[:GRADIENT].to(inputs.device))
            float8.set_scales(gradient, scale[GRADIENT:].to(gradient.device))
        self._known.fill_(True)
