"""What a run will take on a cluster: memory by part, speed, where scaling stops, days, energy, disk. No torch needed.

The memory model counts what torch.cuda.max_memory_allocated() counts, at the peak, which is where the backward pass
begins: the optimizer's state is there, all activations are, and the gradients of the micro-batches before.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllama import InputError
from tinyllama.config.args import PretrainArgs
from tinyllama.config.model import ModelConfig
from tinyllama.throughput import flops_per_token, peak_flops

GIB = 2**30
USABLE = 0.95
"""Share of a GPU's memory that tensors can have; the rest is CUDA's context, NCCL's buffers and fragments."""
CHUNK = 8192  # tokens whose logits exist at a time, as in ops/cross_entropy.py
HOP = 3e-6  # seconds a hop of a ring takes, however little it carries
NETWORK = 0.8  # share of a network's rate that NCCL gets


@dataclass(frozen=True)
class Gpu:
    """What a kind of GPU has."""

    device: str
    """the name the driver gives, which throughput.py knows the peak of"""
    memory: float
    """GiB"""
    link: float
    """GB/s of a collective inside a node"""
    network: float
    """Gbit/s of network a GPU, usual for nodes of this kind"""
    watts: float
    """power limit"""
    mfu: float
    """share of the dense peak that is reached on few GPUs"""


GPUS = {
    "a100-40g": Gpu("NVIDIA A100-SXM4-40GB", 40, 230, 200, 400, 0.563),  # MFU: the published 24k tokens/s
    "a100-80g": Gpu("NVIDIA A100-SXM4-80GB", 80, 230, 200, 400, 0.563),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 79.6, 360, 400, 700, 0.59),  # measured, with FlashAttention-4 and quack
    "h200": Gpu("NVIDIA H200", 139.8, 360, 400, 700, 0.60),  # measured, with FlashAttention-4 and quack
    "b200": Gpu("NVIDIA B200", 178, 700, 400, 1000, 0.45),  # a guess
    "rtx-4090": Gpu("NVIDIA GeForce RTX 4090", 24, 15, 25, 450, 0.5),  # a guess; no NVLink
}


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, in nodes."""

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    network: float
    """Gbit/s a GPU"""

    def shard(self, how: str | int) -> int:
        """Ranks that share one copy of the weights, for ``parallel.shard``."""
        node = min(self.gpus, self.gpus_per_node)
        return {"full": self.gpus, "node": node, "none": 1}.get(str(how)) or int(how)

    def bandwidth(self, ranks: int, apart: int = 1) -> float:
        """Bytes a second of a ring of ``ranks``, each ``apart`` GPUs from the next: a node's link, or its network.

        The rings of a node share the network of all its GPUs; there are as many as neighbours stand apart.
        """
        if ranks * apart <= self.gpus_per_node:
            return self.gpu.link * 1e9
        of_ring = self.network * self.gpus_per_node / min(apart, self.gpus_per_node)
        return min(self.gpu.link * 1e9, NETWORK * of_ring / 8 * 1e9)


def memory(
    args: PretrainArgs, config: ModelConfig, shard: int, micro_batch: int, accumulation: int
) -> dict[str, float]:
    """Bytes on one GPU at the peak, by what they are for."""
    n, tokens = config.num_params(), micro_batch * config.block_size
    block = (n - 2 * config.padded_vocab_size * config.n_embd - config.n_embd) // config.n_layer
    root = n - config.n_layer * block
    gathered = n if not args.parallel.reshard_after_forward else root + 2 * block  # this block, and the next on its way
    parts = {"parameters (fp32)": 4 * n / shard, "optimizer (fp32)": 8 * n / shard}
    kept_back = accumulation > 1 and not args.parallel.sync_every_micro_batch
    # kept back, gradients are whole on every rank; else the reduced ones of the micro-batches before
    parts["gradients (fp32)"] = 4 * n if kept_back else 4 * n / shard if accumulation > 1 else 0
    parts["FSDP buffers"] = (2 * gathered + 6 * block) if args.train.precision != "fp32" else 4 * gathered + 4 * block
    parts["activations"] = tokens * activations(args, config)
    parts["logits"] = logits(args, config, tokens)
    return {name: float(size) for name, size in parts.items()}


def activations(args: PretrainArgs, config: ModelConfig) -> float:
    """Bytes a token leaves for the backward pass; with full checkpointing, one block's as it is done again too."""
    d, kv = config.n_embd, 2 * config.n_query_groups * config.head_size
    wide = config.intermediate_size
    width = 2 if args.train.precision != "fp32" else 4
    # the stream and its norm, twice; the fused product of q, k and v, which v is a part of, and q and k turned;
    # attention's output; SwiGLU's two products and, if its backward pass does not make it anew, what they come to
    whole = width * (7 * d + 2 * kv + (2 if args.ops.swiglu == "quack" else 3) * wide)
    if args.train.compile is False:
        whole += 4 * 4 * d + width * wide  # the norms' fp32 copies, and silu's output
    if args.train.activation_checkpointing == "full":
        return config.n_layer * width * d + whole
    if args.train.activation_checkpointing == "selective":  # the stream, and what distributed.py's SAVED names
        return config.n_layer * width * (4 * d + kv + 2 * wide) + whole
    return config.n_layer * whole


def logits(args: PretrainArgs, config: ModelConfig, tokens: int) -> float:
    """Bytes of logits and their loss for ``tokens``: in full, or what the chunked loss holds."""
    vocabulary = config.padded_vocab_size
    if args.ops.cross_entropy == "reference":
        return 12 * tokens * vocabulary  # log-softmax and two gradients in fp32
    return 2 * min(tokens, CHUNK) * vocabulary + 6 * vocabulary * config.n_embd + 2 * tokens * config.n_embd


def accumulation(args: PretrainArgs, gpus: int, micro_batch: int) -> int:
    """Micro-batches a step of ``gpus`` ranks, at least one: more ranks than samples make the batch grow."""
    return max(args.train.global_batch_size // (gpus * micro_batch), 1)


def largest_micro_batch(args: PretrainArgs, config: ModelConfig, cluster: Cluster) -> int:
    """The largest that fits and divides the batch; 0 when not even 1 does."""
    share = max(args.train.global_batch_size // cluster.gpus, 1)
    shard = cluster.shard(args.parallel.shard)
    for size in range(share, 0, -1):
        if share % size == 0:
            parts = memory(args, config, shard, size, accumulation(args, cluster.gpus, size))
            if sum(parts.values()) <= USABLE * cluster.gpu.memory * GIB:
                return size
    return 0


@dataclass(frozen=True)
class Traffic:
    """Seconds of collectives, one after the other."""

    gather: float
    """the weights, before a forward pass and, where they are resharded after it, before the backward pass"""
    reduce: float
    """the gradients, in a backward pass, over the ranks of a shard and over the copies"""


def traffic(args: PretrainArgs, config: ModelConfig, cluster: Cluster, how: str | int) -> Traffic:
    """What one gathering and one reduction take."""
    shard = cluster.shard(how)
    copies, n, units = cluster.gpus // shard, config.num_params(), config.n_layer + 1
    width = 4 if args.train.precision == "fp32" else 2
    rate, sent, hops = cluster.bandwidth(shard), (shard - 1) / shard * n, (shard - 1) * HOP * units
    over, across = cluster.bandwidth(copies, apart=shard), 2 * (copies - 1) / copies * 4 * n / shard
    reduced = 4 * sent / rate + hops + across / over + 2 * (copies - 1) * HOP * units
    return Traffic(width * sent / rate + hops, reduced)


@dataclass(frozen=True)
class Speed:
    """One step of a cluster."""

    compute: float
    """seconds"""
    communication: float
    """seconds"""
    waiting: float
    """seconds of the communication that no compute runs beside"""
    tokens_per_second: float
    """of the whole cluster"""


def speed(args: PretrainArgs, config: ModelConfig, cluster: Cluster, how: str | int, rate: float, micro: int) -> Speed:
    """A step where one GPU alone would do ``rate`` tokens a second, ``micro`` samples at a time.

    Each pass of a micro-batch hides its own collectives, at best: a third of the compute is forward.
    """
    micro_batches = accumulation(args, cluster.gpus, micro)
    tokens = cluster.gpus * micro_batches * micro * config.block_size
    compute = tokens / cluster.gpus / rate
    forward, backward = compute / micro_batches / 3, compute / micro_batches * 2 / 3
    one, reshards = traffic(args, config, cluster, how), args.parallel.reshard_after_forward
    passes = []  # each one's compute and collectives
    for number in range(micro_batches):
        reduces = number == micro_batches - 1 or args.parallel.sync_every_micro_batch
        passes.append((forward, one.gather if number == 0 or reshards else 0.0))
        passes.append((backward, (one.gather if reshards else 0.0) + (one.reduce if reduces else 0.0)))
    sent = sum(collectives for _, collectives in passes)
    waiting = sum(max(collectives - beside, 0.0) for beside, collectives in passes)
    return Speed(compute, sent, waiting, tokens / (compute + waiting))


def rate_of_one(config: ModelConfig, gpu: Gpu, mfu: float | None, benchmark: Path | None) -> tuple[float, str]:
    """Tokens per second of one GPU, and where that is from."""
    if benchmark is not None:
        try:
            lines = [json.loads(line) for line in benchmark.read_text(encoding="utf-8").splitlines() if line.strip()]
            best = max(float(line["tokens_per_second"]) for line in lines if line["model"] == config.name)
            if not best > 0:
                raise ValueError(best)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{benchmark} has no line of benchmark_step.py for {config.name}: run it with --model {config.name}"
            ) from error
        return best, f"the best in {benchmark}"
    share = gpu.mfu if mfu is None else mfu
    if not 0 < share <= 1:
        raise InputError(f"--mfu {share} must be in (0, 1]")
    peak = peak_flops(gpu.device)
    assert peak is not None  # a test goes through the table
    return share * peak / flops_per_token(config), f"an MFU of {share:.1%}"


def card(args: PretrainArgs, config: ModelConfig, cluster: Cluster, rate: float, source: str) -> Iterator[str]:
    """The plan of one cluster, line by line."""
    shard, micro, gpu = cluster.shard(args.parallel.shard), args.train.micro_batch_size, cluster.gpu
    micro_batches = accumulation(args, cluster.gpus, micro)
    yield f"model      {config.name}: {config.num_params():,} parameters, context {config.block_size:,}"
    nodes = -(-cluster.gpus // cluster.gpus_per_node)
    yield f"cluster    {cluster.gpus} x {gpu.device}, {nodes} nodes, {cluster.network:g} Gbit/s a GPU"
    parts = memory(args, config, shard, micro, micro_batches)
    for name, size in parts.items():
        yield f"memory     {size / GIB:8.2f} GiB  {name}"
    total, room = sum(parts.values()) / GIB, USABLE * gpu.memory
    verdict = "fits" if total <= room else "DOES NOT FIT"
    yield f"memory     {total:8.2f} GiB  in all at train.micro_batch_size {micro}: {verdict} in {room:.1f} GiB"
    largest = largest_micro_batch(args, config, cluster)
    if largest:
        steps = accumulation(args, cluster.gpus, largest)
        yield f"           largest micro-batch that fits and divides the batch: {largest}, {steps} of them a step"
    else:
        yield "           none fits: shard over more GPUs, or --train.activation_checkpointing full"
    now = speed(args, config, cluster, args.parallel.shard, rate, micro)
    of_one = now.tokens_per_second / cluster.gpus
    yield f"speed      {now.tokens_per_second:,.0f} tokens/s, {of_one:,.0f} a GPU ({source})"
    yield (
        f"step       {now.compute + now.waiting:.2f} s: compute {now.compute:.2f} s; communication "
        f"{now.communication:.2f} s, of which {now.waiting:.2f} s are waited for"
    )
    tokens = total_tokens(args, config)
    if tokens:
        hours = tokens / now.tokens_per_second / 3600
        yield f"time       {hours / 24:,.1f} days, {hours * cluster.gpus:,.0f} GPU-hours for {tokens:,} tokens"
        yield f"energy     {hours * cluster.gpus * gpu.watts / 1e6:,.2f} MWh of the GPUs at {gpu.watts:.0f} W"
        yield f"data       {2 * tokens / 1e12:,.3f} TB read, {2 * now.tokens_per_second / 1e6:,.1f} MB/s"
    size = config.checkpoint_bytes / 1e9
    yield f"checkpoint {size:,.2f} GB each; at 2 GB/s {size / 2:,.1f} s to write, in the background"


def total_tokens(args: PretrainArgs, config: ModelConfig) -> int | None:
    """Tokens of the run, where the settings alone tell."""
    if args.train.max_tokens is not None:
        return args.train.max_tokens
    steps = args.train.max_steps
    return None if steps is None else steps * args.train.global_batch_size * config.block_size


def scaling(args: PretrainArgs, config: ModelConfig, cluster: Cluster, rate: float) -> Iterator[str]:
    """Where scaling stops: a table with its curves, for weights sharded over all GPUs and over those of a node."""
    batch, total = args.train.global_batch_size, total_tokens(args, config)
    yield f"       {'weights sharded over all GPUs':<37} {'over a node, a copy on each':<36}".rstrip()
    yield "  GPUs" + f"   tokens/s {'days' if total else '':>6}  {'of perfect scaling':<17}" * 2
    sizes = (cluster.gpus_per_node * 2**power for power in range(13))
    for gpus in (size for size in sizes if 8 <= size <= 4096):
        many = Cluster(cluster.gpu, gpus, cluster.gpus_per_node, cluster.network)
        micro = min(args.train.micro_batch_size, max(batch // gpus, 1))
        line = f"{gpus:>6}"
        for how in ("full", "node"):
            found = speed(args, config, many, how, rate, micro).tokens_per_second
            share = found / (gpus * rate)
            days = f"{total / found / 86400:,.1f}" if total else ""
            line += f" {found:>10,.0f} {days:>6}  {bar(share, 12):<12} {share:>4.0%}"
        yield line
    if batch < 4096:
        yield f"Above {batch:,} GPUs the batch grows, to a sample a GPU."
    yield "Not counted: many GPUs have small micro-batches, which compute at a lower MFU."


def bar(share: float, width: int) -> str:
    """``share`` of ``width`` characters, to an eighth of one."""
    full, rest = divmod(round(share * width * 8), 8)
    return "█" * full + ("", *"▏▎▍▌▋▊▉")[rest]
