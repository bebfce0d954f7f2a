"""The optimizer."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tinyllama.config.args import OptimArgs


def build_optimizer(model: torch.nn.Module, args: OptimArgs) -> torch.optim.AdamW:
    """AdamW over every parameter, decay on norms and embeddings too (upstream pretrain/tinyllama.py)."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=args.lr,
        betas=(args.beta1, args.beta2),
        weight_decay=args.weight_decay,
        fused=True,
    )


def local_gradients(model: torch.nn.Module) -> list[Tensor]:
    """This rank's shards of the gradients of all parameters, the very ones that the optimizer uses."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]


def clip(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale ``gradients`` in place to ``max_norm`` if their ``norm``, over all ranks, is greater."""
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use ``lr`` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
