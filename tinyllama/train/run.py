"""A run, resolved: what its settings and its data come to, before the first rank starts."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinyllama import InputError
from tinyllama.config.args import PretrainArgs, TrainArgs
from tinyllama.config.model import ModelConfig
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import PackedDataset
from tinyllama.train.schedule import lr_at


@dataclass(frozen=True)
class Run:
    """All that every rank knows alike."""

    args: PretrainArgs
    config: ModelConfig
    sources: list[PackedDataset]
    validation: list[PackedDataset]
    mixture: Mixture
    accumulation: int
    """micro-batches a rank passes through in one step"""
    max_steps: int
    ops: dict[str, str]
    """backend of each operation"""
    resume: Path | None
    """the step directory to go on from"""

    @property
    def out_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.args.out_dir)

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted in an optimizer step by the whole world."""
        return self.args.train.global_batch_size * self.config.block_size

    @property
    def origin(self) -> str:
        """What it starts from, in words."""
        if self.resume is not None:
            return f"resumed from {self.resume}"
        start = self.args.train.init_from
        return f"a new run of the weights of {start}" if start else "a new run"

    def lr_at(self, step: int) -> float:
        """Learning rate of the 0-based step."""
        optim = self.args.optim
        return lr_at(step, lr=optim.lr, min_lr=optim.min_lr, warmup_steps=optim.warmup_steps, max_steps=self.max_steps)

    def resolved(self) -> dict[str, Any]:
        """The settings with the model's sizes written out: what config.yaml holds."""
        return asdict(self.args) | {"model": asdict(self.config)}

    def data_facts(self) -> dict[str, Any]:
        """What fixes the model and the order of the samples: a resumed run must have the same."""
        sources: list[dict[str, Any]] = [
            {"weight": source.weight, "fingerprint": dataset.fingerprint}
            for source, dataset in zip(self.args.data.sources, self.sources, strict=True)
        ]
        data: dict[str, Any] = {"seed": self.args.data.seed, "sources": sources}
        if self.args.data.ramp_tokens is not None:
            data["ramp_tokens"] = self.args.data.ramp_tokens
            for facts, source in zip(sources, self.args.data.sources, strict=True):
                facts["final_weight"] = source.final_weight
        return {"data": data, "model": asdict(self.config)}

    def tokenizer_facts(self) -> dict[str, Any]:
        """What a converter has to know of the tokenizer."""
        dataset = self.sources[0]
        return {"tokenizer_sha256": dataset.tokenizer_sha256, "bos_id": dataset.bos_id, "eos_id": dataset.eos_id}


def gradient_accumulation(train: TrainArgs, world_size: int) -> int:
    """Micro-batches a rank passes through in one step.

    Raises InputError, naming the nearest sizes that divide, when the global batch is not a whole number of them.
    """
    unit = world_size * train.micro_batch_size
    if train.global_batch_size % unit:
        lower = train.global_batch_size // unit * unit
        nearest = " or ".join(str(size) for size in (lower, lower + unit) if size)
        raise InputError(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of {world_size} ranks x "
            f"train.micro_batch_size {train.micro_batch_size}; nearest valid: {nearest}"
        )
    return train.global_batch_size // unit


def total_steps(args: PretrainArgs, block_size: int, num_blocks: int) -> int:
    """Optimizer steps of the run, from whichever of steps, tokens and epochs was given.

    ``num_blocks`` is the number of blocks of all sources together: an epoch is that many samples.
    Raises InputError for a run of no steps or a warm-up that does not end before the run does.
    """
    train = args.train
    if train.max_steps is not None:
        steps = train.max_steps
    elif train.max_tokens is not None:
        steps = -(-train.max_tokens // (train.global_batch_size * block_size))
    else:
        assert train.max_epochs is not None  # check() has seen to it that one is given
        steps = int(train.max_epochs * num_blocks / train.global_batch_size)
        if steps == 0:
            raise InputError(
                f"train.max_epochs {train.max_epochs} of {num_blocks:,} blocks is less than one step of "
                f"train.global_batch_size {train.global_batch_size} samples: raise the one or lower the other"
            )
    if args.optim.warmup_steps >= steps:
        raise InputError(
            f"optim.warmup_steps {args.optim.warmup_steps} does not end within the run's {steps} steps: lower it"
        )
    return steps
