"""What only a GPU can show: `pytest -m gpu` on a machine that has one."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tinyllama.config import ModelConfig
from tinyllama.model import GPT, OPS, Block, init_weights
from tinyllama.ops import choice

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda")
CONFIG = ModelConfig("tiny", block_size=256, vocab_size=512, n_layer=2, n_head=4, n_query_groups=2, n_embd=256)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


@pytest.fixture
def train(packed_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., list[float]]:
    """Run the recipe in a process of its own; gives the losses of its steps."""
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(3, 60, rng.integers(50, 900)).tolist(), 2] for _ in range(400)]
    config = {
        "model": {"name": "quickstart", "vocab_size": 512, "n_layer": 2, "n_embd": 256, "intermediate_size": 512},
        "data": {"sources": [{"path": str(packed_folder([documents], vocab_size=512))}]},
        "train": {"max_steps": 12, "global_batch_size": 16, "micro_batch_size": 8},
        "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 2},
        "checkpoint": {"interval": 6},
        "log": {"interval": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def run(name: str, *flags: object) -> list[float]:
        command = [sys.executable, "pretrain/train.py", "--config", tmp_path / "run.yaml", "--out_dir", tmp_path / name]
        done = subprocess.run([*map(str, command), *map(str, flags)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        with (tmp_path / name / "metrics.csv").open() as file:
            return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]

    return run


def test_a_compiled_block_is_the_eager_one() -> None:
    model = GPT(CONFIG, OPS | {"attention": "sdpa_cudnn"}).to(GPU)
    init_weights(model, seed=0)
    block: Block = model.transformer["h"][0].bfloat16()
    cos, sin = model.rope_tables(GPU)
    x = torch.randn(2, 256, 256, device=GPU, dtype=torch.bfloat16)
    results = []
    for forward in (block.forward, torch.compile(block.forward, fullgraph=True)):
        given = x.clone().requires_grad_()
        y = forward(given, cos, sin)
        gradients = torch.autograd.grad(y.float().square().sum(), [given, *block.parameters()])
        results.append([y.detach(), *gradients])
    for eager, compiled in zip(*results, strict=True):
        # the same sums in bf16, rounded at other places
        assert (eager - compiled).float().norm() <= 2e-2 * eager.float().norm()


def test_the_fused_run_learns_what_the_reference_does(train: Callable[..., list[float]]) -> None:
    plain = ["--train.precision", "fp32", "--train.compile", "false", "--ops.cross_entropy", "reference"]
    reference = train("reference", *plain, "--ops.attention", "reference")
    assert train("fused") == pytest.approx(reference, rel=5e-3)
    masked = train("masked", "--data.document_mask", "--ops.attention", "flex")
    apart = train("apart", *plain, "--ops.attention", "reference", "--data.document_mask")
    assert masked == pytest.approx(apart, rel=5e-3)
    if torch.cuda.get_device_capability() >= (8, 9):
        assert train("float8", "--train.precision", "float8") == pytest.approx(reference, rel=2e-2)


def test_a_resumed_run_is_the_straight_run(train: Callable[..., list[float]], tmp_path: Path) -> None:
    straight = train("straight")
    resumed = train("resumed", "--train.resume", tmp_path / "straight" / "checkpoints" / "step-00000006")
    assert resumed == pytest.approx(straight[6:], rel=1e-3)


def test_recomputing_changes_memory_not_losses(train: Callable[..., list[float]]) -> None:
    kept = train("kept")
    for what in ("selective", "full"):
        assert train(what, "--train.activation_checkpointing", what) == pytest.approx(kept, rel=2e-3)


def test_auto_says_what_it_chose(train: Callable[..., list[float]], tmp_path: Path) -> None:
    train("run", "--train.max_steps", 3)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events[0]["ops"] == choice.resolve({}, GPU, dtype=torch.bfloat16)
    assert events[0]["ops"]["cross_entropy"] == "chunked"
