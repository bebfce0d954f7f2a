"""log.on_event: what the command is told and when, and that nothing it does harms the run."""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tinyllama.checkpoint.state import TrainState
from tinyllama.config.args import DataArgs, LogArgs, ModelArgs, OptimArgs, PretrainArgs, Source, TrainArgs
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import open_packed
from tinyllama.monitor import hook
from tinyllama.monitor.hook import Hook
from tinyllama.monitor.metrics import RunLog
from tinyllama.train.anomaly import StepResult
from tinyllama.train.launch import World
from tinyllama.train.run import Run

WRITE = 'echo "$TINYLLAMA_EVENT $(basename "$TINYLLAMA_OUT_DIR") $TINYLLAMA_MESSAGE"'  # into on_event.log


@pytest.fixture
def run(packed_folder: Any, tmp_path: Path) -> Run:
    folder = packed_folder([[[3] * 99]], eos=False)
    args = PretrainArgs(
        out_dir=str(tmp_path / "out"),
        model=ModelArgs(block_size=8),
        data=DataArgs(sources=[Source(str(folder))]),
        optim=OptimArgs(warmup_steps=1),
        train=TrainArgs(max_steps=9, global_batch_size=1, micro_batch_size=1),
        log=LogArgs(on_event=WRITE),
    )
    dataset = open_packed(folder)
    return Run(args, args.model.resolve(), World(1, 1, 1), [dataset], [], Mixture([11], [1.0], 0, ["x"]), 1, {}, None)


def told(run: Run) -> list[str]:
    return (run.out_dir / "on_event.log").read_text().splitlines()


def skipped(fatal: bool) -> StepResult:
    names = {field.name for field in dataclasses.fields(StepResult)}
    values = {"step": 3, "samples": (2, 2), "loss": float("nan"), "grad_norm": 1.0, "skipped": True, "finite": False}
    values |= {"ranks": [3], "fatal": fatal}
    assert values.keys() == names
    return StepResult(**values)


def of_a_signal(log: RunLog) -> None:
    log.end(TrainState(step=3, tokens=24), "SIGUSR1")


def of_a_failed_save(log: RunLog) -> None:
    log.event("checkpoint_failed", "error: disk full", step=3)
    assert log._hook is not None
    log._hook.wait()
    log.end(TrainState(step=3, tokens=24), "checkpoint.on_failure")


def of_a_nan(log: RunLog) -> None:
    log.record_skips([skipped(fatal=True)])


def of_an_exception(log: RunLog) -> None:
    raise RuntimeError("NCCL error")


ENDS: list[tuple[Callable[[RunLog], None], list[str]]] = [
    (lambda log: log.end(TrainState(step=9, tokens=72), None), ["finished out done: 9 steps, 72 tokens"]),
    (of_a_signal, ["stopped out stopped by SIGUSR1 at step 3"]),
    (of_a_failed_save, ["anomaly out error: disk full", "failed out stopped by checkpoint.on_failure"]),
    (of_a_nan, ["anomaly out skipped step 3", "failed out stopped for good"]),
    (of_an_exception, ["failed out RuntimeError: NCCL error"]),
]


@pytest.mark.parametrize(("end", "expected"), ENDS)
def test_the_command_is_told_how_the_run_starts_and_ends(
    run: Run, end: Callable[[RunLog], None], expected: list[str]
) -> None:
    try:
        with RunLog(run, None, is_rank_zero=True) as log:
            log.event("start", "start    a new run at step 0", "changed  nothing")
            assert log._hook is not None
            log._hook.wait()  # an anomaly meanwhile would be left out
            end(log)
    except RuntimeError:
        assert end is of_an_exception
    started, *others = told(run)
    assert started == "started out start    a new run at step 0; changed  nothing"
    assert [line[: len(text)] for line, text in zip(others, expected, strict=True)] == expected


def test_other_ranks_run_nothing(run: Run) -> None:
    with RunLog(run, None, is_rank_zero=False) as log:
        log.event("start", "start    a new run at step 0")
        log.failed("a stall")
    assert not run.out_dir.exists()


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("exit 3", "exit status 3"),
        ("no-such-command-anywhere", "exit status 127"),
        ("sleep 1000 & sleep 1000", "killed after 0.2 s"),
        ("trap '' TERM; sleep 1000", "killed after 0.2 s"),
        ("\0", "ValueError: embedded null byte"),
    ],
)
def test_a_command_that_fails_or_hangs_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, problem: str
) -> None:
    monkeypatch.setattr(hook, "LIMIT", 0.2)
    said: list[str] = []
    on_event = Hook(command, tmp_path, said.append)
    on_event("started", "now")
    on_event.wait()
    assert said == [f"log.on_event failed for 'started': {problem}; see {tmp_path / 'on_event.log'}"]


def test_a_killed_command_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook, "LIMIT", 0.5)
    on_event = Hook("sleep 1000 & echo $!; wait", tmp_path, lambda text: None)
    on_event("started", "now")
    on_event.wait()
    child = int((tmp_path / "on_event.log").read_text())
    while os.path.exists(f"/proc/{child}") and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        time.sleep(0.01)  # the kill has been sent


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path: Path) -> None:
    said: list[str] = []
    on_event = Hook("true", tmp_path / "absent", said.append)
    on_event("failed", "now")
    on_event.wait()
    assert len(said) == 1
    assert "FileNotFoundError" in said[0]


def test_anomalies_during_a_command_are_left_out_and_an_end_is_not(tmp_path: Path) -> None:
    on_event = Hook(f"{WRITE}; while [ ! -e {tmp_path}/go ]; do sleep 0.01; done", tmp_path, lambda text: None)
    on_event("started", "1")
    for number in range(2, 50):
        on_event("anomaly", str(number))
    (tmp_path / "go").touch()
    on_event("finished", "50")
    on_event.wait()
    name = tmp_path.name
    assert (tmp_path / "on_event.log").read_text() == f"started {name} 1\nfinished {name} 50\n"
