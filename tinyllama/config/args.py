"""Settings of a pretraining run, one frozen dataclass per group, and the checks across them."""

import importlib.util
import os
import reprlib
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from fractions import Fraction
from typing import Literal

from tinyllama import InputError
from tinyllama.config.bounds import (
    Count,
    CountOrZero,
    Decay,
    NotNegative,
    Positive,
    Seconds,
    Seed,
    StartTimeout,
    Weight,
    bound_errors,
)
from tinyllama.config.fields import all_optional
from tinyllama.config.model import ModelConfig, named_config


@dataclass(frozen=True)
class ModelArgs(all_optional(ModelConfig)):  # type: ignore[misc]  # mypy takes the inherited fields for Any
    """The model: a named size, and what differs from it."""

    name: str = "tinyllama_1.1b"
    """a named size, which sets every field below that is not given; or a name of your own, with all sizes given"""

    def resolve(self) -> ModelConfig:
        """Return the model's sizes, every field known; raises InputError for sizes that do not fit together."""
        return named_config(self.name, **{k: v for k, v in asdict(self).items() if k != "name" and v is not None})


@dataclass(frozen=True)
class Source:
    """A folder of packed tokens."""

    path: str
    """folder that a prepare script wrote, or one of upstream's LITPKDS chunk files"""
    weight: Weight = 1.0
    """share of the samples; shares are taken relative to their sum"""
    final_weight: Weight | None = None
    """weight at the end of data.ramp_tokens and afterwards; null: the weight does not change"""


@dataclass(frozen=True)
class ValidationSource:
    """A folder of packed tokens held out from training."""

    path: str
    """folder that a prepare script wrote"""


@dataclass(frozen=True)
class DataArgs:
    """The data: which tokens, in which order."""

    sources: list[Source] = field(default_factory=list)
    """packed datasets to train on: [{path: DIR, weight: SHARE}, ...]"""
    validation: list[ValidationSource] = field(default_factory=list)
    """packed datasets to validate on: [{path: DIR}, ...]; empty: no validation"""
    ramp_tokens: Count | None = None
    """tokens over which the shares change linearly from the weights to the final weights"""
    seed: Seed = 3407
    """seed of the order of the samples"""
    document_mask: bool = False
    """tokens attend only to their own document; upstream: false"""
    restart_positions: bool = False
    """with document_mask: positions restart at the beginning of each document"""


@dataclass(frozen=True)
class OptimArgs:
    """The optimizer and the learning rate's schedule; the defaults are upstream's."""

    name: str = "adamw"
    """adamw (arXiv:1711.05101); muon: Muon for the blocks' matrices and AdamW for the rest"""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """learning rate after the warm-up; wsd: constant, then decaying over the last optim.decay_steps"""
    lr: Positive = 4e-4
    """learning rate at the end of the warm-up"""
    min_lr: NotNegative = 4e-5
    """learning rate at the last step, which may be 0; not used by the constant schedule"""
    warmup_steps: CountOrZero = 2000
    """steps of linear warm-up"""
    decay_steps: Count | None = None
    """steps of wsd's decay, at the end of the run"""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """shape of wsd's decay: linear, or 1 - sqrt(fraction of the decay that is done)"""
    weight_decay: NotNegative = 0.1
    """weight decay of every parameter, including norms and embeddings, as upstream"""
    beta1: Decay = 0.9
    """decay of AdamW's running mean of the gradient"""
    beta2: Decay = 0.95
    """decay of AdamW's running mean of the squared gradient"""
    max_norm: Positive = 1.0
    """norm to which the gradient is clipped"""

    def state_bytes(self, config: ModelConfig) -> int:
        """Return the bytes of the optimizer state, fp32: two moments per parameter, but one for Muon's matrices."""
        return 8 * config.num_params() - (4 * config.num_hidden if self.name == "muon" else 0)

    def checkpoint_bytes(self, config: ModelConfig) -> int:
        """Return the bytes of a checkpoint: the weights in fp32, and the optimizer state."""
        return 4 * config.num_params() + self.state_bytes(config)


@dataclass(frozen=True)
class TrainArgs:
    """Training: how long, how, and from which weights."""

    max_steps: Count | None = None
    """length of the run in optimizer steps; give this, max_tokens or max_epochs"""
    max_tokens: Count | None = None
    """length of the run in tokens over all ranks, rounded up to whole steps"""
    max_epochs: Positive | None = None
    """length of the run in epochs: this times the blocks of all sources, rounded down to whole steps"""
    global_batch_size: Count = 1024
    """samples per optimizer step, over all ranks"""
    micro_batch_size: Count = 8
    """samples per forward and backward pass on one rank"""
    precision: Literal["bf16", "fp32", "float8"] = "bf16"
    """compute dtype; float8: bf16, with the blocks' matmuls in float8; master weights and reduction are fp32"""
    compile: bool | None = None
    """compile each block with torch.compile; null: only on a GPU"""
    seed: Seed = 3407
    """seed of the initial weights"""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """what a block recomputes in its backward pass: none: nothing; selective: all but the results of matmuls and
    attention; full: everything, from its input"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """what to do when a loss or gradient is not finite, which never reaches the weights: stop, or skip the step"""
    skip_spikes: Positive | None = None
    """skip steps whose loss or gradient norm is this many standard deviations above the last 128 steps' mean"""
    max_skips: Count = 10
    """number of consecutive steps that may be skipped; one more stops the run"""
    max_time: Seconds | None = None
    """seconds after which the run saves a checkpoint and exits with 75, as on a signal"""
    start_timeout: StartTimeout = 1800
    """seconds that a rank may be silent before the first step is done, and in validations and checkpoints"""
    timeout: Seconds = 300
    """seconds that a rank may be silent between steps; then the run names the rank and where it hangs, and ends"""
    resume: str = "auto"
    """auto: from the newest complete checkpoint of out_dir, if there is one; never; or the path of another run's
    checkpoint, from which this run branches off; later starts continue from its own newest checkpoint"""
    init_from: str | None = None
    """weights that a new run starts from: a Hugging Face folder, a checkpoint of this code or an upstream .pth; only
    the weights are used, and a run that has a checkpoint of its own continues from that instead"""

    def epoch_samples(self, num_blocks: int) -> int:
        """Return the samples in ``max_epochs`` epochs of ``num_blocks`` blocks; the number counts as it was written."""
        assert self.max_epochs is not None  # check() has seen to it that one budget is given
        return int(Fraction(repr(self.max_epochs)) * num_blocks)

    def compiles(self, device_type: str) -> bool:
        """Return whether blocks are compiled for ``device_type``, ``cuda`` or ``cpu``."""
        return device_type == "cuda" if self.compile is None else self.compile


@dataclass(frozen=True)
class OpsArgs:
    """The implementation of each operation; auto: the fastest available, as scripts/doctor.py lists them."""

    attention: str = "auto"
    """reference, sdpa, sdpa_cudnn, sdpa_flash, flex, flash_attn (FlashAttention-2) or flash_attn_4"""
    rope: str = "auto"
    """reference, or triton (splits and rotates the heads in one kernel)"""
    rms_norm: str = "auto"
    """reference, torch or quack (fused with the addition before it)"""
    swiglu: str = "auto"
    """reference, quack (the gate fused into the matmuls) or xformers; in float8: float8 (the gate fused with the
    casts) or reference"""
    cross_entropy: str = "auto"
    """reference, or chunked (never holds all logits at once)"""
    symmetric_matmul: str = "auto"
    """the products of Muon's iterations: reference, or quack (computes half of a symmetric product)"""


@dataclass(frozen=True)
class ParallelArgs:
    """How the model is distributed over the ranks."""

    devices: Count | None = None
    """ranks on this machine, only when started by plain python; null: one per GPU, or one on the CPU"""
    shard: Literal["full", "node", "none"] | Count = "full"
    """ranks that share one copy of the weights: full: all; node: those of a node; none: one; or this many"""
    reshard_after_forward: bool = True
    """free a block's gathered weights between forward and backward; false: keep all until the step ends, which takes
    more memory but less communication; no effect with parallel.shard none"""
    sync_every_micro_batch: bool = False
    """reduce the gradients after each micro-batch, which takes less memory but more communication; no effect with
    parallel.shard none"""

    def keeps_gathered(self, shard: int, nodes: int) -> bool:
        """Return whether weights stay gathered until a step ends (train/gathered.py); otherwise FSDP2 shards them."""
        return shard == 1 or (nodes == 1 and not (self.reshard_after_forward or self.sync_every_micro_batch))


@dataclass(frozen=True)
class EvalArgs:
    """Validation: at the start, every interval, and at the end."""

    interval: Count = 1000
    """steps between validations"""
    max_samples: Count | None = 2048
    """samples per validation over all ranks, spread evenly over the data; null: all"""
    samples: list[str] = field(default_factory=list)
    """prompts to continue greedily at each validation; the texts go to samples.jsonl; empty: none"""
    tokenizer: str | None = None
    """the file that the data was prepared with; for eval.samples"""


@dataclass(frozen=True)
class CheckpointArgs:
    """Checkpoints: every interval, on a signal, and at the end."""

    interval: Count = 5000
    """steps between checkpoints"""
    keep_last: Count | None = 3
    """number of newest checkpoints to keep; null: all"""
    keep_every: Count | None = 50000
    """keep checkpoints at multiples of this many steps forever; null: none"""
    asynchronous: bool = True
    """continue training while a checkpoint is being written"""
    on_failure: Literal["continue", "stop"] = "continue"
    """what the run does when a save fails, as on a full disk; earlier checkpoints are not touched"""


@dataclass(frozen=True)
class LogArgs:
    """The console, metrics.csv and wandb."""

    interval: Count = 10
    """steps between lines on the console and rows of metrics.csv"""
    profile: list[int] = field(default_factory=list)
    """[FROM, TO]: trace these steps (the first and the last, counted from 1) on every rank, for Perfetto"""
    wandb: Literal["off", "online", "offline"] = "off"
    """also send the metrics to wandb; offline: write them to out_dir/wandb, for `wandb sync`"""
    wandb_project: str = "tinyllama"
    """wandb project"""
    wandb_entity: str | None = None
    """wandb user or team; null: your default"""
    on_event: str | None = None
    """shell command that rank 0 runs, for 10 s at most, when the run is started, stopped, failed or finished and at an
    anomaly (a skipped step, a failed save); $TINYLLAMA_EVENT says which, $TINYLLAMA_MESSAGE and $TINYLLAMA_OUT_DIR
    the rest"""


@dataclass(frozen=True)
class PretrainArgs:
    """A pretraining run."""

    out_dir: str = "out/run"
    """folder of the run: config.yaml, metrics.csv, events.jsonl, checkpoints"""
    dry_run: bool = False
    """do everything that precedes the first step, print the plan, and write nothing"""
    model: ModelArgs = field(default_factory=ModelArgs)
    data: DataArgs = field(default_factory=DataArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    ops: OpsArgs = field(default_factory=OpsArgs)
    parallel: ParallelArgs = field(default_factory=ParallelArgs)
    eval: EvalArgs = field(default_factory=EvalArgs)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)
    log: LogArgs = field(default_factory=LogArgs)


MOST_TRACED = 20
"""Steps of a trace: one of the 1.1B makes tens of megabytes, and a browser has to open them all."""


def check(args: PretrainArgs) -> ModelConfig:
    """Check all that needs neither the data nor the other ranks; returns the model's sizes.

    Raises InputError with every error found, so that a user can fix all of them at once.
    """
    errors: list[str] = []
    model = None
    try:
        model = args.model.resolve()
    except InputError as error:
        errors += error.args
    if not args.out_dir.strip():
        errors.append("out_dir is empty: give a folder for the run")
    if args.out_dir.startswith("~"):  # which the shell leaves alone in --out_dir=~/run, and so does YAML
        errors.append(f"out_dir {args.out_dir} would be a folder of that name here: write the home folder's path out")
    if not args.data.sources:
        errors.append(
            "data.sources is empty: give a recipe, --config FILE, or a packed folder, "
            '--data.sources \'[{"path": "DIR"}]\''
        )
    for source in args.data.sources:
        last = source.weight if source.final_weight is None else source.final_weight
        if any(bound_errors(source, "")) or max(source.weight, last) == 0:
            rule = "both must be finite, none negative and one above 0"
            errors.append(f"data.sources: {source.path} has weight {source.weight}, final_weight {last}: {rule}")
    for key, given_once, paths in (
        ("data.sources", "give it once, with both weights' sum", [source.path for source in args.data.sources]),
        ("data.validation", "give it once", [source.path for source in args.data.validation]),
    ):
        folders: dict[str, str] = {}
        for path in paths:
            if (real := os.path.realpath(path)) in folders:
                errors.append(f"{key}: {path} and {folders[real]} are one folder: {given_once}")
            folders.setdefault(real, path)
    if (args.data.ramp_tokens is None) != all(source.final_weight is None for source in args.data.sources):
        errors.append("data.ramp_tokens and a final_weight of a source belong together: give both or neither")
    if args.train.init_from is not None and args.train.resume not in ("auto", "never"):
        errors.append(
            "train.init_from and a path in train.resume are both given: "
            "init_from loads weights only; resume restores the whole run. Give one."
        )
    given = [k for k in ("max_steps", "max_tokens", "max_epochs") if getattr(args.train, k) is not None]
    if len(given) != 1:
        what = " and ".join(f"train.{k}" for k in given) or "none"
        hint = f": unset one, as --train.{given[-1]} null does" if given else ""
        errors.append(
            f"one of train.max_steps, train.max_tokens and train.max_epochs must be given; given: {what}{hint}"
        )
    for group in fields(args):
        settings = getattr(args, group.name)
        if is_dataclass(settings) and not isinstance(settings, ModelArgs):  # whose bounds are those of its ModelConfig
            errors += bound_errors(settings, f"{group.name}.")
    if args.optim.min_lr > args.optim.lr > 0:
        errors.append(f"optim.min_lr {args.optim.min_lr} is greater than optim.lr {args.optim.lr}: lower it")
    if (args.optim.schedule == "wsd") != (args.optim.decay_steps is not None):
        errors.append("optim.schedule wsd and optim.decay_steps belong together: give both or neither")
    if args.data.restart_positions and not args.data.document_mask:
        errors.append("data.restart_positions is true and data.document_mask is not: set both, or neither")
    if profile := args.log.profile:
        first, last = profile if len(profile) == 2 else (0, 0)
        if not 0 < first <= last < first + MOST_TRACED:
            errors.append(
                f"log.profile {reprlib.repr(profile)} is not a range of steps: give the first and the last, counted "
                f"from 1 and at most {MOST_TRACED} in all, as in [10, 12]"
            )
    if args.eval.samples and not (args.eval.tokenizer and args.data.validation):
        errors.append("eval.samples are made at validations: give data.validation and eval.tokenizer, too")
    if args.log.wandb != "off" and importlib.util.find_spec("wandb") is None:
        errors.append("log.wandb needs wandb: pip install wandb, or give --log.wandb off")
    if errors or model is None:
        raise InputError(*errors)
    return model
