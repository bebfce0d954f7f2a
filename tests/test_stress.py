"""Kills and worse, without end: what comes out is, bit for bit, what an undisturbed run makes. See `make stress`."""

import collections
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoint_rank import contents

ROOT = Path(__file__).parents[1]
DISTURBANCES = int(os.environ.get("STRESS_DISTURBANCES", 8))
SEED = int(os.environ.get("STRESS_SEED", 0))
STEPS = 3 * DISTURBANCES + 20  # most disturbances lose steps: 60 of them come to 100 and more


def losses(out_dir: Path) -> list[tuple[str, str]]:
    with (out_dir / "metrics.csv").open() as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture
def config_file(packed_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A run that saves all the time."""
    rng = np.random.default_rng(0)
    documents = [[int(3 + (start + i) % 250) for i in range(60)] + [2] for start in rng.integers(3, 250, 100)]
    config = {
        "model": {"name": "quickstart", "block_size": 32, "vocab_size": 256, "n_layer": 2, "n_embd": 32}
        | {"intermediate_size": 64},
        "data": {"sources": [{"path": str(packed_folder([documents], vocab_size=256))}]},
        "train": {"max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"}
        | {"timeout": 10, "start_timeout": 60},  # of the watchdog, which ends a run that has a stopped rank
        "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 5},
        "checkpoint": {"interval": 3, "keep_last": 2, "on_failure": "stop"},
        "log": {"interval": 1},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def mounts() -> list[str]:
    """What starts a command that may mount: root's, or a user namespace; [] where there is neither."""
    for command in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return []


def run(disturbances: int, config_file: Path, out_dir: Path) -> list[dict[str, Any]]:
    """What tests/helpers/stress_ranks.py says of each start."""
    namespace = mounts()
    driver = [sys.executable, ROOT / "tests" / "helpers" / "stress_ranks.py", *(["--mount"] if namespace else [])]
    command = [*namespace, *driver, disturbances, SEED, "--config", config_file, "--out_dir", out_dir]
    starts = []
    errors = out_dir.with_name(f"{out_dir.name}.stderr")
    with (
        errors.open("w") as file,
        subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True) as process,
    ):
        assert process.stdout
        for line in process.stdout:
            print(line, end="", flush=True)  # make stress shows it
            starts.append(json.loads(line))
    assert process.returncode == 0, errors.read_text()[-4000:]
    return starts


@pytest.mark.slow
def test_a_run_that_is_disturbed_again_and_again_is_the_undisturbed_one(config_file: Path, tmp_path: Path) -> None:
    ((straight),) = run(0, config_file, tmp_path / "straight")
    assert (straight["resumed"], straight["exit"]) == (0, 0)
    starts = run(DISTURBANCES, config_file, tmp_path / "disturbed")
    disturbed = [start for start in starts if start["came"]]
    print(f"seed {SEED}:", dict(collections.Counter(start["kind"] for start in disturbed)))
    assert len(disturbed) == DISTURBANCES
    assert starts[-1]["exit"] == 0
    for start, after in zip(starts, starts[1:], strict=False):
        assert after["resumed"] in (after["newest"], None), after
        if start["kind"] == "stop of a rank":
            assert "dead, stopped or stuck in C code: rank " in start["diagnosis"]
    assert sum(start["resumed"] is not None for start in starts) > DISTURBANCES / 2
    last = f"checkpoints/step-{STEPS:08d}"
    expected, found = (contents(tmp_path / name / last) for name in ("straight", "disturbed"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert losses(tmp_path / "disturbed") == losses(tmp_path / "straight")
