"""What a run is: one frozen dataclass a group of settings, the checks across them, and what follows from them."""

import importlib.util
import math
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Literal

from tinyllama import InputError
from tinyllama.config.model import ModelConfig, named_config


@dataclass(frozen=True)
class ModelArgs:
    """The model: a named size, and what differs from it."""

    name: str = "tinyllama_1.1b"
    """named size; every field below that is not given is taken from it"""
    block_size: int | None = None
    """context length, tokens"""
    vocab_size: int | None = None
    """pieces of the tokenizer"""
    padding_multiple: int | None = None
    """the embedding and output matrices have vocab_size rows, rounded up to a multiple of this"""
    n_layer: int | None = None
    """transformer blocks"""
    n_head: int | None = None
    """query heads"""
    n_query_groups: int | None = None
    """key-value heads; each serves n_head / n_query_groups query heads"""
    n_embd: int | None = None
    """width of the residual stream"""
    intermediate_size: int | None = None
    """width of the SwiGLU product"""
    norm_eps: float | None = None
    """RMSNorm's epsilon"""
    rope_base: int | None = None
    """RoPE's base"""
    rope_condense_ratio: float | None = None
    """RoPE sees positions divided by this"""
    tie_embeddings: bool | None = None
    """the output matrix is the embedding"""

    def resolve(self) -> ModelConfig:
        """The model's sizes, every field known; raises InputError for sizes that do not fit together."""
        return named_config(self.name, **{k: v for k, v in asdict(self).items() if k != "name" and v is not None})


@dataclass(frozen=True)
class Source:
    """A folder of packed tokens."""

    path: str
    """folder that a prepare script wrote, or one of upstream's LITPKDS chunk files"""
    weight: float = 1.0
    """share of the samples; shares are taken relative to their sum"""
    final_weight: float | None = None
    """weight at the end of data.ramp_tokens and from there on; null: it stays"""


@dataclass(frozen=True)
class ValidationSource:
    """A folder of packed tokens held out from training."""

    path: str
    """folder that a prepare script wrote"""


@dataclass(frozen=True)
class DataArgs:
    """Which tokens, in which order."""

    sources: list[Source] = field(default_factory=list)
    """what to train on: [{path: DIR, weight: SHARE}, ...]"""
    validation: list[ValidationSource] = field(default_factory=list)
    """what to validate on: [{path: DIR}, ...]; empty: no validation"""
    ramp_tokens: int | None = None
    """tokens over which the shares go linearly from the weights to the final weights"""
    seed: int = 3407
    """seed of the order of the samples"""
    document_mask: bool = False
    """no token sees another document's; upstream: false"""
    restart_positions: bool = False
    """with document_mask: positions count from the beginning of each document"""


@dataclass(frozen=True)
class OptimArgs:
    """AdamW (arXiv:1711.05101) and the learning rate's warm-up and cosine."""

    lr: float = 4e-4
    """learning rate at the end of the warm-up"""
    min_lr: float = 4e-5
    """learning rate at the last step"""
    warmup_steps: int = 2000
    """steps of linear warm-up"""
    weight_decay: float = 0.1
    """decay of every parameter, norms and embeddings too, as upstream"""
    beta1: float = 0.9
    """decay of the gradient's running mean"""
    beta2: float = 0.95
    """decay of the gradient's running mean square"""
    max_norm: float = 1.0
    """the gradient is clipped to this norm"""


@dataclass(frozen=True)
class TrainArgs:
    """How much to train, and from where."""

    max_steps: int | None = None
    """optimizer steps; give this, max_tokens or max_epochs"""
    max_tokens: int | None = None
    """tokens over the whole world, rounded up to whole steps"""
    max_epochs: float | None = None
    """as many samples as all sources have blocks, times this, rounded down to whole steps"""
    global_batch_size: int = 1024
    """samples an optimizer step, over the whole world"""
    micro_batch_size: int = 8
    """samples a forward and backward pass, on one rank"""
    precision: Literal["bf16", "fp32", "float8"] = "bf16"
    """dtype of a pass; float8: bf16, but the blocks' matrix products; master weights and reduction are fp32"""
    compile: bool | None = None
    """torch.compile each block; null: on a GPU"""
    seed: int = 3407
    """seed of the weights at start"""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """what a backward pass computes again instead of keeping: nothing; all but matrix products and attention; all"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """a loss or gradient that is not finite never reaches the weights; then stop, or skip the step and go on"""
    skip_spikes: float | None = None
    """skip steps whose loss or gradient norm is this many standard deviations above the last 128 steps' mean"""
    max_skips: int = 10
    """stop when this many steps in a row were skipped"""
    max_time: float | None = None
    """seconds after which to save a checkpoint and exit with 75, as on a signal"""
    start_timeout: float = 1800
    """seconds that a rank may be silent before the first step is done, and in validations and checkpoints"""
    timeout: float = 300
    """seconds that a rank may be silent between steps; then the run says which rank and where, and ends"""
    resume: str = "auto"
    """auto: from the newest complete checkpoint of out_dir, if there is one; never; or the path of a checkpoint"""
    init_from: str | None = None
    """weights a new run starts from: a Hugging Face folder, a checkpoint of ours or an upstream .pth; nothing else of
    it is taken over, and a run that has a checkpoint of its own goes on from that"""

    def compiles(self, device_type: str) -> bool:
        """Whether blocks are compiled for ``cuda`` or ``cpu``."""
        return device_type == "cuda" if self.compile is None else self.compile


@dataclass(frozen=True)
class OpsArgs:
    """Which implementation each operation uses; scripts/doctor.py says what there is. auto: the fastest that is."""

    attention: str = "auto"
    """reference, sdpa, sdpa_cudnn, sdpa_flash, flex, flash_attn (FlashAttention-2) or flash_attn_4"""
    rms_norm: str = "auto"
    """reference, torch or quack (the addition before it inside)"""
    swiglu: str = "auto"
    """reference, quack (the gate inside the products' kernels) or xformers"""
    cross_entropy: str = "auto"
    """reference, or chunked: without the logits in full"""


SHELL_JOB_NAMES = ("bash", "interactive")
"""Names of a Slurm job that Lightning takes for a shell: it then ignores Slurm and starts its own ranks."""


@dataclass(frozen=True)
class ParallelArgs:
    """How the model is laid over the ranks."""

    devices: int | None = None
    """ranks on this machine when started by plain python; null: one a GPU, or one CPU; not for srun and torchrun"""
    shard: Literal["full", "node", "none"] | int = "full"
    """ranks that share one copy of the weights: all, those of a node, one, or this many"""
    reshard_after_forward: bool = True
    """free a block's gathered weights between forward and backward; false: more memory, less communication"""
    sync_every_micro_batch: bool = False
    """reduce the gradients after each micro-batch: less memory, more communication"""


@dataclass(frozen=True)
class EvalArgs:
    """Validation: at the start, every interval, and at the end."""

    interval: int = 1000
    """steps between validations"""
    max_samples: int | None = 2048
    """samples of a validation over the whole world, spread evenly over the data; null: all"""


@dataclass(frozen=True)
class CheckpointArgs:
    """Checkpoints: every interval, on a signal, and at the end."""

    interval: int = 5000
    """steps between checkpoints"""
    keep_last: int | None = 3
    """newest checkpoints that are kept; null: all"""
    keep_every: int | None = 50000
    """checkpoints at multiples of this many steps are kept for ever; null: none"""
    asynchronous: bool = True
    """train on while a checkpoint is being written"""
    on_failure: Literal["continue", "stop"] = "continue"
    """what a save that fails, as on a full disk, does to the run; the checkpoints before it stay as they are"""


@dataclass(frozen=True)
class LogArgs:
    """The console, metrics.csv and wandb."""

    interval: int = 10
    """steps between lines"""
    wandb: Literal["off", "online", "offline"] = "off"
    """send the metrics to wandb, too; offline: into out_dir/wandb, for `wandb sync`"""
    wandb_project: str = "tinyllama"
    """wandb's project"""
    wandb_entity: str | None = None
    """wandb's user or team; null: yours"""


@dataclass(frozen=True)
class PretrainArgs:
    """A pretraining run."""

    out_dir: str = "out/run"
    """folder of the run: config.yaml, metrics.csv, events.jsonl, checkpoints"""
    dry_run: bool = False
    """do all that comes before the first step, print the plan, and write nothing"""
    model: ModelArgs = field(default_factory=ModelArgs)
    data: DataArgs = field(default_factory=DataArgs)
    optim: OptimArgs = field(default_factory=OptimArgs)
    train: TrainArgs = field(default_factory=TrainArgs)
    ops: OpsArgs = field(default_factory=OpsArgs)
    parallel: ParallelArgs = field(default_factory=ParallelArgs)
    eval: EvalArgs = field(default_factory=EvalArgs)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)
    log: LogArgs = field(default_factory=LogArgs)


POSITIVE = (
    *("train.max_steps", "train.max_tokens", "train.max_epochs", "train.global_batch_size", "train.micro_batch_size"),
    *("train.skip_spikes", "train.max_skips", "train.max_time", "train.start_timeout", "train.timeout"),
    *("optim.lr", "optim.max_norm", "parallel.devices", "parallel.shard", "eval.interval", "eval.max_samples"),
    *("checkpoint.interval", "checkpoint.keep_last", "checkpoint.keep_every", "log.interval", "data.ramp_tokens"),
)
"""Numbers that must be greater than 0, where they are given."""


def check(args: PretrainArgs) -> ModelConfig:
    """Check all that needs neither the data nor the other ranks; returns the model's sizes.

    Raises InputError with every fault found, so that a user mends them in one go.
    """
    faults: list[str] = []
    model = None
    try:
        model = args.model.resolve()
    except InputError as error:
        faults += error.args
    if not args.data.sources:
        faults.append('data.sources is empty: give at least one packed folder, --data.sources \'[{"path": "DIR"}]\'')
    for source in args.data.sources:
        ends = (source.weight, source.weight if source.final_weight is None else source.final_weight)
        if not (all(0 <= weight < math.inf for weight in ends) and max(ends) > 0):
            faults.append(f"data.sources: {source.path} has weight {ends[0]}, at last {ends[1]}: one must be above 0")
    if (args.data.ramp_tokens is None) != all(source.final_weight is None for source in args.data.sources):
        faults.append("data.ramp_tokens and a final_weight of a source belong together: give both or neither")
    if args.train.init_from is not None and args.train.resume not in ("auto", "never"):
        faults.append(
            "train.init_from and a path in train.resume are both given: the one is for weights, the other all"
        )
    given = [k for k in ("max_steps", "max_tokens", "max_epochs") if getattr(args.train, k) is not None]
    if len(given) != 1:
        what = " and ".join(f"train.{k}" for k in given) or "none"
        faults.append(f"one of train.max_steps, train.max_tokens and train.max_epochs must be given; given: {what}")
    for key in POSITIVE:
        value = attrgetter(key)(args)
        most = 10**9 if key.endswith(("time", "timeout")) else 10**15
        if isinstance(value, int | float) and not 0 < value <= most:
            faults.append(f"{key} is {value}: it must be greater than 0" + (f", at most {most:,}" if value > 0 else ""))
    for name in ("min_lr", "weight_decay", "warmup_steps"):
        if not getattr(args.optim, name) >= 0:
            faults.append(f"optim.{name} is {getattr(args.optim, name)}: it must not be negative")
    if args.optim.min_lr > args.optim.lr:
        faults.append(f"optim.min_lr {args.optim.min_lr} is greater than optim.lr {args.optim.lr}: lower it")
    if args.data.restart_positions and not args.data.document_mask:
        faults.append("data.restart_positions is true and data.document_mask is not: set both, or neither")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(args.optim, name) < 1:
            faults.append(f"optim.{name} is {getattr(args.optim, name)}: it must be in [0, 1)")
    if args.log.wandb != "off" and importlib.util.find_spec("wandb") is None:
        faults.append("log.wandb needs wandb: pip install wandb, or give --log.wandb off")
    if faults or model is None:
        raise InputError(*faults)
    return model
