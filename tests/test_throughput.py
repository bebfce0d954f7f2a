import importlib.util
import os
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tinyllama.config.model import named_config
from tinyllama.ops.choice import OPERATIONS
from tinyllama.throughput import Meter, duration, flops_per_token, peak_flops


def test_mfu_of_the_published_run() -> None:
    # 24k tokens/s on an A100-40G is reported as 56 %
    mfu = 24e3 * flops_per_token(named_config("tinyllama_1.1b")) / 312e12
    assert mfu == pytest.approx(0.563, abs=1e-3)


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GH200 480GB", 989.5e12),
        ("NVIDIA H800", 989.5e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A1000", None),
        ("NVIDIA RTX A4000", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_peaks_by_the_name_the_driver_gives(device: str, peak: float | None) -> None:
    assert peak_flops(device) == peak


def test_flops_of_a_token() -> None:
    # 6 for each parameter of a product; attention's two products of 2 x 2048 x 2048 each, and twice that backward
    products = 22 * (2048 * (2560 + 2048 + 3 * 5632) + 2 * 2048) + 2048 + 2048 * 32000
    assert flops_per_token(named_config("tinyllama_1.1b")) == 6 * products + 22 * 3 * 2 * (2 * 2048 * 2048)


def test_meter_looks_at_ten_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = Meter()
    for number in range(12):
        now += 2
        meter.step(10)
        meter.step(2**number - 10)
        speed = meter.end_interval()
        now += 7  # between a pause and going on nothing counts
        meter.resume()
    assert speed == sum(2**number for number in range(2, 12)) / 20


def test_meter_leaves_out_what_is_not_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = Meter(window=2)
    now += 1
    meter.step(100)
    meter.pause()
    now += 50  # a validation
    meter.resume()
    now += 1
    meter.step(100)
    assert meter.end_interval() == 100
    now += 1
    meter.step(300)
    assert meter.end_interval() == 300  # the first interval, with the compilation, has gone
    now += 3
    meter.step(300)
    assert meter.end_interval() == 600 / 4
    now += 1
    meter.step(900)
    assert meter.end_interval() == 1200 / 4  # the second has left the window


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.4, "0s"), (59, "59s"), (59.6, "1m 00s"), (60, "1m 00s"), (3599, "59m 59s"), (3600, "1h 00m")),
        *((3660, "1h 01m"), (3661, "1h 01m"), (86399, "23h 59m"), (86400, "1d 00h"), (90061, "1d 01h")),
        (200_000, "2d 07h"),
    ],
)
def test_a_duration_has_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has kernels to count")
def test_kernels_are_not_counted_without_a_gpu(script) -> None:
    code, _, said = script("benchmark_step", "--budget")
    assert (code, said) == (2, "error: --budget needs a CUDA GPU, whose kernels it counts: leave it out\n")


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "scripts" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def benchmark_ops(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with every call made on the CPU, once, and said to take a millisecond."""
    module = benchmark("benchmark_ops")
    monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(module, "microseconds", lambda call: (call(), 1000.0)[1])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    return module


# 2 x 256 tokens, 4 heads of 32 over 2 groups, 128 channels, 384 hidden ones, 4 blocks, a vocabulary of 2,048
WORK = {
    "attention": (2 * 2 * 4 * 256 * 256 * 32 / 1e12, 0),
    "rope": (0, (2 * 2 * 512 * 8 * 32 + 2 * 4 * 256 * 16) / 1e9),
    "rms_norm": (0, 4 * 512 * 128 * 2 / 1e9),
    "swiglu": (3 * 2 * 512 * 128 * 384 / 1e12, 0),
    "symmetric_matmul": (2 * 4 * 128 * 128 * 384 / 1e12, 0),
    "cross_entropy": (2 * 512 * 128 * 2048 / 1e12, 0),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_is_measured_on_inputs_of_its_own(operation: str, benchmark_ops: ModuleType) -> None:
    config = named_config("quickstart")
    _, *work = benchmark_ops.cases(operation, config, 2)
    assert tuple(work) == WORK[operation]
    for name in ("reference", *{"sdpa", "torch", "chunked"} & OPERATIONS[operation].keys()):
        line = benchmark_ops.measure(operation, name, False, config, 2)
        assert "error" not in line
        assert line["forward_us"] == 1000
        assert ("forward_backward_us" in line) == (operation != "symmetric_matmul")


def test_an_operation_without_inputs_of_its_own_is_not_measured_on_those_of_another(benchmark_ops: ModuleType) -> None:
    with pytest.raises(KeyError, match="softmax"):
        benchmark_ops.cases("softmax", named_config("quickstart"), 2)


def test_what_needs_the_scales_of_a_model_is_not_measured_alone(benchmark_ops: ModuleType) -> None:
    line = benchmark_ops.measure("swiglu", "float8", False, named_config("quickstart"), 2)
    assert line["error"] == "it needs a model's scales: use benchmark_step.py --run ours:train.precision=float8"


@pytest.mark.parametrize(
    ("tokens", "run", "problem"),
    [
        (1000, "ours", "--tokens 1000 is not a multiple of the 512 of a micro-batch of --run ours: give 512 or 1024"),
        (100, "litgpt", "--tokens 100 is not a multiple of the 512 of a micro-batch of --run litgpt: give 512"),
        (800, "ours:3", "--tokens 800 is not a multiple of the 768 of a micro-batch of --run ours:3: give 768 or 1536"),
        (1024, "ours:0", "--run ours:0 has a micro-batch of 0: give 1 or more"),
        *(
            (512, f"ours:{key}=2", f"--run ours:{key}=2 cannot set {key}: --model, --tokens, --gpus and ours:NUMBER do")
            for key in ("model.block_size", "train.micro_batch_size", "train.global_batch_size", "parallel.devices")
        ),
    ],
)
@pytest.mark.parametrize("here", [(), ("--here",)])
def test_only_tokens_that_are_trained_are_counted(tokens: int, run: str, problem: str, here, script) -> None:
    flags = ["--model", "quickstart", "--micro_batch_size", 2, "--tokens", tokens, "--gpus", 2]
    assert script("benchmark_step", *flags, "--run", run, *here) == (2, "", f"error: {problem}\n")


@pytest.mark.parametrize(("in_a_row", "speed"), [(10, 102), (2, 512)])  # with a disturbance; without the waits
def test_the_speed_of_a_step_is_the_greater_of_two_that_are_printed_too(
    in_a_row: int, speed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, now = benchmark("benchmark_step"), 0
    seconds = iter([50, 9, 9, *(2, 8, 4), *[in_a_row] * 3])

    def step(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        nonlocal now
        assert [x.shape for pair in batches for x in pair] == [(2, 256)] * 4
        now += next(seconds)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setitem(module.RUNS, "ours", lambda *_: (step, {}))
    line = module.measure("ours", "quickstart", 1024, 3, 2, False, 1)
    assert (line["tokens_per_second_synchronized"], line["tokens_per_second_in_a_row"]) == (256, speed)
    assert line["tokens_per_second"] == max(256, speed)
    assert line["step_ms"] == 1000 * min(4, in_a_row)


@pytest.mark.parametrize("numbers", ["0", "two", "1,", "-1"])
def test_numbers_of_gpus(script, numbers) -> None:
    code, _, said = script("benchmark_step", f"--gpus={numbers}")
    assert (code, said) == (2, f"error: --gpus is {numbers!r}: give numbers, as in 1,2,4\n")


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("benchmark_checkpoint", "rounds"),
        *(("benchmark_data", flag) for flag in ("rounds", "megabytes")),
        ("benchmark_ops", "micro_batch_size"),
        *(("benchmark_step", flag) for flag in ("micro_batch_size", "tokens", "steps")),
    ],
)
@pytest.mark.parametrize("value", ["0", "-3", "1.5", "1" + "0" * 16])
def test_a_benchmark_refuses_what_is_no_count(name: str, flag: str, value: str, script) -> None:
    code, said, error = script(name, f"--{flag}={value}")
    assert (code, said) == (2, "")
    assert error.startswith(f"error: argument --{flag}: '{value}' is not a count: give a whole number from 1 to ")
    assert error.count("\n") == 1


def test_the_benchmark_of_data_names_what_it_cannot_read_before_it_writes(
    script, tokenizer_file: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "empty" / "pipe.txt")
    (tmp_path / "vocab.json").write_text("{}")
    for texts in ("missing", "empty", "vocab.json"):
        flags = ["--tokenizer", tokenizer_file, "--work", work, "--texts", tmp_path / texts]
        problem = f"error: --texts {tmp_path / texts} has no .txt files: give a folder that has some\n"
        assert script("benchmark_data", *flags) == (2, "", problem)
    os.mkfifo(pipe := tmp_path / "pipe.model")
    for tokenizer in (pipe, tmp_path / "missing.model", tmp_path / "vocab.json"):
        code, said, error = script("benchmark_data", "--tokenizer", tokenizer, "--work", work)
        assert (code, said) == (2, "")
        assert error.startswith("error: ")
        assert str(tokenizer) in error
        assert error.count("\n") == 1
    assert not work.exists()
