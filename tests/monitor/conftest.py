"""A run that is to be logged, runs to report on, and a browser to open the report in."""

import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from reports import STEPS, TOKENS

from tinyllama.config.args import DataArgs, ModelArgs, OptimArgs, PretrainArgs, Source, TrainArgs
from tinyllama.config.model import named_config
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import open_packed
from tinyllama.monitor.run_files import COLUMNS
from tinyllama.train.launch import World
from tinyllama.train.run import Run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes what a run of STEPS steps leaves behind, interrupted three times."""

    def make(name: str, height: float = 4.0, steps: int = STEPS) -> Path:
        out_dir = tmp_path / name
        out_dir.mkdir()
        with (out_dir / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, "tokens_prose", "tokens_code"])
            writer.writeheader()
            for step in range(steps + 1):
                row: dict[str, Any] = {"step": step, "tokens": step * TOKENS}
                if step:
                    row |= {"loss": height + math.exp(-step / 9) + 0.01 * (step % 3), "lr": 1e-3 / step, "skipped": 0}
                    row |= {"grad_norm": 1 + 1 / step, "tokens_per_second": 1000 + step, "mfu": 0.5 + step / 1000}
                    row |= {"step_seconds": 0.75, "data_seconds": 0.25}
                    row |= {"max_memory_gb": 2 + step / 100, "tokens_prose": step * 3072, "tokens_code": step * 1024}
                if step % 10 == 0:
                    row["val_loss"] = height + 1 / (step + 1)
                    row["val_bpb"] = row["val_loss"] / 3
                writer.writerow(row)
        events = [{"time": 0, "event": "start", "step": 0, "world_size": 2}]
        for n, step in enumerate((10, 20, 30)):
            events += [{"time": 60 * step, "event": "checkpoint", "step": step, "seconds": 0.5}]
            events += [{"time": 60 * step + n, "event": "start", "step": step, "world_size": 2}]
        events.insert(4, {"time": 900, "event": "skip", "step": 15, "loss": 9.5, "finite": True})
        events.append({"time": 7000, "event": "checkpoint_failed", "step": None, "reason": "disk full"})
        lines = [json.dumps(event) + "\n" for event in [*events, {"time": 7260, "event": "done", "step": steps}]]
        (out_dir / "events.jsonl").write_text("".join(lines) + '{"time": 99, "eve')  # and one half written
        config = {"model": vars(named_config("quickstart")), "train": {"global_batch_size": 16}}
        (out_dir / "config.yaml").write_text(yaml.safe_dump(config))
        scores = [f"{step},{step * TOKENS},hellaswag,acc_norm,{0.25 + step / 1000}\n" for step in (10, 20)]
        (out_dir / "eval.csv").write_text("step,tokens,task,metric,value\n" + "".join(scores))
        return out_dir

    return make


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Debian's chromium and chromium-driver: apt install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


@pytest.fixture
def run(packed_folder: Any, tmp_path: Path) -> Run:
    """A run of nine steps on one rank."""
    folder = packed_folder([[list(range(100))]])
    args = PretrainArgs(
        out_dir=str(tmp_path / "out"),
        model=ModelArgs(block_size=32),
        data=DataArgs(sources=[Source(str(folder))]),
        optim=OptimArgs(warmup_steps=0),
        train=TrainArgs(max_steps=9),
    )
    dataset = open_packed(folder)
    return Run(args, args.model.resolve(), World(1, 1, 1), [dataset], [], Mixture([1], [1.0], 0, ["x"]), 1, {}, None)
