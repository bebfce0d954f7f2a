"""What only several ranks can show, over NCCL: two GPUs, or two ranks that share one."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkpoints import load_weights
from needs import float8_on_gpu

from tinyllama.checkpoint.names import step_dir
from tinyllama.monitor.run_files import read_metrics
from tinyllama.monitor.watchdog import Heartbeat, read

ROOT = Path(__file__).parents[1]
CONFIG = {
    "model": {"name": "quickstart", "vocab_size": 512, "n_layer": 2, "n_embd": 256, "intermediate_size": 512},
    "train": {"max_steps": 12, "global_batch_size": 16, "micro_batch_size": 4, "precision": "fp32", "compile": False},
    "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2},
    "checkpoint": {"interval": 3},
    "log": {"interval": 1},
}

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(packed_folder: Callable[..., Path], tmp_path: Path) -> Iterator[Start]:
    """Start the recipe on so many GPUs, in a session of its own; what is left of it then would disturb other tests."""
    started: list[subprocess.Popen[bytes]] = []
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(3, 60, rng.integers(50, 900)).tolist(), 2] for _ in range(400)]
    data = {"sources": [{"path": str(packed_folder([documents], vocab_size=512))}]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**CONFIG, "data": data}))

    def run(name: str, gpus: int, *flags: object, script: str = "pretrain/train.py") -> "subprocess.Popen[bytes]":
        shares = gpus > torch.cuda.device_count()
        command = [sys.executable, *(["tests/helpers/share_gpu.py"] if shares else []), script]
        command += ["--config", tmp_path / "run.yaml", "--out_dir", tmp_path / name]
        command += [*([] if shares else ["--parallel.devices", gpus]), *flags]
        with (tmp_path / "stderr").open("w") as stderr:  # a file, for a rank that stands still never closes a pipe
            started.append(subprocess.Popen([*map(str, command)], cwd=ROOT, stderr=stderr, start_new_session=True))
        return started[-1]

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def alone(start: Start, tmp_path: Path) -> dict[int, float]:
    """Losses of the run on one GPU."""
    assert start("alone", 1).wait() == 0
    return losses(tmp_path / "alone")


def losses(out_dir: Path) -> dict[int, float]:
    rows = read_metrics(out_dir / "metrics.csv")
    return {int(row["step"]): float(row["loss"]) for row in rows if row["loss"]}


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--parallel.shard", "none"),
        ("--parallel.reshard_after_forward", "false"),
        ("--parallel.reshard_after_forward", "false", "--parallel.sync_every_micro_batch", "true"),
    ],
)
def test_two_gpus_learn_what_one_does(
    flags: tuple[str, ...], start: Start, alone: dict[int, float], tmp_path: Path
) -> None:
    assert start("two", 2, *flags).wait() == 0
    assert len(alone) == 12
    assert losses(tmp_path / "two") == pytest.approx(alone, rel=2e-5)


@pytest.mark.parametrize("reshard", ["true", "false"])
@pytest.mark.parametrize(("precision", "limit"), [("bf16", 5e-3), pytest.param("float8", 1e-2, marks=float8_on_gpu)])
def test_two_gpus_learn_compiled_and_in_few_bits_what_one_does(
    precision: str, limit: float, reshard: str, start: Start, tmp_path: Path
) -> None:
    flags = ["--train.precision", precision, "--train.compile", "true", "--parallel.reshard_after_forward", reshard]
    for gpus in (1, 2):
        assert start(str(gpus), gpus, *flags).wait() == 0, (tmp_path / "stderr").read_text()[-3000:]
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=limit)


@pytest.mark.parametrize(
    "flags",
    [
        ("--parallel.reshard_after_forward", "true"),
        ("--parallel.reshard_after_forward", "false"),
        ("--parallel.shard", "none"),
        ("--optim.name", "muon"),
    ],
)
def test_no_rank_waits_for_its_gpu_in_a_step(flags: tuple[str, ...], start: Start, tmp_path: Path) -> None:
    quiet = ["--train.precision", "bf16", "--log.interval", 12, "--checkpoint.interval", 12]
    ended = start("run", 2, *quiet, *flags, script="tests/helpers/no_wait_run.py").wait()
    assert ended == 0, (tmp_path / "stderr").read_text()[-3000:]


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_gpus(
    first: int, then: int, start: Start, alone: dict[int, float], tmp_path: Path
) -> None:
    assert start("run", first).wait() == 0
    for step in (9, 12):  # as if it had been killed after step 6
        shutil.rmtree(step_dir(tmp_path / "run" / "checkpoints", step))
    assert start("run", then).wait() == 0
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=2e-5)


# a watchdog that looks every second
LONG = ["--train.max_steps", 400, "--train.timeout", 10, "--checkpoint.interval", 50]


def test_a_signal_to_one_rank_stops_both_and_nothing_is_lost(start: Start, tmp_path: Path) -> None:
    script = "tests/helpers/deterministic_run.py"
    assert start("straight", 2, *LONG, script=script).wait() == 0
    stopped = start("stopped", 2, *LONG, script=script)
    os.kill(heartbeat(tmp_path / "stopped", rank=1, step=20).pid, signal.SIGTERM)
    assert stopped.wait(300) == 75
    assert start("stopped", 2, *LONG, script=script).wait() == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    ends = [load_weights(tmp_path / name / "checkpoints" / "step-00000400") for name in ("straight", "stopped")]
    assert all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items())


def test_a_rank_that_stands_still_is_named(start: Start, tmp_path: Path) -> None:
    run = start("run", 2, *LONG, "--train.max_steps", 100_000)
    os.kill(heartbeat(tmp_path / "run", rank=1, step=20).pid, signal.SIGSTOP)
    assert run.wait(300) == 1
    said = tmp_path / "run" / "heartbeat"
    assert "rank 1" in (tmp_path / "stderr").read_text()
    assert "rank 1" in (said / "verdict.txt").read_text()
    assert "fit" in (said / "rank-00000.stacks.txt").read_text()
    assert (said / "nccl_rank_0").stat().st_size > 0


def heartbeat(out_dir: Path, rank: int, step: int) -> Heartbeat:
    """The heartbeat of ``rank`` when it has done ``step``."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        for beat in read(out_dir / "heartbeat", 2):
            if beat.rank == rank and beat.step >= step:
                return beat
        time.sleep(0.05)
    raise AssertionError(f"rank {rank} of {out_dir} is not at step {step}")
