"""Estimate what a run takes on a cluster: memory by part, speed, limits of scaling, days, energy, disk; without torch.

The memory model predicts the peak of torch.cuda.max_memory_allocated(). The peak is where the backward pass begins:
the optimizer's state, all activations and the gradients of earlier micro-batches exist then.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tinyllama import InputError, byte_size
from tinyllama.config import cli
from tinyllama.config.args import CheckpointArgs, PretrainArgs
from tinyllama.config.model import LOGITS_CHUNK, ModelConfig
from tinyllama.data.metadata import DTYPES, dtype_of
from tinyllama.data.packed import open_all
from tinyllama.throughput import flops_per_token, newton_schulz_flops, peak_flops, seconds, time_unit

GIB = 2**30
USABLE = 0.95
"""share of a GPU's memory that tensors can use; CUDA's context, NCCL's buffers and fragmentation take the rest"""
HOP_SECONDS = 3e-6  # latency of a hop of a ring, however little it carries
NETWORK = 0.8  # share of a network's rate that NCCL reaches
MUON_MFU = 0.57  # share of the dense peak that Muon's matmuls reach: 560 to 590 TFLOP/s, measured on an H100


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU."""

    device: str  # the driver's name for it, by which throughput.py knows its peak
    memory: float  # GiB
    link: float  # GB/s of a collective inside a node
    network: float  # Gbit/s of network per GPU, usual for nodes of this kind
    watts: float  # power limit
    mfu: float  # share of the dense peak that a few GPUs reach


GPUS = {
    "a100-40g": Gpu("NVIDIA A100-SXM4-40GB", 40, 230, 200, 400, 0.563),  # MFU: the published 24k tokens/s
    "a100-80g": Gpu("NVIDIA A100-SXM4-80GB", 80, 230, 200, 400, 0.563),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 79.6, 360, 400, 700, 0.59),  # measured, with FlashAttention-4 and quack
    "h200": Gpu("NVIDIA H200", 139.8, 360, 400, 700, 0.62),  # measured, with FlashAttention-4 and quack
    "b200": Gpu("NVIDIA B200", 178, 700, 400, 1000, 0.45),  # a guess
    "rtx-4090": Gpu("NVIDIA GeForce RTX 4090", 24, 15, 25, 450, 0.5),  # a guess; no NVLink
}


@dataclass(frozen=True)
class Cluster:
    """A cluster of nodes with GPUs of one kind."""

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    network: float  # Gbit/s per GPU

    @property
    def nodes(self) -> int:
        """Return how many nodes have so many GPUs."""
        return -(-self.gpus // self.gpus_per_node)

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
    args: PretrainArgs, config: ModelConfig, shard: int, micro_batch: int, accumulation: int, nodes: int = 1
) -> dict[str, float]:
    """Return the bytes on one GPU at the peak, by purpose."""
    params, tokens = config.num_params(), micro_batch * config.block_size
    block = config.n_embd * (config.qkv_size + config.n_embd + 3 * config.intermediate_size + 2)
    outside_blocks = params - config.n_layer * block
    width = 4 if args.train.precision == "fp32" else 2
    if args.parallel.keeps_gathered(shard, nodes):  # and the sums of the gradients, both at all times
        gradients, buffers = 4.0 * params, width * params
    else:
        # resharded, only this block and the prefetched one are gathered
        gathered = outside_blocks + 2 * block if args.parallel.reshard_after_forward else params
        buffers = width * gathered + (4 if args.train.precision == "fp32" else 6) * block
        # those of earlier micro-batches, whole until they are reduced; the last come into being as activations go
        gradients = 4 * params / (shard if args.parallel.sync_every_micro_batch else 1)
        gradients = gradients if accumulation > 1 else 0.0
    return {
        "parameters (fp32)": 4 * params / shard,
        "optimizer (fp32)": args.optim.state_bytes(config) / shard,
        "gradients (fp32)": gradients,
        "gathered weights": buffers,
        "activations": tokens * activations(args, config),
        "logits": logits(args, config, tokens),
    }


def activations(args: PretrainArgs, config: ModelConfig) -> int:
    """Return the bytes that the forward pass saves per token; full checkpointing adds those of one recomputed block."""
    d, wide, kv = config.n_embd, config.intermediate_size, 2 * config.n_query_groups * config.head_size
    width = 4 if args.train.precision == "fp32" else 2
    # the residual stream and its norm, twice; q, k and v; attention's output; SwiGLU's two matmuls and, unless its
    # backward pass recomputes it, their gated product
    in_float8 = args.train.precision == "float8" and args.ops.swiglu in ("auto", "float8")
    block = width * (6 * d + kv + (2 if in_float8 or args.ops.swiglu == "quack" else 3) * wide)
    if width == 4 or args.ops.rope == "reference":
        block += width * (d + kv)  # q and k before they are rotated, in one tensor with v
    if args.train.compile is False:
        block += 4 * 4 * d + width * wide  # the norms' fp32 copies, and silu's output
    if in_float8:
        block -= 2 * d  # of the norms' results, what the backward pass needs is in 8 bits
    kept = {
        "none": config.n_layer * block,
        # residual stream and what parallel.saved() names
        "selective": config.n_layer * (width * (4 * d + kv + 2 * wide) + 2 * d * in_float8) + block,
        "full": config.n_layer * width * d + block,
    }
    return kept[args.train.activation_checkpointing]


def logits(args: PretrainArgs, config: ModelConfig, tokens: int) -> int:
    """Return the bytes of the logits and their loss for ``tokens``, in full or as the chunked loss holds them."""
    vocabulary, d = config.padded_vocab_size, config.n_embd
    if args.ops.cross_entropy == "reference":
        return 12 * tokens * vocabulary  # log-softmax and two gradients in fp32
    return 2 * min(tokens, LOGITS_CHUNK) * vocabulary + 6 * vocabulary * d + 2 * tokens * d


def accumulation(args: PretrainArgs, gpus: int, micro_batch: int) -> int:
    """Return the micro-batches per step of ``gpus`` ranks; at least 1: more ranks than samples grow the batch."""
    return max(args.train.global_batch_size // (gpus * micro_batch), 1)


def largest_micro_batch(args: PretrainArgs, config: ModelConfig, cluster: Cluster) -> int:
    """Return the largest micro-batch that fits and divides the batch; 0 when not even 1 does."""
    samples_per_gpu = max(args.train.global_batch_size // cluster.gpus, 1)
    shard, room = cluster.shard(args.parallel.shard), USABLE * cluster.gpu.memory * GIB
    most = int(room / (config.block_size * activations(args, config)))  # samples, if nothing else took memory
    for size in range(min(samples_per_gpu, most), 0, -1):
        if samples_per_gpu % size == 0:
            parts = memory(args, config, shard, size, accumulation(args, cluster.gpus, size), cluster.nodes)
            if sum(parts.values()) <= room:
                return size
    return 0


class Traffic(NamedTuple):
    """Seconds of the collectives."""

    gather: float
    """all-gather of the weights: before a forward pass and, if they are resharded after it, before the backward pass"""
    reduce: float
    """reduction of the gradients in a backward pass, over the ranks of a replica and over the replicas"""


def traffic(args: PretrainArgs, config: ModelConfig, cluster: Cluster, how: str | int) -> Traffic:
    """Return the seconds of one all-gather of the weights and of one reduction of the gradients.

    In NCCL's ring algorithms each of r ranks sends (r - 1) / r of the bytes in r - 1 hops for an all-gather or a
    reduce-scatter, and twice that for an all-reduce (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md).
    """
    shard = cluster.shard(how)
    replicas = cluster.gpus // shard
    weight_bytes = (4 if args.train.precision == "fp32" else 2) * config.num_params()
    gradient_bytes = 4 * config.num_params()  # always reduced in fp32

    def ring_s(ranks: int, size_bytes: float, bytes_per_s: float) -> float:
        hops = (ranks - 1) * (config.n_layer + 1)  # each block has its own collectives, and so has the rest
        return (ranks - 1) / ranks * size_bytes / bytes_per_s + hops * HOP_SECONDS

    gather_s = ring_s(shard, weight_bytes, cluster.bandwidth(shard))
    scatter_s = ring_s(shard, gradient_bytes, cluster.bandwidth(shard))
    all_reduce_s = 2 * ring_s(replicas, gradient_bytes / shard, cluster.bandwidth(replicas, apart=shard))
    return Traffic(gather_s, scatter_s + all_reduce_s)


class Muon(NamedTuple):
    """Seconds that an optimizer step takes longer with Muon than with AdamW."""

    iterations: float
    exchange: float
    """sending shards of the matrices to their owners, and the updates back"""


def muon(args: PretrainArgs, config: ModelConfig, cluster: Cluster, how: str | int) -> Muon:
    """Return the seconds that Muon adds to a step, none of which anything overlaps.

    The iterations of each hidden matrix are computed once in the world, by the rank that owns it, and a rank with one
    matrix takes as long as that takes: max(sum / ranks, largest) / (MUON_MFU x peak), of ``newton_schulz_flops``.

    For the exchange, the matrices are divided over the replicas of the model. A replica's r ranks send (r - 1) / r of
    its h / replicas hidden parameters to their owners and as many back; then each shard's updates are gathered over the
    replicas. The rest of the step reads and writes as many bytes as AdamW's, and is not counted. Measured for the 1.1B:
    87 ms more than AdamW on one H100, of which iterations 73; with quack's symmetric products 55, and 36 on two H200s.
    """
    if args.optim.name != "muon":
        return Muon(0.0, 0.0)
    d, wide, kv = config.n_embd, config.intermediate_size, config.n_query_groups * config.head_size
    fused = newton_schulz_flops(d, d) + 2 * newton_schulz_flops(kv, d)  # q, k and v have one owner
    matrices = [fused, newton_schulz_flops(d, d), *3 * [newton_schulz_flops(wide, d)]]
    busiest = max(config.n_layer * sum(matrices) / cluster.gpus, max(matrices))
    peak = peak_flops(cluster.gpu.device)
    assert peak is not None  # a test checks every GPU of the table

    shard = cluster.shard(how)
    replicas = cluster.gpus // shard
    shard_bytes = (4 if args.train.precision == "fp32" else 2) * config.num_hidden / shard
    near = min(shard, cluster.gpus_per_node)  # ranks of a node, whose link all-to-all shares; the others by the network
    per_rank = shard_bytes / replicas / shard
    to_owners_s = per_rank * (near - 1) / (cluster.gpu.link * 1e9)
    to_owners_s += per_rank * (shard - near) / (NETWORK * cluster.network / 8 * 1e9)
    to_replicas_s = (replicas - 1) / replicas * shard_bytes / cluster.bandwidth(replicas, apart=shard)
    hops = 2 * (shard - 1) + replicas - 1
    return Muon(busiest / (MUON_MFU * peak), 2 * to_owners_s + to_replicas_s + hops * HOP_SECONDS)


class Speed(NamedTuple):
    """Figures of one step on a cluster."""

    compute: float  # seconds
    communication: float  # seconds
    waiting: float  # seconds of the communication that no compute overlaps
    muon: Muon
    tokens_per_second: float  # of the whole cluster


def speed(args: PretrainArgs, config: ModelConfig, cluster: Cluster, how: str | int, rate: float, micro: int) -> Speed:
    """Estimate a step where one GPU alone computes ``rate`` tokens a second with AdamW, ``micro`` samples at a time.

    Each pass of a micro-batch overlaps its own collectives, at best; in one node, whoever keeps the gathered weights
    waits for them (train/gathered.py). The backward pass computes twice as much as the forward pass: it multiplies for
    the gradients of inputs and of weights (arXiv:2001.08361, section 2.1).
    """
    micro_batches = accumulation(args, cluster.gpus, micro)
    micro_batch_s = micro * config.block_size / rate
    gather_s, reduce_s = traffic(args, config, cluster, how)
    reshards = args.parallel.reshard_after_forward
    gathered = args.parallel.keeps_gathered(cluster.shard(how), cluster.nodes)
    overlaps = cluster.nodes > 1 or not gathered
    syncs = args.parallel.sync_every_micro_batch and not gathered
    communication_s = waiting_s = 0.0
    last = micro_batches - 1
    alike = {1: max(last - 1, 0), 0: 1, last: 1}  # 1: all between 0 and last; where keys are equal, the later counts
    for number, count in alike.items():
        gathers = reshards or number == 0
        reduces = syncs or number == last
        forward_s, backward_s = gather_s * gathers, gather_s * reshards + reduce_s * reduces
        communication_s += count * (forward_s + backward_s)
        forward_hides_s, backward_hides_s = micro_batch_s / 3 * overlaps, micro_batch_s * 2 / 3 * overlaps
        waiting_s += count * (max(forward_s - forward_hides_s, 0) + max(backward_s - backward_hides_s, 0))
    compute_s = micro_batches * micro_batch_s
    tokens = cluster.gpus * micro_batches * micro * config.block_size
    update = muon(args, config, cluster, how)
    return Speed(compute_s, communication_s, waiting_s, update, tokens / (compute_s + waiting_s + sum(update)))


def rate_of_one(
    args: PretrainArgs, config: ModelConfig, gpu: Gpu, mfu: float | None, benchmark: Path | None
) -> tuple[float, str]:
    """Return the tokens per second of one GPU with AdamW, and the source of that figure."""
    if benchmark is not None:
        precision = args.train.precision
        try:
            lines = [json.loads(line) for line in cli.read_text(benchmark).splitlines() if line.strip()]
            best = max(
                float(line["tokens_per_second"])
                for line in lines
                if str(line["run"]).partition(":")[0] == "ours"
                and (line["model"], line["gpus"], line["precision"]) == (config.name, 1, precision)
                and line.get("optim.name", "adamw") == "adamw"  # Muon's time is added by ``speed``
            )
            if not 1 <= best <= 10**9:  # no GPU's
                raise ValueError(best)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--benchmark {benchmark} has no line of benchmark_step.py for {config.name} in {precision} with AdamW "
                f"on one GPU, by this code: add what it prints with --model {config.name} "
                f"--run ours:train.precision={precision}"
            ) from error
        return best, f"the best in {benchmark}"
    share = gpu.mfu if mfu is None else mfu
    if not 0.0001 <= share <= 1:
        raise InputError(f"--mfu {share} must be in [0.0001, 1]")
    peak = peak_flops(gpu.device)
    assert peak is not None  # a test checks every GPU of the table
    return share * peak / flops_per_token(config), f"an MFU of {share:.1%}"


def summary(args: PretrainArgs, config: ModelConfig, cluster: Cluster, rate: float, source: str) -> Iterator[str]:
    """Yield the lines of the plan of one cluster."""
    gpu, gpus, micro = cluster.gpu, cluster.gpus, args.train.micro_batch_size
    yield f"model      {config.name}: {config.num_params():,} parameters, context {config.block_size:,}"
    where = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    yield f"cluster    {gpus} x {gpu.device}, {where}, {cluster.network:g} Gbit/s a GPU"
    each_step = accumulation(args, gpus, micro)
    parts = memory(args, config, cluster.shard(args.parallel.shard), micro, each_step, cluster.nodes)
    total, room = sum(parts.values()), USABLE * gpu.memory
    scale, unit = (GIB, "GiB") if total >= GIB else (2**20, "MiB")
    for name, size in parts.items():
        yield f"memory     {size / scale:8.2f} {unit}  {name}"
    fits = "fits" if total / GIB <= room else "DOES NOT FIT"
    yield f"memory     {total / scale:8.2f} {unit}  in all at train.micro_batch_size {micro}: {fits} in {room:.1f} GiB"
    if largest := largest_micro_batch(args, config, cluster):
        each_step = accumulation(args, gpus, largest)
        yield f"           largest micro-batch that fits and divides the batch: {largest}, {each_step} of them a step"
    else:
        yield "           none fits: shard over more GPUs, or --train.activation_checkpointing full"
    step = speed(args, config, cluster, args.parallel.shard, rate, micro)
    tokens_per_s, update_s = step.tokens_per_second, sum(step.muon)
    yield f"speed      {tokens_per_s:,.0f} tokens/s, {tokens_per_s / gpus:,.0f} a GPU ({source})"
    yield (
        f"step       {seconds(step.compute + step.waiting + update_s)}: compute {seconds(step.compute)}; communication "
        f"{seconds(step.communication)}, of which {seconds(step.waiting)} are waited for"
    )
    if update_s:
        iterations_ms, exchange_ms = (1000 * part for part in step.muon)
        yield f"           and Muon {update_s:.3f} s: iterations {iterations_ms:.1f} ms, exchange {exchange_ms:.1f} ms"
    if tokens := total_tokens(args, config):
        hours = tokens / tokens_per_s / 3600
        unit, unit_hours = time_unit(hours)
        gpu_hours, kwh = hours * gpus, hours * gpus * gpu.watts / 1000
        time = f"{hours / unit_hours:,.1f} {unit}" if hours >= 1 / 60 else seconds(3600 * hours)
        spent = f"{gpu_hours:,.0f}" if gpu_hours >= 10 else f"{gpu_hours:.2g}"
        spent = f"{spent} GPU-hours" if gpu_hours >= 0.1 else f"{3600 * gpu_hours:.3g} GPU-seconds"
        yield f"time       {time}, {spent} for {tokens:,} tokens"
        small = f"{kwh:.2g} kWh" if kwh >= 0.1 else f"{1000 * kwh:.2g} Wh"
        energy = f"{kwh / 1000:,.2f} MWh" if kwh >= 1000 else f"{kwh:.0f} kWh" if kwh >= 10 else small
        yield f"energy     {energy} of the GPUs at {gpu.watts:.0f} W"
        size = DTYPES[dtype_of(config.vocab_size)].itemsize
        yield f"data       {byte_size(size * tokens)} read, {byte_size(size * tokens_per_s)}/s"
    saved = args.optim.checkpoint_bytes(config)
    yield f"checkpoint {byte_size(saved)} each; at 2 GB/s {seconds(saved / 2e9)} to write, in the background"
    if tokens:
        kept = checkpoints_kept(args.checkpoint, -(-tokens // (args.train.global_batch_size * config.block_size)))
        yield f"           {byte_size(kept * saved)} for the {kept} that the run keeps, and one more while it writes"


def total_tokens(args: PretrainArgs, config: ModelConfig) -> int | None:
    """Return the tokens of the run, or None for a run in epochs of data that are not here."""
    if args.train.max_tokens is not None:
        return args.train.max_tokens
    if args.train.max_steps is not None:
        return args.train.max_steps * args.train.global_batch_size * config.block_size
    try:
        (sources,) = open_all([source.path for source in args.data.sources])
    except InputError:
        return None
    samples = args.train.epoch_samples(sum(source.num_blocks(config.block_size) for source in sources))
    steps = samples // args.train.global_batch_size
    return steps * args.train.global_batch_size * config.block_size or None


def checkpoints_kept(policy: CheckpointArgs, steps: int) -> int:
    """Return how many checkpoints a run of so many steps has kept when it is done."""
    saved = -(-steps // policy.interval)  # the run's end is one
    last = min(policy.keep_last or saved, saved)
    before = (saved - last) * policy.interval
    return last + (before // math.lcm(policy.interval, policy.keep_every) if policy.keep_every else 0)


def scaling(args: PretrainArgs, config: ModelConfig, cluster: Cluster, rate: float) -> Iterator[str]:
    """Yield a table that shows where scaling stops, for weights sharded over all GPUs and over those of a node."""
    batch, total = args.train.global_batch_size, total_tokens(args, config)
    slowest = speed(args, config, cluster, "full", rate, args.train.micro_batch_size).tokens_per_second
    unit, unit_hours = time_unit(total / slowest / 3600 if total else 0)
    yield f"       {'weights sharded over all GPUs':<37} {'over a node, a copy on each':<36}".rstrip()
    yield "  GPUs" + f"   tokens/s {unit if total else '':>6}  {'of perfect scaling':<17}" * 2
    sizes = (cluster.gpus_per_node * 2**power for power in range(13))
    for gpus in (size for size in sizes if 8 <= size <= 4096):
        many = replace(cluster, gpus=gpus)
        micro = min(args.train.micro_batch_size, max(batch // gpus, 1))
        line = f"{gpus:>6}"
        for how in ("full", "node"):
            tokens_per_s = speed(args, config, many, how, rate, micro).tokens_per_second
            share = tokens_per_s / (gpus * rate)
            time = f"{total / tokens_per_s / 3600 / unit_hours:,.1f}" if total else ""
            line += f" {tokens_per_s:>10,.0f} {time:>6}  {bar(share, 12):<12} {share:>4.0%}"
        yield line
    if batch < 4096:
        yield f"Above {batch:,} GPUs the batch grows, to a sample a GPU."
    yield "Not counted: many GPUs have small micro-batches, which compute at a lower MFU."


def bar(share: float, width: int) -> str:
    """Draw ``share`` as a bar of up to ``width`` characters, to an eighth of one."""
    full, rest = divmod(round(share * width * 8), 8)
    return "█" * full + ("", *"▏▎▍▌▋▊▉")[rest]
