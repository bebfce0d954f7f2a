"""Estimate what a run takes on a cluster: memory by part, speed, limits of scaling, days, energy, disk; without torch.

The memory model predicts the peak of torch.cuda.max_memory_allocated(). The peak is where the backward pass begins:
the optimizer's state, all activations and the gradients of earlier micro-batches exist then.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllama import InputError
from tinyllama.config.args import PretrainArgs
from tinyllama.config.model import LOGITS_CHUNK, ModelConfig
from tinyllama.throughput import flops_per_token, peak_flops

GIB = 2**30
USABLE = 0.95
"""share of a GPU's memory that tensors can use; CUDA's context, NCCL's buffers and fragmentation take the rest"""
HOP_SECONDS = 3e-6  # latency of a hop of a ring, however little it carries
NETWORK = 0.8  # share of a network's rate that NCCL reaches


@dataclass(frozen=True)
class Gpu:
    """Describe a kind of GPU."""

    device: str
    """the driver's name for it, by which throughput.py knows its peak"""
    memory: float
    """GiB"""
    link: float
    """GB/s of a collective inside a node"""
    network: float
    """Gbit/s of network per GPU, usual for nodes of this kind"""
    watts: float
    """power limit"""
    mfu: float
    """share of the dense peak that a few GPUs reach"""


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
    """Describe nodes with GPUs of one kind."""

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    network: float
    """Gbit/s per GPU"""

    def shard(self, how: str | int) -> int:
        """Return how many ranks share one copy of the weights, for ``parallel.shard``."""
        node = min(self.gpus, self.gpus_per_node)
        return {"full": self.gpus, "node": node, "none": 1}.get(str(how)) or int(how)

    def bandwidth(self, ranks: int, apart: int = 1) -> float:
        """Return the bytes/s of a ring of ``ranks``, each ``apart`` GPUs from the next: a node's link, or its network.

        The rings of a node share the network of all its GPUs; there are ``apart`` rings in a node.
        """
        if ranks * apart <= self.gpus_per_node:
            return self.gpu.link * 1e9
        rings_per_node = min(apart, self.gpus_per_node)
        ring_gbit_per_s = self.network * self.gpus_per_node / rings_per_node
        return min(self.gpu.link * 1e9, NETWORK * ring_gbit_per_s / 8 * 1e9)


def memory(
    args: PretrainArgs, config: ModelConfig, shard: int, micro_batch: int, accumulation: int
) -> dict[str, float]:
    """Return the bytes on one GPU at the peak, by purpose."""
    n, tokens = config.num_params(), micro_batch * config.block_size
    block = (n - 2 * config.padded_vocab_size * config.n_embd - config.n_embd) // config.n_layer
    root = n - config.n_layer * block
    gathered = n if not args.parallel.reshard_after_forward else root + 2 * block  # this block and the prefetched one
    parts = {"parameters (fp32)": 4 * n / shard, "optimizer (fp32)": 8 * n / shard}
    kept_back = accumulation > 1 and not args.parallel.sync_every_micro_batch
    # without a reduction, every rank keeps full gradients; else its shard of the earlier micro-batches' gradients
    parts["gradients (fp32)"] = 4 * n if kept_back else 4 * n / shard if accumulation > 1 else 0
    parts["FSDP buffers"] = (2 * gathered + 6 * block) if args.train.precision != "fp32" else 4 * gathered + 4 * block
    parts["activations"] = tokens * activations(args, config)
    parts["logits"] = logits(args, config, tokens)
    return {name: float(size) for name, size in parts.items()}


def activations(args: PretrainArgs, config: ModelConfig) -> float:
    """Return the bytes that the forward pass saves per token; full checkpointing adds those of one recomputed block."""
    d, kv = config.n_embd, 2 * config.n_query_groups * config.head_size
    wide = config.intermediate_size
    width = 2 if args.train.precision != "fp32" else 4
    # the residual stream and its norm, twice; the fused matmul of q, k and v (v is a view of it), the rotated q and k;
    # attention's output; SwiGLU's two matmuls and, unless its backward pass recomputes it, their gated product
    whole = width * (7 * d + 2 * kv + (2 if args.ops.swiglu == "quack" else 3) * wide)
    if args.train.compile is False:
        whole += 4 * 4 * d + width * wide  # the norms' fp32 copies, and silu's output
    if args.train.activation_checkpointing == "full":
        return config.n_layer * width * d + whole
    if args.train.activation_checkpointing == "selective":  # the residual stream, and SAVED of train/parallel.py
        return config.n_layer * width * (4 * d + kv + 2 * wide) + whole
    return config.n_layer * whole


def logits(args: PretrainArgs, config: ModelConfig, tokens: int) -> float:
    """Return the bytes of the logits and their loss for ``tokens``, in full or as the chunked loss holds them."""
    vocabulary = config.padded_vocab_size
    if args.ops.cross_entropy == "reference":
        return 12 * tokens * vocabulary  # log-softmax and two gradients in fp32
    return 2 * min(tokens, LOGITS_CHUNK) * vocabulary + 6 * vocabulary * config.n_embd + 2 * tokens * config.n_embd


def accumulation(args: PretrainArgs, gpus: int, micro_batch: int) -> int:
    """Return the micro-batches per step of ``gpus`` ranks; at least 1: more ranks than samples grow the batch."""
    return max(args.train.global_batch_size // (gpus * micro_batch), 1)


def largest_micro_batch(args: PretrainArgs, config: ModelConfig, cluster: Cluster) -> int:
    """Return the largest micro-batch that fits and divides the batch; 0 when not even 1 does."""
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
    """Hold the seconds of the collectives."""

    gather: float
    """all-gather of the weights: before a forward pass and, if they are resharded after it, before the backward pass"""
    reduce: float
    """reduction of the gradients in a backward pass, over the ranks of a shard and over the copies"""


def traffic(args: PretrainArgs, config: ModelConfig, cluster: Cluster, how: str | int) -> Traffic:
    """Return the seconds of one all-gather of the weights and of one reduction of the gradients.

    The formulas are those of NCCL's ring algorithms. Of S bytes over a ring of r ranks, an all-gather or a
    reduce-scatter sends (r - 1) / r S bytes per rank in r - 1 hops, an all-reduce twice that (github.com/NVIDIA/
    nccl-tests, doc/PERFORMANCE.md).
    """
    shard = cluster.shard(how)
    copies = cluster.gpus // shard
    units = config.n_layer + 1  # FSDP's: each has its own collectives
    weight_bytes = (4 if args.train.precision == "fp32" else 2) * config.num_params()
    gradient_bytes = 4 * config.num_params()  # always reduced in fp32

    ring_bytes_per_s = cluster.bandwidth(shard)
    ring_latency_s = (shard - 1) * HOP_SECONDS * units
    gather_bytes = (shard - 1) / shard * weight_bytes
    scatter_bytes = (shard - 1) / shard * gradient_bytes
    gather_s = gather_bytes / ring_bytes_per_s + ring_latency_s
    scatter_s = scatter_bytes / ring_bytes_per_s + ring_latency_s

    # the copies all-reduce their shards of the gradients
    copies_bytes_per_s = cluster.bandwidth(copies, apart=shard)
    copies_latency_s = 2 * (copies - 1) * HOP_SECONDS * units
    copies_bytes = 2 * (copies - 1) / copies * gradient_bytes / shard
    all_reduce_s = copies_bytes / copies_bytes_per_s + copies_latency_s
    return Traffic(gather_s, scatter_s + all_reduce_s)


@dataclass(frozen=True)
class Speed:
    """Hold the figures of one step of a cluster."""

    compute: float
    """seconds"""
    communication: float
    """seconds"""
    waiting: float
    """seconds of the communication that no compute overlaps"""
    tokens_per_second: float
    """of the whole cluster"""


def speed(args: PretrainArgs, config: ModelConfig, cluster: Cluster, how: str | int, rate: float, micro: int) -> Speed:
    """Estimate a step where one GPU alone computes ``rate`` tokens a second, ``micro`` samples at a time.

    Each pass of a micro-batch overlaps its own collectives, at best. The backward pass computes twice as much as the
    forward pass: it multiplies for the gradients of inputs and of weights (arXiv:2001.08361, section 2.1).
    """
    micro_batches = accumulation(args, cluster.gpus, micro)
    tokens = cluster.gpus * micro_batches * micro * config.block_size
    compute_s = tokens / cluster.gpus / rate
    forward_s = compute_s / micro_batches / 3
    backward_s = compute_s / micro_batches * 2 / 3
    collective = traffic(args, config, cluster, how)
    reshards = args.parallel.reshard_after_forward
    passes = []  # compute and communication of each pass, in seconds
    for number in range(micro_batches):
        gathers = number == 0 or reshards
        reduces = number == micro_batches - 1 or args.parallel.sync_every_micro_batch
        passes.append((forward_s, collective.gather * gathers))
        passes.append((backward_s, collective.gather * reshards + collective.reduce * reduces))
    communication_s = sum(pass_communication_s for _, pass_communication_s in passes)
    waiting_s = sum(max(pass_communication_s - pass_compute_s, 0.0) for pass_compute_s, pass_communication_s in passes)
    return Speed(compute_s, communication_s, waiting_s, tokens / (compute_s + waiting_s))


def rate_of_one(config: ModelConfig, gpu: Gpu, mfu: float | None, benchmark: Path | None) -> tuple[float, str]:
    """Return the tokens per second of one GPU, and the source of that figure."""
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
    assert peak is not None  # a test checks every GPU of the table
    return share * peak / flops_per_token(config), f"an MFU of {share:.1%}"


def card(args: PretrainArgs, config: ModelConfig, cluster: Cluster, rate: float, source: str) -> Iterator[str]:
    """Yield the lines of the plan of one cluster."""
    shard, micro, gpu = cluster.shard(args.parallel.shard), args.train.micro_batch_size, cluster.gpu
    micro_batches = accumulation(args, cluster.gpus, micro)
    yield f"model      {config.name}: {config.num_params():,} parameters, context {config.block_size:,}"
    nodes = -(-cluster.gpus // cluster.gpus_per_node)
    yield f"cluster    {cluster.gpus} x {gpu.device}, {nodes} nodes, {cluster.network:g} Gbit/s a GPU"
    parts = memory(args, config, shard, micro, micro_batches)
    for name, size in parts.items():
        yield f"memory     {size / GIB:8.2f} GiB  {name}"
    total, room = sum(parts.values()) / GIB, USABLE * gpu.memory
    fits = "fits" if total <= room else "DOES NOT FIT"
    yield f"memory     {total:8.2f} GiB  in all at train.micro_batch_size {micro}: {fits} in {room:.1f} GiB"
    largest = largest_micro_batch(args, config, cluster)
    if largest:
        steps = accumulation(args, cluster.gpus, largest)
        yield f"           largest micro-batch that fits and divides the batch: {largest}, {steps} of them a step"
    else:
        yield "           none fits: shard over more GPUs, or --train.activation_checkpointing full"
    step = speed(args, config, cluster, args.parallel.shard, rate, micro)
    tokens_per_second_per_gpu = step.tokens_per_second / cluster.gpus
    yield f"speed      {step.tokens_per_second:,.0f} tokens/s, {tokens_per_second_per_gpu:,.0f} a GPU ({source})"
    yield (
        f"step       {step.compute + step.waiting:.2f} s: compute {step.compute:.2f} s; communication "
        f"{step.communication:.2f} s, of which {step.waiting:.2f} s are waited for"
    )
    tokens = total_tokens(args, config)
    if tokens:
        hours = tokens / step.tokens_per_second / 3600
        yield f"time       {hours / 24:,.1f} days, {hours * cluster.gpus:,.0f} GPU-hours for {tokens:,} tokens"
        yield f"energy     {hours * cluster.gpus * gpu.watts / 1e6:,.2f} MWh of the GPUs at {gpu.watts:.0f} W"
        yield f"data       {2 * tokens / 1e12:,.3f} TB read, {2 * step.tokens_per_second / 1e6:,.1f} MB/s"
    size = config.checkpoint_bytes / 1e9
    yield f"checkpoint {size:,.2f} GB each; at 2 GB/s {size / 2:,.1f} s to write, in the background"


def total_tokens(args: PretrainArgs, config: ModelConfig) -> int | None:
    """Return the tokens of the run, or None where they depend on the data."""
    if args.train.max_tokens is not None:
        return args.train.max_tokens
    steps = args.train.max_steps
    return None if steps is None else steps * args.train.global_batch_size * config.block_size


def scaling(args: PretrainArgs, config: ModelConfig, cluster: Cluster, rate: float) -> Iterator[str]:
    """Yield a table that shows where scaling stops, for weights sharded over all GPUs and over those of a node."""
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
    """Draw ``share`` as a bar of up to ``width`` characters, to an eighth of one."""
    full, rest = divmod(round(share * width * 8), 8)
    return "█" * full + ("", *"▏▎▍▌▋▊▉")[rest]
