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
        self._rows = []
        for module in blocks.modules():
            if isinstance(module, Linear):
                module.scales = float8.new_scales(self._known, device)
                self._rows.append(module.scales.rows)

    def start_step(self) -> None:
        """Forget what was cast since the last step, in a validation."""
        torch._foreach_zero_([rows[:, LARGEST] for rows in self._rows])

    def end_step(self, rejected: Tensor) -> None:
        """Collective. Set the scales of the next step, unless this step, () bool, was ``rejected``.

        A step that has a value that is not finite, or a spike, would say little about the next one's.
        """
        rows = torch.stack(self._rows)  # (matmuls, 3, ROW)
        if dist.get_world_size() > 1:
            largest = rows[..., LARGEST].contiguous()
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            rows[..., LARGEST] = largest
        before = rows.clone()
        float8.rescale(rows)
        # those of a first step stand, even if it was rejected
        torch._foreach_copy_(self._rows, list(torch.where(rejected, before, rows)))
        self._known.fill_(True)

    def exponents(self) -> list[int]:
        """The factors, as powers of two, or [] before the first step: what a checkpoint holds. Waits for the device."""
        if not self._known:
            return []
        return torch.stack(self._rows)[..., FACTOR].log2().round().int().flatten().tolist()

    def resume(self, exponents: list[int]) -> None:
        """Go on from what a checkpoint holds; a run that was not in float8 until then has a first step."""
        if not exponents:
            return
        if len(exponents) != 3 * len(self._rows):
            raise InputError(
                f"the checkpoint has {len(exponents)} scales of float8, and this model {3 * len(self._rows)}: "
                "its state.json is damaged, resume from another step"
            )
        factors = torch.exp2(torch.tensor(exponents, dtype=torch.float32)).view(-1, 3)
        for rows, factor in zip(self._rows, factors, strict=True):
            rows[:, FACTOR] = factor.to(rows.device)
            rows[:, INVERSE] = 1 / rows[:, FACTOR]
        self._known.fill_(True)
