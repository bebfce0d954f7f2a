"""A run, resolved: what its settings and its data come to, before the first rank starts."""

from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tinyllama import InputError
from tinyllama.checkpoint import reader
from tinyllama.checkpoint.resume import is_of, leaves, refuse_changes, to_resume
from tinyllama.checkpoint.state import TrainState, from_json
from tinyllama.config.args import OptimArgs, PretrainArgs, TrainArgs
from tinyllama.config.model import ModelConfig
from tinyllama.data import mixture
from tinyllama.data.metadata import MANIFEST
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import PackedDataset
from tinyllama.model import GPT
from tinyllama.ops import choice, float8
from tinyllama.train.collectives import from_rank_zero
from tinyllama.train.launch import World
from tinyllama.train.samples import Samples
from tinyllama.train.schedule import lr_at

FIRST_ORDER = {"version": 1, "window": 1024}
"""Order of the samples of a checkpoint from before its version and window were recorded."""

MOST_TOKENS = 10**18
"""More are a typing error, and do not fit into 64 bits."""
MOST_RAMP = 2**31
"""Samples of a ramp, whose table takes 10 us for a thousand of them: 20 s."""


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
    ops: dict[str, str]
    """backend of each operation"""
    resume: Path | None = None
    """the step directory to go on from"""
    done: TrainState = field(default_factory=TrainState)
    """what has been done there, at whichever batch it was; everything else of a run is as its settings are today"""
    samples: Samples | None = None
    """the prompts to continue at each validation"""

    @cached_property
    def max_steps(self) -> int:
        """Steps that are done and that are left, together."""
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
        """What it starts from, in words."""
        if self.resume is not None:
            return f"resumed from {self.resume}"
        start = self.args.train.init_from
        return f"a new run of the weights of {start}" if start else "a new run"

    def lr_at(self, step: int) -> float:
        """Learning rate of the 0-based step: on one curve of the run's budget, however the batch has changed."""
        optim, ahead = self.args.optim, self.schedule_offset
        at = step if step < optim.warmup_steps else step + ahead
        decay_steps = optim.decay_steps and optim.decay_steps * self.decay_batch / self.args.train.global_batch_size
        return lr_at(at, self.max_steps + ahead, optim, decay_steps)

    @property
    def schedule_offset(self) -> int:
        """Steps by which the schedule is ahead of the run's own count.

        A budget in tokens or epochs is spent by the sample. After the warm-up, which is in steps, what was done at
        other batch sizes therefore counts as the steps of today's that it would have been.
        """
        train, done, warmup = self.args.train, self.done, self.args.optim.warmup_steps
        if train.max_steps is not None or done.step < warmup:
            return 0
        samples = done.samples - samples_of_warmup(self.args, done)
        return samples // train.global_batch_size - (done.step - warmup)

    @cached_property
    def decay_batch(self) -> float:
        """Samples of each of the steps that optim.decay_steps counts.

        They are today's, unless a budget in tokens or epochs is resumed at another batch: a decay that is under way
        stays as long as it was, and one that would have begun at today's batch begins now.
        """
        batch, decay_steps = self.args.train.global_batch_size, self.args.optim.decay_steps
        if decay_steps is None or self.args.train.max_steps is not None or self.done.decay_batch <= 0:
            return batch
        left = max(self.steps_left - 1, 1)  # from the next step to the last
        is_under_way = decay_steps * self.done.decay_batch > left * batch
        return self.done.decay_batch if is_under_way else min(batch, left * batch / decay_steps)

    def settled(self, state: TrainState) -> TrainState:
        """Return ``state`` with what fixes the schedule, so that a later resume has it and does not find it anew."""
        ended = samples_of_warmup(self.args, self.done)
        return replace(state, warmup_samples=ended, decay_batch=self.decay_batch)

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

    def facts(self) -> dict[str, Any]:
        """What all ranks must have found alike, by dotted key; packed data may lie at another path on each node."""
        settings = self.resolved()
        settings["data"] |= self.data_metadata()["data"] | {"validation": [one.fingerprint for one in self.validation]}
        return leaves(settings | {"ops": self.ops, "torch": torch.__version__})

    def tokenizer_metadata(self) -> dict[str, Any]:
        """What a converter has to know of the tokenizer."""
        return {key: getattr(self.sources[0], key) for key in ("tokenizer_sha256", "bos", "bos_id", "eos_id")}


def start_from(step_dir: Path | None, run: Run) -> Run:
    """Return the run as it starts from the checkpoint ``step_dir``, or from nothing.

    Raises InputError for an out_dir of packed data, a checkpoint that the run cannot continue, and a wrong length.
    """
    if (run.out_dir / MANIFEST).exists() or any(run.out_dir.glob("*.bin")):
        raise InputError(f"out_dir {run.out_dir} holds packed data: give the run a folder of its own")
    saved = {} if step_dir is None else reader.read_state(step_dir)
    run = replace(run, resume=step_dir, done=from_json(saved))
    if step_dir is not None:
        _check_resume(step_dir, saved, run)
    total_steps(run.args, run.config.block_size, run.num_blocks, run.done)
    if run.args.log.profile and run.args.log.profile[-1] > run.max_steps:
        raise InputError(f"log.profile {run.args.log.profile} ends after the run's {run.max_steps} steps: lower it")
    return run


def _check_resume(step_dir: Path, saved: dict[str, Any], run: Run) -> None:
    """Raise InputError for a checkpoint of other data, of another model, or beyond the run's budget."""
    now = run.data_metadata()
    then = {key: saved.get(key) for key in now}
    if isinstance(then["data"], dict):
        then["data"] = {"order": FIRST_ORDER} | then["data"]
    refuse_changes(step_dir, then, now)
    optimizer = reader.read_settings(step_dir).get("optim", {}).get("name", "adamw")
    if optimizer != run.args.optim.name:
        raise InputError(
            f"{step_dir} holds the state of optim.name {optimizer}, and this run's is {run.args.optim.name}: put it "
            "back, or give its weights as train.init_from in another out_dir"
        )
    # the last step may end beyond the budget, but not begin there
    before = run.done.samples - run.args.train.global_batch_size
    spent = {
        "steps": run.done.step - 1,
        "tokens": before * run.config.block_size,
        "epochs": Fraction(before, run.num_blocks),
    }
    for unit, amount in spent.items():
        budget = getattr(run.args.train, f"max_{unit}")
        if budget is not None and amount >= budget:
            raise InputError(f"{step_dir} is beyond the run's {budget} {unit}: raise train.max_{unit}")


def load_checkpoint(run: Run, model: GPT, optimizer: torch.optim.Optimizer) -> tuple[Run, TrainState]:
    """Collective. Load the step that the run resumes from; return the run as it resumes, and where it stands.

    It is looked for again, as another run may have saved since: call it with the run lock held. A damaged step of
    out_dir that train.resume does not name is passed over for the one before it. Raises InputError if there is none.
    """
    # on one rank, as a file system may show ranks different newest ones
    step_dir = from_rank_zero(lambda: to_resume(run.out_dir, run.args.train.resume, say=lambda line: None))
    while True:
        run = start_from(step_dir, run)
        if run.resume is None:
            return run, run.settled(TrainState())
        try:
            state = run.settled(reader.load(run.resume, model, optimizer))
            if model.scaling is not None:
                model.scaling.resume(state.float8_exponents, run.resume)
            return run, state
        except reader.DamagedError as error:
            how = run.args.train.resume
            if how != "auto" and (is_of(run.out_dir, Path(how)) or not is_of(run.out_dir, run.resume)):
                raise
            folder = run.resume.parent
            step_dir = from_rank_zero(partial(_before, run.resume))
            if step_dir is None:
                hint = f"no step before it is complete; move {folder} away to start anew"
                raise InputError(f"{error.problem}: {hint}") from None
            if dist.get_rank() == 0:
                print(f"passed over: {error.problem}")


def _before(step_dir: Path) -> Path | None:
    """Return the newest step before ``step_dir`` that looks complete."""
    return reader.newest(step_dir.parent, before=step_dir)[0]


def gradient_accumulation(train: TrainArgs, world_size: int) -> int:
    """Micro-batches a rank passes through in one step.

    Raises InputError, naming the nearest numbers that divide, when the global batch is not a whole number of them.
    """
    batch, micro_batch = train.global_batch_size, train.micro_batch_size
    unit = world_size * micro_batch
    if batch % unit == 0:
        return batch // unit
    hints = []
    most, share = batch // micro_batch, batch // world_size
    fewer, more = range(min(world_size - 1, most), 0, -1), range(world_size + 1, min(2 * world_size, most) + 1)
    if batch % micro_batch == 0 and (ranks := [*_first_divisor(most, fewer), *_first_divisor(most, more)]):
        hints.append(f"start {' or '.join(map(str, ranks))} rank{'s' * (ranks != [1])}")
    if batch % world_size == 0 and (fits := _first_divisor(share, range(min(micro_batch - 1, share), 0, -1))):
        hints.append(f"give --train.micro_batch_size {fits[0]}")
    lower = batch // unit * unit
    nearest = " or ".join(str(size) for size in (lower, lower + unit) if size)
    hints.append(f"give --train.global_batch_size {nearest}")
    raise InputError(
        f"train.global_batch_size {batch} is not a multiple of {world_size} ranks x train.micro_batch_size "
        f"{micro_batch}: {', or '.join(hints)}"
    )


def _first_divisor(total: int, numbers: range) -> list[int]:
    """Return the first of ``numbers`` that divides ``total``, if one of their first 10,000 does."""
    return [number for number in numbers[:10_000] if total % number == 0][:1]


def total_steps(args: PretrainArgs, block_size: int, num_blocks: int, done: TrainState | None = None) -> int:
    """Optimizer steps of the run, from whichever of steps, tokens and epochs was given.

    What is ``done`` counts as it was done, and what is left of tokens or epochs is divided by today's batch.
    ``num_blocks`` is the number of blocks of all sources together: an epoch is that many samples.
    Raises InputError for a run of no steps or too many, and for a warm-up or a decay that does not fit into it.
    """
    train, done = args.train, done or TrainState()
    if train.max_steps is not None:
        steps = train.max_steps
    elif train.max_tokens is not None:
        left = train.max_tokens - done.samples * block_size
        steps = done.step + max(-(-left // (train.global_batch_size * block_size)), 0)
    else:
        assert train.max_epochs is not None  # check() has seen to it that one is given
        left = int(Fraction(repr(train.max_epochs)) * num_blocks) - done.samples
        steps = done.step + max(left // train.global_batch_size, 0)
        if steps == 0:
            raise InputError(
                f"train.max_epochs {train.max_epochs} of {num_blocks:,} blocks is less than one step of "
                f"train.global_batch_size {train.global_batch_size} samples: raise the one or lower the other"
            )
    tokens = (done.samples + (steps - done.step) * train.global_batch_size) * block_size
    if tokens > MOST_TOKENS:
        raise InputError(f"{steps:,} steps make {tokens:,} tokens: lower train.global_batch_size or the run's length")
    warmup = args.optim.warmup_steps
    if done.step < warmup and steps <= warmup:
        raise InputError(
            f"optim.warmup_steps {warmup} does not end within the run's {steps} steps: lower it, as by "
            f"--optim.warmup_steps {steps // 10}, or lower train.global_batch_size for more steps of as much data"
        )
    stable_steps = steps - 1 - warmup
    batch = train.global_batch_size
    unit = done.decay_batch if done.decay_batch > 0 else batch
    if train.max_steps is None and done.step >= warmup and unit != batch:  # of the steps that decay_steps counts
        left = (steps - done.step + 1) * batch  # one more, as the budget was rounded to whole steps of either batch
        stable_steps = int((done.samples - samples_of_warmup(args, done) + left) / unit)
    if args.optim.decay_steps is not None and args.optim.decay_steps > stable_steps:
        raise InputError(
            f"optim.decay_steps {args.optim.decay_steps} is more than the {stable_steps} steps between the run's "
            "warm-up and its last step: lower it"
        )
    return steps


def samples_of_warmup(args: PretrainArgs, done: TrainState) -> int:
    """Samples seen when the warm-up ended; -1 before that.

    If it ends with the step that is done, what is recorded may be the end of another warm-up, which was shorter. If
    none is recorded, as where a warm-up has been shortened to less than is done, its steps count at the mean batch.
    """
    warmup = args.optim.warmup_steps
    if done.step <= warmup:
        return done.samples if done.step == warmup else -1
    return done.warmup_samples if done.warmup_samples >= 0 else done.samples * warmup // done.step


def mix(args: PretrainArgs, sources: list[PackedDataset], block_size: int, accumulation: int) -> Mixture:
    """The order of the samples; raises InputError when the sources hold less than one global batch."""
    num_blocks = [source.num_blocks(block_size) for source in sources]
    if sum(num_blocks) < args.train.global_batch_size:
        raise InputError(
            f"data.sources hold {sum(num_blocks)} blocks of {block_size + 1} tokens, less than one batch of "
            f"train.global_batch_size {args.train.global_batch_size}: give more data or "
            f"{_smaller_batch(args, sum(num_blocks), block_size, accumulation)}"
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


def _smaller_batch(args: PretrainArgs, num_blocks: int, block_size: int, accumulation: int) -> str:
    """Flags for some 50 steps an epoch of ``num_blocks``, or fewer, which is as few as this number of ranks can do."""
    train, warmup = args.train, args.optim.warmup_steps
    ranks = train.global_batch_size // (train.micro_batch_size * accumulation)
    if num_blocks < ranks:
        return f"start at most {num_blocks} ranks"
    micro = min(train.micro_batch_size, num_blocks // ranks)
    batch = max(num_blocks // 50 // (ranks * micro), 1) * ranks * micro
    flags = f"--train.global_batch_size {batch}"
    flags += f" --train.micro_batch_size {micro}" if micro != train.micro_batch_size else ""
    smaller = replace(args, train=replace(train, global_batch_size=batch), optim=OptimArgs(warmup_steps=0))
    steps = total_steps(smaller, block_size, num_blocks)
    return flags + (f" --optim.warmup_steps {steps // 10}" if steps <= warmup else "")


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
