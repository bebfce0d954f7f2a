import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tinyllama.args import DataArgs, PretrainArgs, Source, TrainArgs
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import open_packed
from tinyllama.logger import COLUMNS, RunLog, console_line, duration
from tinyllama.run import Run


@pytest.fixture
def run(packed_folder: Any, tmp_path: Path) -> Run:
    folder = packed_folder([[list(range(100))]])
    args = PretrainArgs(
        out_dir=str(tmp_path / "out"), data=DataArgs(sources=[Source(str(folder))]), train=TrainArgs(max_steps=9)
    )
    dataset = open_packed(folder)
    return Run(args, args.model.resolve(), [dataset], [], Mixture([1], [1.0], 0, ["x"]), 1, 9, None)


def rows(run: Run) -> list[dict[str, str]]:
    with (run.out_dir / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_each_step_is_one_row_across_restarts(run: Run) -> None:
    log = RunLog(run, None, speaks=True)
    log.row({"step": 0, "tokens": 0, "val_loss": 7.5})
    for step in range(1, 5):
        log.row({"step": step, "tokens": 8 * step, "loss": 7.0 - step})
    log.row({"step": 4, "tokens": 32, "val_loss": 3.5})
    with (run.out_dir / "metrics.csv").open("a") as file:
        file.write("5,40,2.")  # killed while writing
    log = RunLog(run, 3, speaks=True)
    assert [row["step"] for row in rows(run)] == ["0", "1", "2", "3"]
    log.row({"step": 3, "tokens": 24, "val_loss": 4.5})
    log.row({"step": 4, "tokens": 32, "loss": 3.0})
    assert rows(run) == [
        {"step": "0", "tokens": "0", "val_loss": "7.5"},
        {"step": "1", "tokens": "8", "loss": "6.0"},
        {"step": "2", "tokens": "16", "loss": "5.0"},
        {"step": "3", "tokens": "24", "loss": "4.0", "val_loss": "4.5"},
        {"step": "4", "tokens": "32", "loss": "3.0"},
    ]
    assert (run.out_dir / "metrics.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    RunLog(run, None, speaks=True)
    assert rows(run) == []


def test_events_are_kept_and_other_ranks_are_silent(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    RunLog(run, None, speaks=True).event("start", "here we go", step=0)
    RunLog(run, 5, speaks=True).stop(step=7, reason="a spike")
    events = [json.loads(line) for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("start", 0), ("stop", 7)]
    assert json.loads((run.out_dir / "STOPPED").read_text()) == {"step": 7, "reason": "a spike"}
    said = capsys.readouterr().out
    assert said.startswith("here we go\n")
    silent = RunLog(run, 5, speaks=False)
    silent.row({"step": 6, "tokens": 1})
    silent.event("start", "nobody hears this")
    silent.stop(step=1)
    assert capsys.readouterr().out == ""
    assert len((run.out_dir / "events.jsonl").read_text().splitlines()) == 2


def test_a_console_line() -> None:
    row: dict[str, float | None] = {"step": 10, "loss": 2.34567, "lr": 4e-4, "grad_norm": 1.25, "mfu": None}
    row |= {"tokens_per_second": 24000.4, "max_memory_gb": 37.123, "skipped": 0}
    line = "loss 2.3457  lr 4.000e-04  grad_norm 1.250  24,000 tokens/s  memory 37.12 GB  1d 02h left"
    assert console_line(row, 1430512, 93784.0) == f"step      10/1430512  {line}"
    assert console_line({"step": 10, "mfu": 0.561, "skipped": 3}, 20, None) == "step 10/20  mfu 56.1%  skipped 3"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m 00s"), (3661, "1h 01m"), (90061, "1d 01h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
