"""One optimizer step: forward and backward passes over the micro-batches, the check of the result, clipping, update."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricOptimizer
from torch import Tensor, nn

from tinyllama.checkpoint.state import TrainState
from tinyllama.config.args import DataArgs, PretrainArgs
from tinyllama.model import GPT
from tinyllama.ops import attention
from tinyllama.train.anomaly import Guard
from tinyllama.train.optim import clip, local_gradients, set_lr
from tinyllama.train.parallel import finish_gradients, sync_gradients

LossFunction = Callable[[Tensor, Tensor], Tensor]
"""Maps input ids and targets, (B, T) int64 each, to the sum of their losses, () fp32."""


def loss_function(model: nn.Module, data: DataArgs, eos_id: int | None) -> LossFunction:
    """Return the summed loss of ``model``; with ``data.document_mask``, tokens see only their own document."""
    if not data.document_mask or eos_id is None:
        return model
    return lambda ids, targets: model(ids, targets, attention.documents(ids, eos_id), data.restart_positions)


@dataclass(frozen=True)
class TrainStep:
    """This rank's part of an optimizer step; the recipe calls it, and so does scripts/benchmark_step.py."""

    args: PretrainArgs
    fabric: Fabric
    gpt: GPT
    loss_function: LossFunction
    """summed loss of a micro-batch, by Fabric's wrapper of the model"""
    optimizer: _FabricOptimizer
    guard: Guard
    accumulation: int
    """micro-batches of a step on this rank"""
    tokens: int
    """tokens of a step over the whole world"""

    def __call__(self, state: TrainState, batches: Iterator[tuple[Tensor, Tensor]], lr: float) -> None:
        """Train on the next micro-batches of ``batches``, (B, T) int64 pairs, at ``lr``, and count them in ``state``.

        Nothing waits for the device, except once in float8 (``DelayedScaling``); ``guard.poll`` returns the result.
        """
        set_lr(self.optimizer.optimizer, lr)
        if self.gpt.scaling is not None:
            self.gpt.scaling.start_step()
        loss_sum = torch.zeros((), device=self.fabric.device)
        for micro_batch in range(self.accumulation):
            input_ids, targets = next(batches)
            sync_gradients(self.gpt, micro_batch == self.accumulation - 1, self.args.parallel)
            loss = self.loss_function(input_ids, targets)
            # gradients are averaged over the ranks; this scale makes them those of the mean loss per token of the step
            self.fabric.backward(loss * (self.fabric.world_size / self.tokens))
            loss_sum += loss.detach()
        finish_gradients(self.gpt)
        state.step += 1
        state.samples += self.args.train.global_batch_size
        state.tokens += self.tokens
        if state.step == self.args.optim.warmup_steps:
            state.warmup_samples = state.samples
        gradients = local_gradients(self.gpt)
        norm = self.guard.check(state.step, loss_sum, self.tokens, gradients)
        if self.gpt.scaling is not None:
            self.gpt.scaling.end_step(self.guard.rejected)
        clip(self.optimizer.optimizer, gradients, norm, self.args.optim.max_norm)
        self.optimizer.step()  # a step that must not reach the weights leaves them as they are
        self.optimizer.zero_grad()
