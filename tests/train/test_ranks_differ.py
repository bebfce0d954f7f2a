"""Ranks that found other settings, packed data or backends than rank 0: the run is refused, and says what differs."""

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import World

from tinyllama.train.run import PACKAGE

HOST = socket.gethostname()


@pytest.fixture
def start(world: Callable[..., World], config_file: Path, tmp_path: Path) -> Callable[..., list[Any]]:
    """A function that runs the recipe on three ranks, one of which has flags of its own, and gives their answers."""

    def run(rank: int, *flags: str) -> list[Any]:
        common = ["--config", config_file, "--out_dir", tmp_path / "run", "--train.global_batch_size", 12]
        command = "train_with_flags_of_one_rank"
        return world(3)(command, rank, json.dumps(flags), *common, "--train.max_steps", 2, "--optim.warmup_steps", 0)

    return run


@pytest.mark.parametrize(
    ("rank", "flags", "difference"),
    [
        (1, ["--optim.lr=0.02"], "optim.lr is 0.01 and 0.02"),
        (2, ["--train.micro_batch_size=4"], "train.micro_batch_size is 2 and 4"),
        (2, ["--ops.rms_norm=torch"], "ops.rms_norm is reference and torch"),
        (1, ["--data.seed=7", "--model.n_head=2"], "model.n_head is 4 and 2; data.seed is 3407 and 7"),
    ],
)
def test_what_differs_is_named_and_nothing_is_written(start, tmp_path, rank, flags, difference):
    problem = f"rank 0 ({HOST}) and rank {rank} ({HOST}) differ: {difference}: "
    problem += "start every rank with the same command, code, packed data and packages"
    assert [answer["problems"] for answer in start(rank, *flags)] == [[problem]] * 3
    assert not (tmp_path / "run").exists()


def test_code_may_lie_elsewhere_and_not_be_other(world, config_file, tmp_path):
    copy = shutil.copytree(PACKAGE, tmp_path / "tinyllama")
    flags = ["--config", config_file, "--out_dir", tmp_path / "run", "--train.global_batch_size", 12]
    flags += ["--train.max_steps", 2, "--optim.warmup_steps", 0]
    of_one = ("train_with_code_of_one_rank", 1, copy, *flags)
    assert [answer.get("result") for answer in world(3)(*of_one)] == [0] * 3
    shutil.rmtree(tmp_path / "run")
    with (copy / "train" / "schedule.py").open("a") as file:
        file.write("# edited on one node only\n")
    for answer in world(3)(*of_one):
        (problem,) = answer["problems"]
        assert problem.startswith(f"rank 0 ({HOST}) and rank 1 ({HOST}) differ: code is ")
        assert problem.endswith(": start every rank with the same command, code, packed data and packages")
        shown = re.findall("[0-9a-f]{64}", problem)
        assert len(set(shown)) == 2
    assert not (tmp_path / "run").exists()


def test_packed_data_may_lie_elsewhere_and_not_be_other(start, config, tmp_path):
    up, down = (source["path"] for source in config["data"]["sources"])
    copy = shutil.copytree(up, tmp_path / "copy")
    sources = [{"path": str(copy), "weight": 0.7}, {"path": down, "weight": 0.3}]
    assert [answer.get("result") for answer in start(1, f"--data.sources={json.dumps(sources)}")] == [0] * 3
    sources = [{"path": down, "weight": 0.7}, {"path": up, "weight": 0.3}]
    shutil.rmtree(tmp_path / "run")
    for answer in start(1, f"--data.sources={json.dumps(sources)}"):
        assert "data.sources[0].fingerprint is" in answer["problems"][0]
        assert "data.sources[1].fingerprint is" in answer["problems"][0]
    validation = f'--data.validation=[{{"path": "{down}"}}]'
    for answer in start(2, validation):
        assert "rank 2" in answer["problems"][0]
        assert "differ: data.validation[0] is" in answer["problems"][0]
