"""wandb's history of a run: offline files as wandb itself writes them."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinyllama.config.args import DataArgs, LogArgs, PretrainArgs, Source, TrainArgs
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import open_packed
from tinyllama.monitor import wandb_logger
from tinyllama.monitor.metrics import RunLog
from tinyllama.train.run import Run

BLOCK = 32768  # of LevelDB's log format, in which wandb keeps a run


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take longer than a run would wait."""
    monkeypatch.setattr(wandb_logger, "INIT_TIMEOUT", 300)
    monkeypatch.setattr(wandb_logger, "FINISH_TIMEOUT", 300)


def history(out_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of every record in the offline runs below ``out_dir``, in order, by run id."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(out_dir.glob("wandb/offline-run-*/*.wandb")):
        found.setdefault(run_id := file.stem.removeprefix("run-"), [])
        data, at, payload = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if BLOCK - at % BLOCK < 7:  # no header fits: padding
                at += BLOCK - at % BLOCK
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            payload += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind not in (1, 4):  # full, or the last of several
                continue
            record, payload = Record.FromString(payload), b""
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found[run_id].append((items["_step"], items["loss"]))
    return found


def settled(out_dir: Path, steps: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The history of the one run there is, when it is ``steps``, or what it is after a minute.

    wandb's finish() may return while its own process still writes.
    """
    deadline = time.monotonic() + 300
    while True:
        (found,) = history(out_dir).values()
        if found == steps or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


@pytest.fixture
def run(packed_folder: Any, tmp_path: Path) -> Run:
    folder = packed_folder([[list(range(100))]])
    args = PretrainArgs(
        out_dir=str(tmp_path / "out"),
        data=DataArgs(sources=[Source(str(folder))]),
        train=TrainArgs(max_steps=9),
        log=LogArgs(wandb="offline"),
    )
    return Run(args, args.model.resolve(), [open_packed(folder)], [], Mixture([1], [1.0], 0, ["x"]), 1, 9, {}, None)


def log_steps(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.row({"step": step, "tokens": 8 * step, "loss": 10.0 - step})


def test_three_interruptions_leave_one_history(run: Run) -> None:
    pytest.importorskip("wandb")
    ids = set()
    # killed after step 5, 3 and 7; gone on from the checkpoints of steps 2, 2 and 6
    for after, last in ((None, 5), (2, 3), (2, 7), (6, 9)):
        with RunLog(run, after, speaks=True) as log:
            log_steps(log, (after or 0) + 1, last)
            ids.add(log.facts()["wandb_id"])
    expected = [(step, 10.0 - step) for step in range(1, 9)]  # 9 may still get a value
    assert settled(run.out_dir, expected) == expected
    assert set(history(run.out_dir)) == ids
    with RunLog(run, 9, speaks=True) as log:
        log.row({"step": 10, "tokens": 80, "loss": 0.0})
    expected.append((9, 1.0))
    assert settled(run.out_dir, expected) == expected


def test_what_was_logged_without_wandb_is_sent_later(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    with monkeypatch.context() as broken:
        broken.setitem(sys.modules, "wandb", None)
        log_steps(RunLog(run, None, speaks=True), 1, 4)
    with RunLog(run, 4, speaks=True) as log:
        log_steps(log, 5, 6)
    expected = [(step, 10.0 - step) for step in range(1, 6)]
    assert settled(run.out_dir, expected) == expected


def fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("the network is down\nand more lines")


@pytest.mark.parametrize(
    "wandb",
    [
        None,
        SimpleNamespace(),
        SimpleNamespace(init=fail, Settings=dict),
        SimpleNamespace(init=lambda **settings: SimpleNamespace(log=fail, finish=fail), Settings=dict),
    ],
)
def test_a_failing_wandb_stops_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wandb: Any
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with RunLog(run, None, speaks=True) as log:
        log_steps(log, 1, 5)
    assert len((run.out_dir / "metrics.csv").read_text().splitlines()) == 6
    assert capsys.readouterr().out.count("wandb is off from here, metrics.csv goes on: ") == 1
