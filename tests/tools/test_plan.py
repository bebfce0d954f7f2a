import itertools
import json
import os
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tinyllama import InputError
from tinyllama.config.args import (
    CheckpointArgs,
    DataArgs,
    OpsArgs,
    OptimArgs,
    ParallelArgs,
    PretrainArgs,
    Source,
    TrainArgs,
)
from tinyllama.config.model import named_config
from tinyllama.model import GPT
from tinyllama.throughput import flops_per_token, newton_schulz_flops, peak_flops
from tinyllama.tools import plan
from tinyllama.train.muon import hidden_matrices, orthogonalize

ROOT = Path(__file__).parents[2]
CONFIG = named_config("tinyllama_1.1b")
BIG = ("--config", "configs/pretrain/tinyllama_1.1b.yaml")

# Peaks of torch.cuda.max_memory_allocated() in GiB: scripts/benchmark_step.py, 1.1B, 2,048 tokens, bf16, compiled
# blocks, parallel.reshard_after_forward false, FlashAttention-4, the chunked loss; those of 2026-11-25 with FSDP2.
# micro-batch, accumulation, activation checkpointing, SwiGLU, RoPE, peak, GPU, date
MEASURED = [
    (16, 2, "none", "reference", "reference", 63.16, "H200", "2026-11-25"),
    (16, 2, "none", "quack", "reference", 56.55, "H100", "2026-11-25"),
    (16, 2, "selective", "reference", "reference", 47.03, "H200", "2026-11-25"),
    (16, 2, "selective", "quack", "reference", 47.0, "H200", "2026-11-25"),
    (8, 4, "selective", "reference", "reference", 33.37, "H100", "2026-11-25"),
    (32, 1, "none", "reference", "reference", 102.5, "H200", "2026-11-25"),
    (16, 2, "none", "quack", "triton", 52.63, "H200", "2026-11-27"),
]


def settings(**train: Any) -> PretrainArgs:
    return PretrainArgs(data=DataArgs(sources=[Source("x")]), train=TrainArgs(max_tokens=3 * 10**12, **train))


@pytest.mark.parametrize(("micro", "steps", "kept", "swiglu", "rope", "peak", "gpu", "date"), MEASURED)
def test_measured_peaks_are_met_within_10_percent(
    micro: int, steps: int, kept: Any, swiglu: str, rope: str, peak: float, gpu: str, date: str
) -> None:
    args = settings(activation_checkpointing=kept)
    args = replace(args, parallel=ParallelArgs(reshard_after_forward=False), ops=OpsArgs(swiglu=swiglu, rope=rope))
    parts = plan.memory(args, CONFIG, shard=1, micro_batch=micro, accumulation=steps)
    assert sum(parts.values()) / plan.GIB == pytest.approx(peak, rel=0.1)


# Tokens/s for each GPU and GB of rank 0's peak: 1.1B, micro-batch 16, FlashAttention-4 and quack, one host, 2026-11-27
# and 28 (docs/benchmarks.md). On H100s FSDP2 sharded, as now on two nodes or where it frees the weights, and RoPE was
# compiled; on H200s train/gathered.py has the weights. Alone, these cards did as many tokens/s as the second column
# says: the mean where it is 83,491 or 84,319, else the slowest.
# GPU, tokens/s alone, precision, optimizer, RoPE, GPUs, nodes that shard so, parallel.shard, reshard after forward,
# samples a step, tokens/s, GB
SEVERAL = [
    ("h100", 83_491, "bf16", "adamw", "reference", 2, 2, "full", False, 128, 81_227, 54.12),
    ("h100", 83_491, "bf16", "adamw", "reference", 2, 1, "full", True, 128, 77_430, 52.27),
    ("h100", 83_491, "bf16", "adamw", "reference", 2, 2, "full", False, 1024, 81_557, 54.12),
    ("h100", 83_491, "bf16", "adamw", "reference", 2, 1, "none", False, 128, 81_559, 59.70),
    ("h100", 83_491, "bf16", "adamw", "reference", 4, 2, "full", False, 256, 81_307, 50.87),
    ("h100", 83_491, "bf16", "adamw", "reference", 4, 1, "none", False, 256, 80_947, 59.70),
    ("h200", 84_319, "bf16", "adamw", "triton", 4, 1, "none", False, 128, 81_421, 56.51),
    ("h200", 84_319, "bf16", "adamw", "triton", 4, 1, "full", False, 128, 82_716, 46.62),
    ("h200", 83_637, "bf16", "adamw", "triton", 2, 1, "full", False, 64, 83_109, 49.92),
    ("h200", 83_615, "bf16", "adamw", "triton", 4, 1, "full", False, 128, 83_007, 46.62),
    ("h200", 83_615, "bf16", "adamw", "triton", 4, 1, 2, False, 128, 82_504, 49.92),
    ("h200", 112_989, "float8", "adamw", "triton", 2, 1, "full", False, 64, 110_704, 46.97),
    ("h200", 109_879, "float8", "adamw", "triton", 4, 1, "full", False, 128, 108_346, 43.67),
    ("h200", 83_900, "bf16", "adamw", "triton", 4, 1, "full", False, 128, 82_945, 46.62),
    ("h200", 83_900, "bf16", "adamw", "triton", 4, 1, "full", False, 1024, 84_476, 46.63),
    ("h200", 83_900, "bf16", "adamw", "triton", 4, 1, 2, False, 128, 82_211, 49.92),
    ("h200", 83_900, "bf16", "adamw", "triton", 4, 1, "full", True, 128, 78_783, 45.82),
    ("h200", 110_695, "float8", "adamw", "triton", 4, 1, "full", False, 128, 109_963, 43.67),
    ("h200", 83_900, "bf16", "muon", "triton", 4, 1, "full", False, 128, 80_338, 45.66),
    ("h200", 85_439, "bf16", "adamw", "triton", 2, 1, "full", False, 128, 85_167, 49.91),
    ("h200", 85_439, "bf16", "adamw", "triton", 2, 1, "full", False, 1024, 84_868, 49.91),
    ("h200", 85_523, "bf16", "adamw", "triton", 2, 1, "full", True, 128, 80_077, 49.08),
    ("h200", 112_964, "float8", "adamw", "triton", 2, 1, "full", False, 128, 112_643, 46.96),
    ("h200", 112_964, "float8", "adamw", "triton", 2, 1, "full", True, 128, 106_191, 46.13),
    ("h200", 85_439, "bf16", "muon", "triton", 2, 1, "full", False, 128, 82_249, 47.98),
    ("h200", 85_439, "bf16", "adamw", "triton", 4, 1, "full", False, 256, 85_551, 46.62),
    ("h200", 85_439, "bf16", "adamw", "triton", 4, 1, "full", False, 1024, 84_723, 46.62),
    ("h200", 85_439, "bf16", "adamw", "triton", 4, 1, 2, False, 256, 85_099, 49.91),
    ("h200", 85_439, "bf16", "adamw", "triton", 4, 1, "full", True, 256, 79_803, 45.82),
    ("h200", 112_964, "float8", "adamw", "triton", 4, 1, "full", False, 256, 112_948, 43.67),
    ("h200", 85_439, "bf16", "muon", "triton", 4, 1, "full", False, 256, 83_087, 45.65),
]


@pytest.mark.parametrize(
    ("gpu", "alone", "precision", "optim", "rope", "gpus", "nodes", "how", "reshard", "batch", "each", "gigabytes"),
    SEVERAL,
)
def test_several_gpus_are_met_within_10_percent(
    gpu: str, alone: int, precision: str, optim: str, rope: str, gpus: int, nodes: int, how: str | int, reshard: bool,
    batch: int, each: float, gigabytes: float,
) -> None:  # fmt: skip
    args = settings(global_batch_size=batch, micro_batch_size=16, precision=precision)
    ops = OpsArgs(swiglu="float8" if precision == "float8" else "quack", rope=rope)
    parallel = ParallelArgs(reshard_after_forward=reshard)
    args = replace(args, parallel=parallel, ops=ops, optim=OptimArgs(name=optim))
    cluster = plan.Cluster(plan.GPUS[gpu], gpus, 8, 400)
    found = plan.speed(args, CONFIG, cluster, how, alone, 16).tokens_per_second
    assert found / gpus == pytest.approx(each, rel=0.1)
    parts = plan.memory(args, CONFIG, cluster.shard(how), 16, plan.accumulation(args, gpus, 16), nodes)
    assert sum(parts.values()) / 1e9 == pytest.approx(gigabytes, rel=0.1)


def test_the_published_run_is_met_within_10_percent() -> None:
    gpu = plan.GPUS["a100-40g"]
    cluster = plan.Cluster(gpu, 16, 8, gpu.network)
    rate, _ = plan.rate_of_one(settings(), CONFIG, gpu, None, None)
    assert rate == pytest.approx(24_000, rel=0.01)
    speed = plan.speed(settings(), CONFIG, cluster, "full", rate, micro=8).tokens_per_second
    assert 3e12 / speed / 86400 == pytest.approx(90, rel=0.1)  # days for 3T tokens
    assert 300e9 / speed / 3600 * 16 == pytest.approx(3456, rel=0.1)  # GPU-hours for 300B
    # its micro-batch of 8 fitted 40 GB
    assert plan.largest_micro_batch(settings(), CONFIG, cluster) >= 8


def test_memory_by_part() -> None:
    n = CONFIG.num_params()
    one = plan.memory(settings(), CONFIG, shard=1, micro_batch=1, accumulation=1)
    sixteen = plan.memory(settings(), CONFIG, shard=16, micro_batch=1, accumulation=1)
    assert one["parameters (fp32)"] == 4 * n == 16 * sixteen["parameters (fp32)"]
    assert one["optimizer (fp32)"] == 8 * n == 16 * sixteen["optimizer (fp32)"]
    assert one["activations"] == sixteen["activations"] == 2048 * 22 * 2 * (6 * 2048 + 512 + 3 * 5632)
    two = plan.memory(settings(), CONFIG, shard=16, micro_batch=2, accumulation=2)
    assert two["activations"] == 2 * one["activations"]
    assert two["gradients (fp32)"] == 4 * n  # kept back whole
    synced = PretrainArgs(train=TrainArgs(), parallel=ParallelArgs(sync_every_micro_batch=True))
    assert plan.memory(synced, CONFIG, 16, 2, 2)["gradients (fp32)"] == 4 * n / 16
    full = plan.activations(settings(activation_checkpointing="full"), CONFIG)
    selective = plan.activations(settings(activation_checkpointing="selective"), CONFIG)
    assert full < 0.15 * plan.activations(settings(), CONFIG)
    assert full < selective < plan.activations(settings(), CONFIG)


def test_muon_needs_the_memory_of_one_moment_for_hidden_matrices() -> None:
    muon = replace(settings(), optim=OptimArgs(name="muon"))
    state = plan.memory(muon, CONFIG, shard=16, micro_batch=1, accumulation=1)["optimizer (fp32)"]
    assert state == (8 * CONFIG.num_params() - 4 * 968_884_224) / 16


def muon(gpus: int, shard: Any, gpus_per_node: int = 8, **train: Any) -> plan.Muon:
    gpu = plan.GPUS["h100"]
    args = replace(settings(**train), optim=OptimArgs(name="muon"))
    return plan.muon(args, CONFIG, plan.Cluster(gpu, gpus, gpus_per_node, gpu.network), shard)


def test_muons_flops_are_those_of_its_matmuls() -> None:
    for rows, cols in ((2048, 2048), (5632, 2048), (256, 2048), (2048, 256), (768, 1535), (768, 1536), (1, 1)):
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            orthogonalize(torch.empty(1, rows, cols))
        assert counter.get_total_flops() == newton_schulz_flops(rows, cols), (rows, cols)


def test_muons_iterations_are_divided_over_the_ranks_matrix_by_matrix() -> None:
    with torch.device("meta"):
        matrices = hidden_matrices(GPT(CONFIG))
    flops = [sum(newton_schulz_flops(*shape) for shape in matrix.shapes) for matrix in matrices]
    rate = 0.57 * 989.5e12
    assert muon(1, "full") == plan.Muon(pytest.approx(sum(flops) / rate), 0.0)
    assert muon(16, "full").iterations == muon(16, "none").iterations == pytest.approx(sum(flops) / rate / 16)
    assert muon(128, 8).iterations == pytest.approx(max(flops) / rate)  # more ranks than there are matrices
    assert plan.muon(settings(), CONFIG, plan.Cluster(plan.GPUS["h100"], 16, 8, 400), "full") == (0.0, 0.0)


def test_muons_exchange_is_of_the_bytes_of_the_hidden_matrices() -> None:
    hidden, link, network, hop = 968_884_224, 360e9, 0.8 * 50e9, 3e-6
    assert muon(8, "full").exchange == pytest.approx(2 * (2 * hidden / 8) * 7 / 8 / link + 14 * hop)
    assert muon(8, "full", precision="fp32").exchange == pytest.approx(2 * (4 * hidden / 8) * 7 / 8 / link + 14 * hop)
    assert muon(8, "none").exchange == pytest.approx(2 * hidden * 7 / 8 / link + 7 * hop)
    # two nodes: 7 of 15 peers are in the node
    each = 2 * hidden / 16 / 16
    assert muon(16, "full").exchange == pytest.approx(2 * each * (7 / link + 8 / network) + 30 * hop)
    # a copy a node: half of the matrices in each; the rings over the copies share the network of a node's GPUs
    each = 2 * hidden / 8 / 2
    assert muon(16, "node").exchange == pytest.approx(2 * each * 7 / 8 / link + each / network + (14 + 1) * hop)


def test_muons_time_is_part_of_a_step_and_of_the_plan() -> None:
    gpu = plan.GPUS["h100"]
    cluster = plan.Cluster(gpu, 16, 8, gpu.network)
    adamw, args = settings(), replace(settings(), optim=OptimArgs(name="muon"))
    before = plan.speed(adamw, CONFIG, cluster, "full", 50_000, 8)
    after = plan.speed(args, CONFIG, cluster, "full", 50_000, 8)
    assert before.muon == (0.0, 0.0)
    assert 2_097_152 / after.tokens_per_second == pytest.approx(2_097_152 / before.tokens_per_second + sum(after.muon))
    found = list(plan.summary(args, CONFIG, cluster, 50_000, "measured"))
    (line,) = [line for line in found if "Muon" in line]
    assert line == (
        f"           and Muon {sum(after.muon):.3f} s: iterations {1000 * after.muon.iterations:.1f} ms, "
        f"exchange {1000 * after.muon.exchange:.1f} ms"
    )
    assert len(found) == len(list(plan.summary(adamw, CONFIG, cluster, 50_000, "measured"))) + 1


def test_a_chunked_loss_needs_no_logits_in_full() -> None:
    whole = PretrainArgs(ops=OpsArgs(cross_entropy="reference"))
    assert plan.logits(whole, CONFIG, 32768) == 12 * 32768 * 32000
    assert plan.logits(settings(), CONFIG, 32768) < 0.1 * plan.logits(whole, CONFIG, 32768)


def test_the_largest_micro_batch_divides_the_batch_and_is_none_where_nothing_fits() -> None:
    gpu = plan.GPUS["h200"]
    size = plan.largest_micro_batch(settings(), CONFIG, plan.Cluster(gpu, 8, 8, gpu.network))
    assert 1024 // 8 % size == 0
    assert size >= 16
    tiny = plan.Gpu(gpu.device, 8, 1, 1, 1, 0.5)
    assert plan.largest_micro_batch(settings(), CONFIG, plan.Cluster(tiny, 1, 8, 100)) == 0


def test_scaling_stops_where_communication_passes_compute() -> None:
    gpu = plan.GPUS["h200"]
    rate, _ = plan.rate_of_one(settings(), CONFIG, gpu, None, None)

    def share(gpus: int, how: str) -> float:
        cluster = plan.Cluster(gpu, gpus, 8, gpu.network)
        micro = min(8, max(1024 // gpus, 1))
        return plan.speed(settings(), CONFIG, cluster, how, rate, micro).tokens_per_second / (gpus * rate)

    full = [share(gpus, "full") for gpus in (8, 64, 512, 4096)]
    assert full[0] == pytest.approx(1.0)
    assert full == sorted(full, reverse=True)
    assert full[-1] < 0.5
    assert share(1024, "node") > share(1024, "full")  # latency grows with the ring


def test_communication_is_bytes_over_bandwidth_and_hides_behind_its_own_pass() -> None:
    """16 A100 in two nodes, by hand: n is 1.1e9, and a ring of 16 carries 15 sixteenths of it."""
    gpu, n = plan.GPUS["a100-40g"], CONFIG.num_params()
    ethernet = plan.Cluster(gpu, 16, 8, 1.25)  # a card of 10 Gbit/s in each node
    assert ethernet.bandwidth(16) == 0.8 * 8 * 1.25e9 / 8 == 1e9
    full = plan.traffic(settings(), CONFIG, ethernet, "full")
    hops = 15 * 3e-6 * 23
    assert full.gather == pytest.approx(2 * n * 15 / 16 / 1e9 + hops)  # bf16 weights: 2.06 s
    assert full.reduce == pytest.approx(4 * n * 15 / 16 / 1e9 + hops)  # fp32 gradients: 4.13 s
    args = PretrainArgs(train=TrainArgs(max_tokens=1), parallel=ParallelArgs(reshard_after_forward=False))
    step = plan.speed(args, CONFIG, ethernet, "full", 24_000, micro=8)
    micro = 8 * 2048 / 24_000  # seconds of compute, 8 times a step
    assert step.compute == pytest.approx(8 * micro)
    assert step.communication == pytest.approx(full.gather + full.reduce)
    assert step.waiting == pytest.approx(full.gather - micro / 3 + full.reduce - micro * 2 / 3)
    infiniband = plan.Cluster(gpu, 16, 8, 200)
    assert infiniband.bandwidth(16) == 160e9
    fast = plan.speed(args, CONFIG, infiniband, "full", 24_000, micro=8)
    assert fast.communication == pytest.approx((full.gather + full.reduce - 2 * hops) / 160 + 2 * hops)  # 0.04 s
    assert fast.waiting == 0


def test_a_copy_on_each_node_sends_a_shard_over_the_network() -> None:
    gpu, n = plan.GPUS["a100-40g"], CONFIG.num_params()
    cluster = plan.Cluster(gpu, 32, 8, 200)
    node = plan.traffic(settings(), CONFIG, cluster, "node")
    assert node.gather == pytest.approx(2 * n * 7 / 8 / 230e9 + 7 * 3e-6 * 23)  # inside a node only
    across = 2 * 3 / 4 * 4 * n / 8 / (0.8 * 200e9 / 8) + 2 * 3 * 3e-6 * 23  # an all-reduce of a shard over 4 copies
    assert node.reduce == pytest.approx(4 * n * 7 / 8 / 230e9 + 7 * 3e-6 * 23 + across)
    # without shards one ring of all GPUs has the network of a whole node, not of one GPU
    assert cluster.bandwidth(32, apart=1) == 160e9
    assert cluster.bandwidth(4, apart=8) == cluster.bandwidth(2, apart=16) == 20e9
    assert cluster.bandwidth(2, apart=4) == 230e9


@pytest.mark.parametrize(("share", "drawn"), [(1.0, "████"), (0.5, "██"), (0.4, "█▋"), (0.01, ""), (0.03, "▏")])
def test_a_bar_has_eighths(share: float, drawn: str) -> None:
    assert plan.bar(share, 4) == drawn


def test_every_gpu_has_a_peak() -> None:
    assert all(peak_flops(gpu.device) for gpu in plan.GPUS.values())


def test_the_rate_is_our_best_in_a_benchmark_on_one_gpu_in_the_precision_of_the_run(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    line = {"run": "ours", "model": "tinyllama_1.1b", "gpus": 1, "tokens_per_second": 70_000, "precision": "bf16"}
    others: list[dict[str, Any]] = [
        {"run": "litgpt", "model": "tinyllama_1.1b", "gpus": 1, "tokens_per_second": 900_000},
        line | {"model": "tinyllama_120m", "tokens_per_second": 500_000},
        line | {"gpus": 2, "tokens_per_second": 80_000},
        line | {"run": "ours:optim.name=muon", "optim.name": "muon", "tokens_per_second": 79_000},
    ]
    lines = [line, line | {"run": "ours:8", "tokens_per_second": 77_000}]
    lines.append(line | {"run": "ours:train.precision=float8", "precision": "float8", "tokens_per_second": 110_000})
    file.write_text("".join(json.dumps(line) + "\n" for line in (*others, *lines)))
    for precision, best in (("bf16", 77_000), ("float8", 110_000)):
        found = plan.rate_of_one(settings(precision=precision), CONFIG, plan.GPUS["h200"], None, file)
        assert found == (best, f"the best in {file}")
    for text in (json.dumps(line | {"tokens_per_second": 0}), "no JSON", *map(json.dumps, others)):
        file.write_text(text)
        with pytest.raises(InputError) as error:
            plan.rate_of_one(settings(), CONFIG, plan.GPUS["h200"], None, file)
        assert str(error.value) == (
            f"--benchmark {file} has no line of benchmark_step.py for tinyllama_1.1b in bf16 with AdamW on one GPU, by "
            "this code: add what it prints with --model tinyllama_1.1b --run ours:train.precision=bf16"
        )
    rate, _ = plan.rate_of_one(settings(), CONFIG, plan.GPUS["h200"], 0.5, None)
    assert rate == 0.5 * 989.5e12 / flops_per_token(CONFIG)


def test_what_is_gathered_and_what_is_kept() -> None:
    d, wide, rows, layers = 2048, 5632, 32000, 22
    block = d * 2560 + d * d + 3 * d * wide + 2 * d
    n = layers * block + 2 * rows * d + d
    assert n == CONFIG.num_params()

    def parts(parallel: ParallelArgs = ParallelArgs(), **train: Any) -> dict[str, float]:  # noqa: B008
        args = replace(settings(**train), parallel=parallel)
        return plan.memory(args, CONFIG, shard=16, micro_batch=2, accumulation=3)

    held = ParallelArgs(reshard_after_forward=False)
    rest = 2 * rows * d + d
    assert parts()["gathered weights"] == 2 * (rest + 2 * block) + 6 * block
    assert parts(held)["gathered weights"] == 2 * n
    assert parts(precision="fp32")["gathered weights"] == 4 * (rest + 2 * block) + 4 * block
    assert parts(held, precision="float8")["gathered weights"] == 2 * n
    synced = ParallelArgs(reshard_after_forward=False, sync_every_micro_batch=True)
    assert parts(synced)["gathered weights"] == 2 * n + 6 * block
    by_fsdp = plan.memory(replace(settings(), parallel=held), CONFIG, shard=16, micro_batch=2, accumulation=1, nodes=2)
    assert (by_fsdp["gradients (fp32)"], by_fsdp["gathered weights"]) == (0, 2 * n + 6 * block)
    one = plan.memory(settings(), CONFIG, shard=16, micro_batch=2, accumulation=1)
    assert one["gradients (fp32)"] == 0  # they come into being as activations go
    assert parts()["gradients (fp32)"] == 4 * n
    assert parts(held)["gradients (fp32)"] == 4 * n
    whole = plan.memory(settings(), CONFIG, shard=1, micro_batch=2, accumulation=1)
    assert (whole["gradients (fp32)"], whole["gathered weights"]) == (4 * n, 2 * n)
    assert plan.memory(settings(precision="fp32"), CONFIG, 1, 2, 1)["gathered weights"] == 4 * n
    assert set(one) == {
        *("parameters (fp32)", "optimizer (fp32)", "gradients (fp32)", "gathered weights", "activations", "logits"),
    }
    kv = 2 * 4 * 64
    compiled = 2 * (6 * d + kv + 3 * wide)
    unrotated = 2 * (d + kv)
    assert plan.activations(settings(), CONFIG) == layers * compiled
    assert plan.activations(replace(settings(), ops=OpsArgs(rope="reference")), CONFIG) == layers * (
        compiled + unrotated
    )
    assert plan.activations(settings(precision="fp32"), CONFIG) == layers * 2 * (compiled + unrotated)
    assert plan.activations(settings(compile=False), CONFIG) == layers * (compiled + 16 * d + 2 * wide)
    full, selective = (
        plan.activations(settings(activation_checkpointing=kind), CONFIG) for kind in ("full", "selective")
    )
    assert full == layers * 2 * d + compiled
    assert selective == layers * 2 * (4 * d + kv + 2 * wide) + compiled
    quack = replace(settings(), ops=OpsArgs(swiglu="quack"))
    assert plan.activations(quack, CONFIG) == layers * (compiled - 2 * wide)
    in_float8 = compiled - 2 * wide - 2 * d
    assert plan.activations(settings(precision="float8"), CONFIG) == layers * in_float8
    float8 = settings(precision="float8", activation_checkpointing="selective")
    assert plan.activations(float8, CONFIG) == layers * (2 * (4 * d + kv + 2 * wide) + 2 * d) + in_float8
    for tokens, at_a_time in ((8192, 8192), (8193, 8192), (5, 5)):
        expected = 2 * at_a_time * rows + 6 * rows * d + 2 * tokens * d
        assert plan.logits(settings(), CONFIG, tokens) == expected
    assert parts()["logits"] == plan.logits(settings(), CONFIG, 4096)


def test_passes_of_a_step() -> None:
    gpu = plan.GPUS["h100"]
    cluster = plan.Cluster(gpu, 8, 8, gpu.network)
    n, hops = CONFIG.num_params(), 7 * 3e-6 * 23
    one = plan.traffic(settings(precision="fp32"), CONFIG, cluster, "full")
    assert one.gather == pytest.approx(4 * n * 7 / 8 / 360e9 + hops)
    one = plan.traffic(settings(precision="float8"), CONFIG, cluster, "full")
    assert one.gather == pytest.approx(2 * n * 7 / 8 / 360e9 + hops)
    alone = plan.traffic(settings(), CONFIG, plan.Cluster(gpu, 1, 8, 400), "full")
    assert (alone.gather, alone.reduce) == (0, 0)
    held = ParallelArgs(reshard_after_forward=False)
    for parallel, gathers, reduces in (
        (ParallelArgs(), 2 * 4, 1),
        (held, 1, 1),
        (ParallelArgs(sync_every_micro_batch=True), 2 * 4, 4),
    ):
        args = replace(settings(global_batch_size=64), parallel=parallel)
        step = plan.speed(args, CONFIG, cluster, "full", 50_000, micro=2)
        assert step.compute == pytest.approx(4 * 2 * 2048 / 50_000)
        assert step.communication == pytest.approx(gathers * one.gather + reduces * one.reduce)
        assert step.tokens_per_second == pytest.approx(64 * 2048 / (step.compute + step.waiting))
        assert step.waiting == (step.communication if parallel is held else 0)  # in one node, train/gathered.py
    for sync in (False, True):  # ranks that share nothing reduce once, whatever they are asked for
        args = replace(settings(global_batch_size=64), parallel=ParallelArgs(sync_every_micro_batch=sync))
        none = plan.traffic(args, CONFIG, cluster, "none")
        assert plan.speed(args, CONFIG, cluster, "none", 50_000, micro=2).communication == pytest.approx(none.reduce)
    # so slow a link that every pass waits: a third of the compute is forward
    slow = plan.Cluster(replace(gpu, link=1), 8, 8, 400)
    args, bad = settings(global_batch_size=64), plan.traffic(settings(), CONFIG, slow, "full")
    step = plan.speed(args, CONFIG, slow, "full", 50_000, micro=2)
    assert step.waiting == pytest.approx(8 * bad.gather + bad.reduce - step.compute)
    middling = plan.Cluster(replace(gpu, link=2 * n * 7 / 8 / (0.5 * 4096 / 50_000) / 1e9), 8, 8, 400)
    gather = plan.traffic(settings(), CONFIG, middling, "full").gather  # half of a micro-batch's compute: more than
    micro = 4096 / 50_000  # its forward pass, less than its backward pass
    step = plan.speed(replace(args, train=replace(args.train, global_batch_size=32)), CONFIG, middling, "full", 5e4, 2)
    reduce = plan.traffic(settings(), CONFIG, middling, "full").reduce
    assert step.waiting == pytest.approx(2 * (gather - micro / 3) + (gather + reduce - micro * 2 / 3))


def test_sizes_of_clusters_and_batches() -> None:
    gpu = plan.GPUS["h100"]
    eight, three = plan.Cluster(gpu, 32, 8, 400), plan.Cluster(gpu, 3, 8, 400)
    assert [eight.shard(how) for how in ("full", "node", "none", 4)] == [32, 8, 1, 4]
    assert three.shard("node") == 3
    assert eight.bandwidth(8) == 360e9
    assert eight.bandwidth(9) == min(360e9, 0.8 * 400 * 8 / 8 * 1e9)
    assert [plan.accumulation(settings(), gpus, 8) for gpus in (16, 128, 4096)] == [8, 1, 1]
    # the largest that fits is the last that fits
    parts = plan.memory(settings(), CONFIG, 1, 4, 256)
    just = replace(gpu, memory=sum(parts.values()) / 2**30 / 0.95 * (1 + 1e-9))
    assert plan.largest_micro_batch(settings(), CONFIG, plan.Cluster(just, 1, 8, 400)) == 4
    less = replace(just, memory=just.memory * (1 - 1e-6))
    assert plan.largest_micro_batch(settings(), CONFIG, plan.Cluster(less, 1, 8, 400)) == 2
    assert plan.total_tokens(settings(), CONFIG) == 3 * 10**12
    assert plan.total_tokens(PretrainArgs(train=TrainArgs(max_steps=10)), CONFIG) == 10 * 1024 * 2048
    assert plan.total_tokens(PretrainArgs(train=TrainArgs(max_epochs=1)), CONFIG) is None
    with pytest.raises(InputError, match=r"--mfu 0 must be in \[0.0001, 1\]"):
        plan.rate_of_one(settings(), CONFIG, gpu, 0, None)
    assert plan.rate_of_one(settings(), CONFIG, gpu, 1, None)[0] == 989.5e12 / flops_per_token(CONFIG)
    assert plan.rate_of_one(settings(), CONFIG, gpu, None, None)[1] == "an MFU of 59.0%"


def test_the_numbers_of_the_gpus() -> None:
    """Memory in GiB, GB/s of a link, Gbit/s of network, W: data sheets, but for memory, which the driver tells."""
    known = {name: (gpu.memory, gpu.link, gpu.network, gpu.watts, gpu.mfu) for name, gpu in plan.GPUS.items()}
    assert known == {
        "a100-40g": (40, 230, 200, 400, 0.563),
        "a100-80g": (80, 230, 200, 400, 0.563),
        "h100": (79.6, 360, 400, 700, 0.59),
        "h200": (139.8, 360, 400, 700, 0.62),
        "b200": (178, 700, 400, 1000, 0.45),
        "rtx-4090": (24, 15, 25, 450, 0.5),
    }


def test_the_summary_line_by_line() -> None:
    """On one GPU of a made-up kind, so that every figure can be had by hand."""
    gpu = plan.Gpu("TOY", memory=50, link=100, network=100, watts=500, mfu=0.5)
    args = settings(global_batch_size=32, micro_batch_size=8)
    args = replace(args, train=replace(args.train, max_tokens=10**9))
    lines = list(plan.summary(args, CONFIG, plan.Cluster(gpu, 2, 1, 100), 10_000, "measured"))
    n = CONFIG.num_params()
    parts = plan.memory(args, CONFIG, 2, 8, 2)
    assert lines[:2] == [
        "model      tinyllama_1.1b: 1,100,048,384 parameters, context 2,048",
        "cluster    2 x TOY, 2 nodes, 100 Gbit/s a GPU",
    ]
    assert lines[2:8] == [f"memory     {size / 2**30:8.2f} GiB  {name}" for name, size in parts.items()]
    assert lines[2] == "memory         2.05 GiB  parameters (fp32)"  # 4 n / 2
    total = sum(parts.values()) / 2**30
    assert lines[8] == f"memory     {total:8.2f} GiB  in all at train.micro_batch_size 8: fits in 47.5 GiB"
    largest = plan.largest_micro_batch(args, CONFIG, plan.Cluster(gpu, 2, 1, 100))
    assert (
        lines[9]
        == f"           largest micro-batch that fits and divides the batch: {largest}, {16 // largest} of them a step"
    )
    # 4 gatherings and a reduction of half of n, over 10 GB/s: 80 % of 100 Gbit/s; all hide behind 3.3 s of compute
    across = (4 * 2 + 4) * n / 2 / 10e9 + 5 * 3e-6 * 23
    assert lines[10] == "speed      20,000 tokens/s, 10,000 a GPU (measured)"
    assert lines[11] == (
        f"step       3.28 s: compute 3.28 s; communication {across:.2f} s, of which 0.00 s are waited for"
    )
    hours = 1e9 / 20_000 / 3600  # 13.9
    assert lines[12] == f"time       {hours:.1f} hours, {2 * hours:.0f} GPU-hours for 1,000,000,000 tokens"
    assert lines[12].startswith("time       13.9 hours, 28 GPU-hours")
    assert lines[13] == "energy     14 kWh of the GPUs at 500 W"  # 28 hours x 500 W
    assert lines[14] == "data       2.00 GB read, 40.0 kB/s"
    assert lines[15] == "checkpoint 13.2 GB each; at 2 GB/s 6.60 s to write, in the background"
    # every 5,000 of 30,518 steps and the last: the newest 3
    assert lines[16] == "           39.6 GB for the 3 that the run keeps, and one more while it writes"
    assert len(lines) == 17
    small = plan.Cluster(replace(gpu, memory=8), 2, 1, 100)
    lines = list(plan.summary(replace(args, train=TrainArgs(max_epochs=1)), CONFIG, small, 10_000, "measured"))
    assert "DOES NOT FIT in 7.6 GiB" in lines[8]
    assert lines[9] == "           none fits: shard over more GPUs, or --train.activation_checkpointing full"
    assert [line.split()[0] for line in lines[10:]] == ["speed", "step", "checkpoint"]  # it is not known how long
    # a run long enough for its energy to be seen: 3T tokens at 20,000 tokens/s
    lines = list(plan.summary(settings(), CONFIG, plan.Cluster(gpu, 2, 2, 100), 10_000, "measured"))
    hours = 3e12 / 20_000 / 3600
    assert lines[13] == f"energy     {hours * 2 * 500 / 1e6:,.2f} MWh of the GPUs at 500 W"
    assert lines[13].startswith("energy     41.67 MWh")
    assert lines[14] == "data       6.00 TB read, 40.0 kB/s"
    lines = list(plan.summary(settings(), CONFIG, plan.Cluster(gpu, 2, 2, 100), 1e6, "measured"))
    assert lines[14].endswith(f" read, {2 * float(lines[10].split()[1].replace(',', '')) / 1e6:.2f} MB/s")


@pytest.mark.parametrize(
    ("policy", "steps", "kept"),
    [
        ({}, 1_430_512, 31),  # 28 multiples of 50,000 and the newest 3
        ({"keep_every": None}, 1_430_512, 3),
        ({"keep_last": None}, 12_000, 3),  # 5,000, 10,000 and the last
        ({"interval": 10, "keep_last": 2, "keep_every": 20}, 100, 6),  # 20, 40, 60, 80, 90 and 100
        ({}, 7, 1),
    ],
)
def test_checkpoints_kept(policy: dict[str, Any], steps: int, kept: int) -> None:
    assert plan.checkpoints_kept(CheckpointArgs(**policy), steps) == kept


def test_a_small_run_is_in_hours_minutes_or_seconds_and_its_energy_in_kwh(packed_folder: Any) -> None:
    folder = packed_folder([[[3] * 2049 * 10]], eos=False)
    gpu = replace(plan.GPUS["h100"], watts=700.0)
    args = PretrainArgs(
        data=DataArgs(sources=[Source(str(folder))]), train=TrainArgs(max_epochs=4, global_batch_size=8)
    )
    assert plan.total_tokens(args, CONFIG) == 40 * 2048
    for epochs, batch, samples in ((4, 16, 32), (0.7, 7, 7), (1.1, 11, 11), (0.3, 4, 0)):  # whole steps, as train.py
        fewer = replace(args, train=TrainArgs(max_epochs=epochs, global_batch_size=batch))
        assert plan.total_tokens(fewer, CONFIG) == (samples * 2048 or None)
    assert plan.total_tokens(replace(args, data=DataArgs(sources=[Source("absent")])), CONFIG) is None
    args = replace(args, train=TrainArgs(max_tokens=36_000_000))
    lines = list(plan.summary(args, CONFIG, plan.Cluster(gpu, 1, 8, 400), 10_000, "measured"))
    assert lines[1] == "cluster    1 x NVIDIA H100 80GB HBM3, 1 node, 400 Gbit/s a GPU"
    assert "time       1.0 hours, 1 GPU-hours for 36,000,000 tokens" in lines
    assert "energy     0.7 kWh of the GPUs at 700 W" in lines
    assert any(line.startswith("data       72.0 MB read") for line in lines)
    large = replace(CONFIG, vocab_size=65_536)  # tokens of four bytes
    lines = list(plan.summary(args, large, plan.Cluster(gpu, 1, 8, 400), 10_000, "measured"))
    assert any(line.startswith("data       144 MB read") for line in lines)
    args = replace(args, train=TrainArgs(max_tokens=6_000_000, global_batch_size=8))
    lines = list(plan.summary(args, CONFIG, plan.Cluster(gpu, 1, 8, 400), 10_000, "measured"))
    assert "time       10.0 min, 0.17 GPU-hours for 6,000,000 tokens" in lines
    table = list(plan.scaling(args, CONFIG, plan.Cluster(gpu, 1, 8, 400), 10_000))
    assert table[1].split()[:3] == ["GPUs", "tokens/s", "min"]
    args = replace(args, train=TrainArgs(max_tokens=25_000))
    lines = list(plan.summary(args, CONFIG, plan.Cluster(gpu, 1, 8, 400), 10_000, "measured"))
    assert "time       2.50 s, 2.5 GPU-seconds for 25,000 tokens" in lines
    assert "energy     0.49 Wh of the GPUs at 700 W" in lines


def test_figures_of_a_model_of_any_size_have_two_digits_or_more() -> None:
    gpu = plan.GPUS["h100"]
    tiny = replace(CONFIG, name="1M", n_layer=4, n_embd=128, intermediate_size=344, vocab_size=2000, block_size=256)
    large = replace(CONFIG, name="7B", n_layer=32, n_head=32, n_query_groups=32, n_embd=4096, intermediate_size=11008)
    found = {}
    for config, rate in ((tiny, 5e6), (large, 1e4)):
        args = replace(settings(), train=TrainArgs(max_tokens=10**7, global_batch_size=64, micro_batch_size=8))
        lines = list(plan.summary(args, config, plan.Cluster(gpu, 8, 8, 400), rate, "measured"))
        found[config.name] = {line[:11].strip(): line[11:] for line in lines[8:] if line[:11].strip()}
        found[config.name]["parameters"] = lines[2]
    n, figures = tiny.num_params(), found["1M"]
    assert 1e6 < n < 2e6
    saved = f"{12 * n / 1e6:.1f} MB each; at 2 GB/s {12 * n / 2e6:.2f} ms to write, in the background"
    assert figures["checkpoint"] == saved
    assert figures["parameters"] == f"memory     {4 * n / 8 / 2**20:8.2f} MiB  parameters (fp32)"
    compute = f"{64 * 256 / 8 / 5e6 * 1000:.2f} ms"
    assert figures["step"].startswith(f"{compute}: compute {compute}; communication 0.338 ms, of which 0.00 s are ")
    assert figures["data"] == "20.0 MB read, 80.0 MB/s"
    n, figures = large.num_params(), found["7B"]
    assert 6e9 < n < 8e9
    saved = f"{12 * n / 1e9:.1f} GB each; at 2 GB/s {6 * n / 1e9:.2f} s to write, in the background"
    assert figures["checkpoint"] == saved
    assert figures["parameters"] == f"memory     {4 * n / 8 / 2**30:8.2f} GiB  parameters (fp32)"
    compute = f"{64 * 2048 / 8 / 1e4:.2f} s"
    assert figures["step"].startswith(f"{compute}: compute {compute}; communication 0.1")
    assert figures["data"] == "20.0 MB read, 160 kB/s"


def test_the_table_of_scaling() -> None:
    gpu = plan.GPUS["a100-40g"]
    args = settings(global_batch_size=1024)
    lines = list(plan.scaling(args, CONFIG, plan.Cluster(gpu, 16, 8, 200), 24_000))
    assert [int(line.split()[0]) for line in lines[2:12]] == [8 * 2**power for power in range(10)]
    for line in lines[2:12]:
        gpus = int(line.split()[0])
        many = plan.Cluster(gpu, gpus, 8, 200)
        expected = f"{gpus:>6}"
        for how in ("full", "node"):
            micro = 8 if gpus <= 128 else max(1024 // gpus, 1)
            rate = plan.speed(args, CONFIG, many, how, 24_000, micro).tokens_per_second
            days, share = 3e12 / rate / 86400, rate / gpus / 24_000
            expected += f" {rate:>10,.0f} {days:>6,.1f}  {plan.bar(share, 12):<12} {share:>4.0%}"
        assert line == expected
    assert lines[12:] == [
        "Above 1,024 GPUs the batch grows, to a sample a GPU.",
        "Not counted: many GPUs have small micro-batches, which compute at a lower MFU.",
    ]
    lines = list(plan.scaling(settings(global_batch_size=4096), CONFIG, plan.Cluster(gpu, 4, 4, 200), 24_000))
    assert [int(line.split()[0]) for line in lines[2:-1]] == [8 * 2**power for power in range(10)]
    assert not any("the batch grows" in line for line in lines)


def run_script(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "scripts/plan.py", *flags], cwd=ROOT, capture_output=True, text=True)


def test_the_script() -> None:
    done = run_script(*BIG, "--gpus", "16", "--gpu", "a100-40g")
    assert done.returncode == 0, done.stderr
    assert "time       90.4 days, 34,7" in done.stdout
    assert "checkpoint 13.2 GB each" in done.stdout
    assert "409 GB for the 31 that the run keeps" in done.stdout
    table = done.stdout.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in table[2:12]] == [str(2**power) for power in range(3, 13)]
    assert "Above 1,024 GPUs the batch grows, to a sample a GPU." in done.stdout


def test_a_later_setting_wins_as_in_training(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    half = tmp_path / "half.yaml"
    half.write_text("train: {max_tokens: 1_500_000_000_000}")
    on = ("--gpus", 16, "--gpu", "a100-40g")
    for flags, tokens in (
        ((*BIG, "--train.max_tokens", 7 * 10**9), 7 * 10**9),
        (("--train.max_tokens", 7 * 10**9, *BIG), 3 * 10**12),
        ((*BIG, f"--config={half}"), 1_500_000_000_000),
        (("--config", half, *BIG), 3 * 10**12),
    ):
        code, out, err = script("plan", *on, *flags)
        assert (code, err) == (0, "")
        assert f"for {tokens:,} tokens\n" in out
    code, out, err = script("plan", *on)
    assert (code, out) == (2, "")
    assert err.startswith("error: the following arguments are required: --config; plan.py --help ")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--gpus", "16", "--gpu", "v100"], "error: --gpu v100 is not known; known: a100-40g"),
        (["--gpus", "0", "--gpu", "h200"], "error: --gpus 0 must be greater than 0"),
        (["--gpus", "1" + "0" * 15, "--gpu", "h200"], "error: --gpus 1000000000000000 must be greater than 0, at most"),
        (
            ["--gpus", "16", "--gpu", "h200", "--gpus_per_node", "1" + "0" * 15],
            "error: --gpus_per_node 1000000000000000 must be greater than 0, at most 4,096\n",
        ),
        (
            ["--gpus", "16", "--gpu", "h200", "--network_gbps", "inf"],
            "error: --network_gbps inf must be greater than 0, at most 1,000,000\n",
        ),
        (
            ["--gpus", "16", "--gpu", "h200", "--network_gbps", "1e-300"],
            "error: --network_gbps 1e-300 must be at least 0.001\n",
        ),
        (["--gpus", "16", "--gpu", "h200", "--mfu", "1e-300"], "error: --mfu 1e-300 must be in [0.0001, 1]\n"),
        (["--gpus", "16", "--gpu", "h200", "--mfu", "55"], "error: --mfu 55.0 must be in [0.0001, 1]"),
        (["--gpus", "16", "--gpu", "h200", "--train.micro_batch", "4"], "error: unknown flag --train.micro_batch; did"),
        (
            ["--gpus", "256", "--gpu", "h200"],
            "error: train.global_batch_size 1024 is not a multiple of 256 ranks x train",
        ),
        (
            ["--gpus", "12", "--gpu", "h200"],
            "error: --gpus 12 does not fill nodes of --gpus_per_node 8: give --gpus 8 or 16, or --gpus_per_node 6\n",
        ),
        (
            ["--gpus", "16", "--gpu", "h200", "--parallel.shard", "5"],
            "error: parallel.shard 5 does not divide 16 GPUs; valid: 1, 2, 4, 8, 16\n",
        ),
    ],
)
def test_bad_input(flags: list[str], problem: str, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["plan.py", *BIG, *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path("scripts/plan.py", run_name="__main__")
    said = capsys.readouterr()
    assert (stopped.value.code, said.out) == (2, "")
    assert said.err.startswith(problem)


def test_a_batch_and_a_run_of_any_size_are_planned_at_once(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    huge = ("--train.global_batch_size", 10**15, "--train.micro_batch_size", 1, "--checkpoint.interval", 1)
    started = time.process_time()
    code, out, err = script("plan", *BIG, "--gpus", 16, "--gpu", "h200", *huge, "--train.max_tokens", 10**15)
    assert (code, err) == (0, "")
    assert time.process_time() - started < 10
    assert "largest micro-batch that fits and divides the batch: 40, 1562500000000 of them a step" in out
    steps = [{*range(interval, 41, interval), 40} for interval in range(1, 45)]
    for interval, saved in enumerate(steps, 1):
        for last, every in itertools.product((1, 2, 5, 50), (None, 1, 4, 6)):
            for_ever = {step for step in saved if every and step % every == 0}
            kept = len(for_ever | set(sorted(saved)[-last:]))
            assert (
                plan.checkpoints_kept(CheckpointArgs(interval=interval, keep_last=last, keep_every=every), 40) == kept
            )
        assert plan.checkpoints_kept(CheckpointArgs(interval=interval, keep_last=None), 40) == len(saved)


@pytest.mark.parametrize("rate", ["Infinity", "NaN", "1e-300"])
def test_a_benchmark_of_no_gpu_is_refused(rate: str, tmp_path: Path) -> None:
    line = '{"run": "ours", "model": "tinyllama_1.1b", "gpus": 1, "precision": "bf16", "tokens_per_second": %s}'
    (tmp_path / "lines").write_text(line % rate)
    with pytest.raises(InputError, match="has no line of benchmark_step.py for tinyllama_1.1b"):
        plan.rate_of_one(settings(), CONFIG, plan.GPUS["h200"], None, tmp_path / "lines")


def test_a_benchmark_that_is_a_pipe_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe has no line of benchmark_step.py for tinyllama_1.1b"):
        plan.rate_of_one(settings(), CONFIG, plan.GPUS["h200"], None, pipe)
