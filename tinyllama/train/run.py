"""Resolve the settings and the data of a run into what training needs, before the ranks connect."""

import hashlib
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from tinyllama import InputError
from tinyllama.checkpoint.resume import leaves
from tinyllama.checkpoint.state import TrainState
from tinyllama.config.args import PretrainArgs
from tinyllama.config.model import ModelConfig
from tinyllama.data import mixture
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import PackedDataset, tokenizer_of
from tinyllama.ops import choice, float8
from tinyllama.train.budget import samples_of_warmup, smaller_batch, total_steps
from tinyllama.train.launch import World
from tinyllama.train.sample_texts import SampleTexts
from tinyllama.train.schedule import lr_at

MOST_RAMP = 2**31
"""Samples over which the shares of the sources may change: their table takes 10 us for a thousand, so 20 s."""
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """Everything about a run that is known before training starts; it is the same on every rank."""

    args: PretrainArgs
    config: ModelConfig
    world: World
    sources: list[PackedDataset]
    validation: list[PackedDataset]
    mixture: Mixture
    accumulation: int
    """micro-batches that each rank processes per step"""
    ops: dict[str, str]
    """backend of each operation"""
    resume: Path | None = None
    """checkpoint directory that the run resumes from; None: a new run"""
    done: TrainState = field(default_factory=TrainState)
    """progress saved in that checkpoint, made at any batch size; all else follows from the current settings"""
    sample_texts: SampleTexts | None = None
    """continues the prompts of eval.samples at each validation; None: there are none"""
    start: Path | None = None
    """what the initial weights are read from: train.init_from, or a step of the run there; None before it is chosen"""

    @cached_property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run: those done and those left."""
        return total_steps(self.args, self.config.block_size, self.num_blocks, self.done)

    @property
    def out_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.args.out_dir)

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted in an optimizer step by the whole world."""
        return self.args.train.global_batch_size * self.config.block_size

    @property
    def num_blocks(self) -> int:
        """Blocks of all sources together: an epoch is that many samples."""
        return sum(source.num_blocks(self.config.block_size) for source in self.sources)

    @property
    def steps_left(self) -> int:
        """Steps that are not done yet."""
        return self.max_steps - self.done.step

    @property
    def samples_left(self) -> int:
        """Samples that are not seen yet."""
        return self.steps_left * self.args.train.global_batch_size

    @property
    def profiled(self) -> range:
        """Steps that are still to be traced, counted from 1."""
        first, last = self.args.log.profile or (1, 0)
        return range(max(first, self.done.step + 1), last + 1)

    @property
    def profile_dir(self) -> Path:
        """Folder of the traces."""
        return self.out_dir / "profile"

    @property
    def origin(self) -> str:
        """Return what the run starts from, in words."""
        if self.resume is not None:
            return f"resumed from {self.resume}"
        start = self.start or self.args.train.init_from
        return f"a new run from the weights of {start}" if start else "a new run"

    def lr_at(self, step: int) -> float:
        """Return the learning rate of the 0-based step, on one curve of the budget, however the batch has changed."""
        optim, ahead = self.args.optim, self.schedule_offset
        at = step if step < optim.warmup_steps else step + ahead
        decay_steps = optim.decay_steps and optim.decay_steps * self.decay_batch / self.args.train.global_batch_size
        return lr_at(at, self.max_steps + ahead, optim, decay_steps)

    @property
    def schedule_offset(self) -> int:
        """Steps to add to the run's own count to find its place on the learning rate schedule.

        A budget in tokens or epochs is counted in samples. After the warm-up, which is counted in steps, the samples
        seen at another batch size therefore count as the steps that they would make at the current one.
        """
        train, done, warmup = self.args.train, self.done, self.args.optim.warmup_steps
        if train.max_steps is not None or done.step < warmup:
            return 0
        samples = done.samples - samples_of_warmup(self.args, done)
        return samples // train.global_batch_size - (done.step - warmup)

    @cached_property
    def decay_batch(self) -> float:
        """Batch size, in samples, of the steps that optim.decay_steps counts.

        It is the current one, unless a run with a budget in tokens or epochs resumes at another batch size. Then a
        decay that has begun keeps its length in samples, and one that should have begun by now begins now. Before the
        warm-up has ended, no decay has begun.
        """
        batch, optim, done = self.args.train.global_batch_size, self.args.optim, self.done
        decay_steps, has_budget_in_steps = optim.decay_steps, self.args.train.max_steps is not None
        if decay_steps is None or has_budget_in_steps or done.decay_batch <= 0 or done.step < optim.warmup_steps:
            return batch
        left = max(self.steps_left - 1, 1)  # from the next step to the last
        is_under_way = decay_steps * done.decay_batch > left * batch
        return done.decay_batch if is_under_way else min(batch, left * batch / decay_steps)

    def with_schedule(self, state: TrainState) -> TrainState:
        """Return ``state`` with the end of the warm-up and the decay's batch size, so that a resume finds them."""
        ended = samples_of_warmup(self.args, self.done)
        decay_batch = -1 if self.args.optim.decay_steps is None else self.decay_batch
        return replace(state, warmup_samples=ended, decay_batch=decay_batch)

    def resolved(self) -> dict[str, Any]:
        """Return the settings with the model's sizes written out: what config.yaml holds."""
        return asdict(self.args) | {"model": asdict(self.config)}

    def fixed_metadata(self) -> dict[str, Any]:
        """Return the model and the order of the samples, which checkpoints record and a resumed run must not change."""
        data, ramp = self.args.data, self.args.data.ramp_tokens
        sources = [
            {"weight": source.weight, "fingerprint": dataset.fingerprint}
            | ({} if ramp is None else {"final_weight": source.final_weight})
            for source, dataset in zip(data.sources, self.sources, strict=True)
        ]
        order = {"version": mixture.ORDER_VERSION, "window": mixture.WINDOW}
        order_metadata = {"seed": data.seed, "order": order, "sources": sources}
        order_metadata |= {} if ramp is None else {"ramp_tokens": ramp}
        return {"data": order_metadata, "model": asdict(self.config)}

    def data_metadata(self) -> dict[str, Any]:
        """Return the order of the samples, and the fingerprints of the validation data, which a resume may change."""
        return self.fixed_metadata()["data"] | {"validation": [one.fingerprint for one in self.validation]}

    def shared_settings(self) -> dict[str, Any]:
        """Return what must be equal on all ranks, by dotted key; datasets by fingerprint, as their paths may differ."""
        settings = self.resolved()
        settings["data"] |= self.data_metadata()
        return leaves(settings | {"ops": self.ops, "torch": torch.__version__, "code": code_sha256()})

    def tokenizer_metadata(self) -> dict[str, Any]:
        """Return what a converter has to know of the tokenizer."""
        return tokenizer_of(self.sources)


def code_sha256() -> str:
    """Return the SHA-256 of the package's Python files and of the script that runs, in hexadecimal.

    A commit would not do: it does not say what was edited, and an installed package has none.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    files = {str(file.relative_to(PACKAGE)): file for file in PACKAGE.rglob("*.py")}
    if script is not None and (file := Path(script)).is_file():
        files["script"] = file
    content = (f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for name, file in sorted(files.items()))
    return hashlib.sha256("".join(content).encode()).hexdigest()


def mix(args: PretrainArgs, sources: list[PackedDataset], block_size: int, accumulation: int) -> Mixture:
    """Return the order of the samples; raises InputError if the sources hold less than one global batch."""
    num_blocks = [source.num_blocks(block_size) for source in sources]
    if sum(num_blocks) < args.train.global_batch_size:
        raise InputError(
            f"data.sources hold {sum(num_blocks)} blocks of {block_size + 1} tokens, fewer than one batch of "
            f"train.global_batch_size {args.train.global_batch_size}: give more data or "
            f"{smaller_batch(args, sum(num_blocks), block_size, accumulation)}"
        )
    ramp = -(-(args.data.ramp_tokens or 0) // block_size)  # in samples
    if ramp > MOST_RAMP:
        raise InputError(f"data.ramp_tokens {args.data.ramp_tokens} is {ramp:,} samples: lower it below {MOST_RAMP:,}")
    return Mixture(
        num_blocks,
        [source.weight for source in args.data.sources],
        args.data.seed,
        [source.fingerprint for source in sources],
        [source.final_weight for source in args.data.sources],
        ramp,
    )


def choose_ops(args: PretrainArgs, config: ModelConfig, datasets: list[PackedDataset]) -> dict[str, str]:
    """Return the backend of each operation on the device that this run will have, its library imported."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = args.train.micro_batch_size * config.block_size
    sizes = {f"model.{key}": getattr(config, key) for key in ("n_embd", "intermediate_size")}
    sizes["model.n_embd x (1 + 2 x model.n_query_groups / model.n_head)"] = config.qkv_size
    sizes["train.micro_batch_size x model.block_size"] = tokens
    if args.train.precision == "float8" and (problem := float8.problem(device, sizes)):
        raise InputError(f"train.precision float8 cannot be used: {problem}")
    for dataset in datasets if args.data.document_mask else []:
        if not dataset.eos:
            raise InputError(f"data.document_mask needs documents that end with eos: prepare {dataset.path} again so")
    masked = args.data.document_mask
    ops = choice.resolve(asdict(args.ops), config, device, precision=args.train.precision, masked=masked)
    choice.load(ops)
    return ops
