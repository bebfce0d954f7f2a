"""Fixtures of tests that run the recipe."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from runs import World

from tinyllama.train import lock

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world() -> Iterator[Callable[..., World]]:
    worlds: dict[tuple[int, ...], World] = {}

    def get(*size: int) -> World:
        if size in worlds and not worlds[size].alive():  # a test has failed for it, which should not fail the others
            worlds.pop(size).kill()
        if size not in worlds:
            worlds[size] = World(*size)
        return worlds[size]

    yield get
    for started in worlds.values():
        started.end()


@pytest.fixture
def config(packed_folder: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """A run of 40 steps on two sources; documents count up or down, so that there is something to learn."""
    rng = np.random.default_rng(0)

    def documents(step: int, count: int = 60) -> list[list[int]]:
        starts = rng.integers(3, 250, count)
        return [[int(3 + (start + step * i) % 250) for i in range(rng.integers(5, 90))] + [2] for start in starts]

    up = packed_folder([documents(1), documents(1)], name="up", vocab_size=256)
    down = packed_folder([documents(-1)], name="down", vocab_size=256)
    held_out = packed_folder([documents(1, count=15)], name="held_out", vocab_size=256)
    return {
        "model": {"name": "quickstart", "block_size": 32, "vocab_size": 256, "n_layer": 2, "n_embd": 32}
        | {"intermediate_size": 64},
        "data": {
            "sources": [{"path": str(up), "weight": 0.7}, {"path": str(down), "weight": 0.3}],
            "validation": [{"path": str(held_out)}],
        },
        "train": {"max_steps": 40, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 5},
        "eval": {"interval": 20, "max_samples": None},
        "checkpoint": {"interval": 20, "asynchronous": False},
        "log": {"interval": 1},
    }


@pytest.fixture
def config_file(config: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="session")
def _straight() -> dict[int, Path]:
    return {}


@pytest.fixture
def straight(
    world: Callable[[int], World],
    config_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    _straight: dict[int, Path],
) -> Callable[[int], Path]:
    """A function that gives the folder of ``config`` run to its end on so many ranks, which tests only read."""

    def run(size: int) -> Path:
        if size not in _straight:
            out_dir = tmp_path_factory.mktemp("straight") / "run"
            world(size).train("--config", config_file, "--out_dir", out_dir)
            _straight[size] = out_dir
        return _straight[size]

    return run


@pytest.fixture(scope="module")
def recipe() -> Any:
    """pretrain/train.py as a module, for what it finds before anything is started."""
    spec = importlib.util.spec_from_file_location("the_recipe", ROOT / "pretrain" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_slurm_and_a_quick_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "STALE", 300.0)  # only a heartbeat ends the wait


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For files that nobody touches: the wait has nothing to see."""
    monkeypatch.setattr(lock, "STALE", 0.1)
