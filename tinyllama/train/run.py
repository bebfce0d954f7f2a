"""A run, resolved: what its settings and its data come to, before the first rank starts."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tinyllama import InputError
from tinyllama.checkpoint import reader
from tinyllama.checkpoint.resume import refuse_changes
from tinyllama.checkpoint.state import TrainState
from tinyllama.config.args import PretrainArgs, TrainArgs
from tinyllama.config.model import ModelConfig
from tinyllama.data import mixture
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import PackedDataset
from tinyllama.ops import choice, float8
from tinyllama.train.launch import World
from tinyllama.train.schedule import lr_at

FIRST_ORDER = {"version": 1, "window": 1024}
"""Order of the samples of a checkpoint from before its version and window were recorded."""


@dataclass(frozen=True)
class Run:
    """All that every rank knows alike."""

    args: PretrainArgs
    config: ModelConfig
    world: World
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

    def data_metadata(self) -> dict[str, Any]:
        """What fixes the model and the order of the samples: a resumed run must have the same."""
        data, ramp = self.args.data, self.args.data.ramp_tokens
        sources = [
            {"weight": source.weight, "fingerprint": dataset.fingerprint}
            | ({} if ramp is None else {"final_weight": source.final_weight})
            for source, dataset in zip(data.sources, self.sources, strict=True)
        ]
        order = {"version": mixture.ORDER_VERSION, "window": mixture.WINDOW}
        facts = {"seed": data.seed, "order": order, "sources": sources}
        return {"data": facts if ramp is None else facts | {"ramp_tokens": ramp}, "model": asdict(self.config)}

    def tokenizer_metadata(self) -> dict[str, Any]:
        """What a converter has to know of the tokenizer."""
        return {key: getattr(self.sources[0], key) for key in ("tokenizer_sha256", "bos", "bos_id", "eos_id")}


def check_resume(run: Run) -> None:
    """Raise InputError if the run cannot continue from its checkpoint: other data, another model, too few steps."""
    if run.resume is None:
        return
    saved, now = reader.read_state(run.resume), run.data_metadata()
    then = {key: saved.get(key) for key in now}
    if isinstance(then["data"], dict):
        then["data"] = {"order": FIRST_ORDER} | then["data"]
    refuse_changes(run.resume, then, now)
    if saved["step"] > run.max_steps:
        raise InputError(f"{run.resume} is beyond the run's {run.max_steps} steps: raise train.max_steps")


def load_checkpoint(run: Run, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Run, TrainState]:
    """Collective. Load the step that the run resumes from; return the run as it resumes, and where it stands.

    With train.resume auto, a damaged step is passed over for the one before it. Raises InputError if there is none.
    """
    while True:
        shared = [run.resume]
        dist.broadcast_object_list(shared)  # a file system may show ranks different newest ones
        run = replace(run, resume=shared[0])
        if run.resume is None:
            return run, TrainState()
        check_resume(run)
        try:
            return run, reader.load(run.resume, model, optimizer)
        except reader.DamagedError as error:
            if run.args.train.resume != "auto":
                raise
            folder = run.resume.parent
            earlier, _ = reader.newest(folder, before=run.resume)
            if earlier is None:
                hint = f"no step before it is complete; move {folder} away to start anew"
                raise InputError(f"{error.problem}: {hint}") from None
            if dist.get_rank() == 0:
                print(f"passed over: {error.problem}")
            run = replace(run, resume=earlier)


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


def mix(args: PretrainArgs, sources: list[PackedDataset], block_size: int) -> Mixture:
    """The order of the samples; raises InputError when the sources hold less than one global batch."""
    num_blocks = [source.num_blocks(block_size) for source in sources]
    if sum(num_blocks) < args.train.global_batch_size:
        raise InputError(
            f"data.sources hold {sum(num_blocks)} blocks of {block_size + 1} tokens, less than one batch of "
            f"train.global_batch_size {args.train.global_batch_size}: give more data or lower it"
        )
    return Mixture(
        num_blocks,
        [source.weight for source in args.data.sources],
        args.data.seed,
        [source.fingerprint for source in sources],
        [source.final_weight for source in args.data.sources],
        -(-(args.data.ramp_tokens or 0) // block_size),  # the ramp, in samples
    )


def choose_ops(args: PretrainArgs, config: ModelConfig, datasets: list[PackedDataset]) -> dict[str, str]:
    """The backend of each operation on the device that this run will have."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.train.precision == "float8" and (problem := float8.problem(device)):
        raise InputError(f"train.precision float8 cannot be used: {problem}")
    for dataset in datasets if args.data.document_mask else []:
        if not dataset.eos:
            raise InputError(f"data.document_mask needs documents that end with eos: prepare {dataset.path} again so")
    masked = args.data.document_mask
    return choice.resolve(asdict(args.ops), config, device, precision=args.train.precision, masked=masked)
