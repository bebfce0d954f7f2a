"""Build the optimizer by its name (optim.name), check that it can be used, and clip its gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from tinyllama import InputError
from tinyllama.checkpoint.tensors import named_tensors
from tinyllama.config.args import OptimArgs
from tinyllama.config.model import ModelConfig
from tinyllama.model import GPT, init_weights
from tinyllama.train.adamw import AdamW, local
from tinyllama.train.muon import Muon


def adamw(model: GPT, args: OptimArgs, dtype: torch.dtype) -> torch.optim.Optimizer:
    """Return AdamW over every parameter, with decay on norms and embeddings too (upstream pretrain/tinyllama.py)."""
    copies = model.gathered.copies if model.gathered else None
    betas = args.beta1, args.beta2
    return AdamW(model.parameters(), lr=args.lr, betas=betas, weight_decay=args.weight_decay, copies=copies)


OPTIMIZERS: dict[str, Callable[[GPT, OptimArgs, torch.dtype], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "muon": Muon,
}
"""each is called with the model, its settings and the compute dtype"""


def build_optimizer(model: GPT, args: OptimArgs, precision: str = "bf16") -> torch.optim.Optimizer:
    """Return the optimizer of ``model`` by ``optim.name``, for a run of this ``train.precision``."""
    return OPTIMIZERS[args.name](model, args, torch.float32 if precision == "fp32" else torch.bfloat16)


def check_optimizer(args: OptimArgs) -> None:
    """Raise InputError for an unknown optimizer, and for one that would break skipped steps or checkpoints.

    It is tried on a tiny model: a step that ``found_inf`` rejects must change nothing but make the state, all of it,
    and the state must be tensors.
    """
    if args.name not in OPTIMIZERS:
        raise InputError(f"optim.name {args.name!r} is not known: choose {' or '.join(OPTIMIZERS)}")
    sizes = {"block_size": 2, "vocab_size": 8, "n_layer": 1, "n_head": 2, "n_query_groups": 1, "n_embd": 4}
    model = GPT(ModelConfig("tiny", **sizes, intermediate_size=6))  # type: ignore[arg-type]
    init_weights(model, seed=0)
    optimizer = build_optimizer(model, args)
    start = {f"model.{name}": parameter.detach().clone() for name, parameter in model.named_parameters()}

    def after_step(rejected: bool) -> dict[str, Tensor]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, torch.nan if rejected else 1.0)
        optimizer.found_inf = torch.tensor(float(rejected))  # type: ignore[attr-defined]
        try:
            optimizer.step()
        except AssertionError as error:  # of torch's optimizers, unless they are fused
            raise InputError(f"optim.name {args.name} cannot take found_inf ({error}): give fused=True") from error
        tensors = named_tensors(model, optimizer)
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise InputError(
                    f"optim.name {args.name} has no tensor in {name} but {tensor!r}: a checkpoint cannot hold it"
                )
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    made, accepted, rejected = after_step(rejected=True), after_step(rejected=False), after_step(rejected=True)
    for before, after in ((start, made), (accepted, rejected)):
        for name, tensor in before.items():
            if not torch.equal(tensor, after[name]):
                raise InputError(
                    f"optim.name {args.name} changes {name} in a step that found_inf rejects: it would let a loss or "
                    "gradient that is not finite reach the weights"
                )
    if made.keys() != accepted.keys():
        late = min(made.keys() ^ accepted.keys())
        raise InputError(
            f"optim.name {args.name} does not make {late} in a step that found_inf rejects: no checkpoint could be "
            "loaded"
        )


def local_gradients(model: torch.nn.Module) -> list[Tensor]:
    """Return this rank's shards of the gradients of all parameters, the very tensors that the optimizer uses."""
    return [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]


def clip(optimizer: torch.optim.Optimizer, gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale ``gradients`` to ``max_norm`` in the next step if their ``norm``, over all ranks, is greater.

    Our AdamW does it in its step; for every other optimizer they are scaled here, in place. ``optimizer`` is the
    optimizer itself, not Fabric's wrapper.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if isinstance(optimizer, AdamW):
        optimizer.gradient_factor = factor
    else:
        torch._foreach_mul_(gradients, factor)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use ``lr`` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
