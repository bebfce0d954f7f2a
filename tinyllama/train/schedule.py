"""The learning rate as a function of the step."""

import math


def lr_at(step: int, *, lr: float, min_lr: float, warmup_steps: int, max_steps: int) -> float:
    """Learning rate of the 0-based optimizer step ``step``.

    Linear warm-up that reaches ``lr`` at step ``warmup_steps - 1``, then a cosine (arXiv:1608.03983) from ``lr``
    at step ``warmup_steps`` to ``min_lr`` at step ``max_steps - 1``, and ``min_lr`` after that.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if step >= max_steps - 1:
        return min_lr
    progress = (step - warmup_steps) / (max_steps - 1 - warmup_steps)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (lr - min_lr)
