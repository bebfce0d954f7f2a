import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyllama import InputError
from tinyllama.config.args import DataArgs, OpsArgs, ParallelArgs, PretrainArgs, Source, TrainArgs
from tinyllama.config.model import named_config
from tinyllama.throughput import flops_per_token, peak_flops
from tinyllama.tools import plan

ROOT = Path(__file__).parents[2]
CONFIG = named_config("tinyllama_1.1b")
BIG = ("--config", "configs/pretrain/tinyllama_1.1b.yaml")

# Peaks of torch.cuda.max_memory_allocated() in GiB: scripts/benchmark_step.py, 1.1B, 2,048 tokens, bf16, compiled
# blocks, FSDP2 on one rank, parallel.reshard_after_forward false, FlashAttention-4, the chunked loss.
# micro-batch, accumulation, activation checkpointing, SwiGLU, peak, GPU, date
MEASURED = [
    (16, 2, "none", "reference", 63.16, "H200", "2026-11-25"),
    (16, 2, "none", "quack", 56.55, "H100", "2026-11-25"),
    (16, 2, "selective", "reference", 47.03, "H200", "2026-11-25"),
    (16, 2, "selective", "quack", 47.0, "H200", "2026-11-25"),
    (8, 4, "selective", "reference", 33.37, "H100", "2026-11-25"),
    (32, 1, "none", "reference", 102.5, "H200", "2026-11-25"),
]


def settings(**train: Any) -> PretrainArgs:
    return PretrainArgs(data=DataArgs(sources=[Source("x")]), train=TrainArgs(max_tokens=3 * 10**12, **train))


@pytest.mark.parametrize(("micro", "steps", "kept", "swiglu", "peak", "gpu", "date"), MEASURED)
def test_measured_peaks_are_met_within_10_percent(
    micro: int, steps: int, kept: Any, swiglu: str, peak: float, gpu: str, date: str
) -> None:
    args = settings(activation_checkpointing=kept)
    args = replace(args, parallel=ParallelArgs(reshard_after_forward=False), ops=OpsArgs(swiglu=swiglu))
    parts = plan.memory(args, CONFIG, shard=1, micro_batch=micro, accumulation=steps)
    assert sum(parts.values()) / plan.GIB == pytest.approx(peak, rel=0.1)


def test_the_published_run_is_met_within_10_percent() -> None:
    gpu = plan.GPUS["a100-40g"]
    cluster = plan.Cluster(gpu, 16, 8, gpu.network)
    rate, _ = plan.rate_of_one(CONFIG, gpu, None, None)
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
    assert one["activations"] == sixteen["activations"] == 2048 * 22 * 2 * (7 * 2048 + 2 * 512 + 3 * 5632)
    two = plan.memory(settings(), CONFIG, shard=16, micro_batch=2, accumulation=2)
    assert two["activations"] == 2 * one["activations"]
    assert two["gradients (fp32)"] == 4 * n  # kept back whole
    synced = PretrainArgs(train=TrainArgs(), parallel=ParallelArgs(sync_every_micro_batch=True))
    assert plan.memory(synced, CONFIG, 16, 2, 2)["gradients (fp32)"] == 4 * n / 16
    full = plan.activations(settings(activation_checkpointing="full"), CONFIG)
    selective = plan.activations(settings(activation_checkpointing="selective"), CONFIG)
    assert full < 0.15 * plan.activations(settings(), CONFIG)
    assert full < selective < plan.activations(settings(), CONFIG)


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
    rate, _ = plan.rate_of_one(CONFIG, gpu, None, None)

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


def test_the_rate_is_taken_from_a_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "steps.jsonl"
    lines = [{"model": "tinyllama_1.1b", "tokens_per_second": speed} for speed in (70_000, 77_000)]
    lines.append({"model": "tinyllama_120m", "tokens_per_second": 500_000})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plan.rate_of_one(CONFIG, plan.GPUS["h200"], None, file) == (77_000, f"the best in {file}")
    for text in ("no JSON\n", '{"model": "tinyllama_1.1b", "tokens_per_second": 0}\n'):
        file.write_text(text)
        with pytest.raises(InputError, match="has no line of benchmark_step.py for tinyllama_1.1b"):
            plan.rate_of_one(CONFIG, plan.GPUS["h200"], None, file)
    rate, _ = plan.rate_of_one(CONFIG, plan.GPUS["h200"], 0.5, None)
    assert rate == 0.5 * 989.5e12 / flops_per_token(CONFIG)


def run_script(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "scripts/plan.py", *flags], cwd=ROOT, capture_output=True, text=True)


def test_the_script() -> None:
    done = run_script(*BIG, "--gpus", "16", "--gpu", "a100-40g")
    assert done.returncode == 0, done.stderr
    assert "time       90.4 days, 34,7" in done.stdout
    assert "checkpoint 13.20 GB each" in done.stdout
    table = done.stdout.split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in table[2:12]] == [str(2**power) for power in range(3, 13)]
    assert "Above 1,024 GPUs the batch grows, to a sample a GPU." in done.stdout


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--gpus", "16", "--gpu", "v100"], "error: --gpu v100 is not known; known: a100-40g"),
        (["--gpus", "0", "--gpu", "h200"], "error: --gpus 0 must be greater than 0"),
        (["--gpus", "16", "--gpu", "h200", "--mfu", "55"], "error: --mfu 55.0 must be in (0, 1]"),
        (["--gpus", "16", "--gpu", "h200", "--train.micro_batch", "4"], "error: unknown flag --train.micro_batch; did"),
        (
            ["--gpus", "256", "--gpu", "h200"],
            "error: train.global_batch_size 1024 is not a multiple of 256 ranks x train",
        ),
        (["--gpus", "12", "--gpu", "h200"], "error: --gpus 12 does not fill nodes of --gpus_per_node 8"),
        (["--gpus", "16", "--gpu", "h200", "--parallel.shard", "5"], "error: parallel.shard 5 does not divide 16 GPUs"),
    ],
)
def test_bad_input(flags: list[str], fault: str) -> None:
    done = run_script(*BIG, *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(fault)
