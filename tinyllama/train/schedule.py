"""Compute the learning rate as a function of the step."""

import math
from collections.abc import Callable

from tinyllama.config.args import OptimArgs

# what is left of lr - min_lr at each point of a decay, which goes from 0 to 1
SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),  # arXiv:1608.03983
    "linear": lambda progress: 1 - progress,  # to zero: arXiv:2502.15938
    "sqrt": lambda progress: 1 - math.sqrt(progress),  # arXiv:2405.18392
}


def lr_at(step: int, max_steps: int, args: OptimArgs, decay_steps: float | None = None) -> float:
    """Return the learning rate of the 0-based optimizer step ``step`` of a run of ``max_steps``.

    Linear warm-up reaches ``lr`` at step ``warmup_steps - 1``. Then cosine and linear decay from ``lr`` at step
    ``warmup_steps`` to ``min_lr`` at step ``max_steps - 1``; wsd (warm-up, stable, decay: arXiv:2404.06395) stays at
    ``lr`` until ``decay_steps`` before that step (None: those of ``args``), and constant to the end.
    """
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    if args.schedule == "constant":
        return args.lr
    last = max_steps - 1
    if step >= last:
        return args.min_lr
    decay_steps = decay_steps or args.decay_steps or last - args.warmup_steps
    progress = max(0.0, (step - (last - decay_steps)) / decay_steps)
    shape = SHAPES[args.decay_shape if args.schedule == "wsd" else args.schedule]
    return args.min_lr + shape(progress) * (args.lr - args.min_lr)
