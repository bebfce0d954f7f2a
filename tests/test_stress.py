"""Kills without end: what comes out is, bit for bit, what an undisturbed run makes. `make stress` does 50 of them."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkpoint_rank import contents

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("STRESS_KILLS", 8))


def losses(out_dir: Path) -> list[tuple[str, str]]:
    with (out_dir / "metrics.csv").open() as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_undisturbed_one(
    packed_folder: Callable[..., Path], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    documents = [[int(3 + (start + i) % 250) for i in range(60)] + [2] for start in rng.integers(3, 250, 100)]
    steps = 10 * KILLS
    config = {
        "model": {"name": "quickstart", "block_size": 32, "vocab_size": 256, "n_layer": 2, "n_embd": 32}
        | {"intermediate_size": 64},
        "data": {"sources": [{"path": str(packed_folder([documents], vocab_size=256))}]},
        "train": {"max_steps": steps, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
        "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 5},
        "checkpoint": {"interval": 3, "keep_last": 2},
        "log": {"interval": 1},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))

    def run(kills: int, out_dir: Path) -> list:
        command = [sys.executable, ROOT / "tests" / "helpers" / "stress_ranks.py", str(kills), "--config", path]
        done = subprocess.run([*command, "--out_dir", out_dir], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]

    assert run(0, tmp_path / "straight") == [[0, 0, [0, 0]]]
    starts = run(KILLS, tmp_path / "killed")
    assert sum(-signal.SIGKILL in codes for _, _, codes in starts) == KILLS
    assert starts[-1][2] == [0, 0]
    for newest, went_on, _ in starts:
        assert went_on in (newest, None)
    assert sum(went_on is not None for _, went_on, _ in starts) > KILLS / 2
    last = f"checkpoints/step-{steps:08d}"
    expected, found = (contents(tmp_path / name / last) for name in ("straight", "killed"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
