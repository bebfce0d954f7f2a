"""What a run shows in a terminal and in a job's output: the bar, lines, frames and colors."""

import contextlib
import dataclasses
import json
import os
import pty
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from tinyllama.checkpoint.state import TrainState
from tinyllama.monitor.console import end_summary, show_summary, start_summary
from tinyllama.monitor.metrics import RunLog
from tinyllama.train.anomaly import StepResult
from tinyllama.train.launch import World
from tinyllama.train.run import Run


def test_the_summaries_say_what_will_happen_and_what_happened(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    two_ranks = dataclasses.replace(run, world=World(nodes=1, local_ranks=2, shard=2))
    show_summary("pretrain", start_summary(two_ranks, "master float32", ["here: ranks 0 1"]))
    said = capsys.readouterr().out
    assert "model    tinyllama_1.1b: 1,100,048,384 parameters, context 32\n" in said
    assert "saves    every 5,000 steps, on a signal and at the end, in the background; the newest 3 and" in said
    assert " 13.2 GB each, " in said  # 12 bytes a parameter
    with RunLog(run, None, is_rank_zero=True) as log:
        log.row({"step": 1, "tokens": 100, "loss": 3.0, "tokens_per_second": 10.0})
        log.row({"step": 2, "tokens": 200, "loss": 2.5, "tokens_per_second": 40.0})
        for val_loss in (2.75, 2.25, 2.5):
            with log.time_spent("validation", 2):
                log.row({"step": 2, "tokens": 200, "val_loss": val_loss})
        with log.time_spent("checkpoints", 2):
            pass
        (run.out_dir / "checkpoints" / "step-00000009").mkdir(parents=True)
        log.end(TrainState(step=9, tokens=900), None)
    said = capsys.readouterr().out
    assert "val_loss 2.2500  the best so far\nstep 2/9  val_loss 2.5000  best 2.2500\n" in said
    assert "checkpoint of step 2 is on disk: training waited 0.0 s for it\n" in said
    assert "val_loss 2.5000 at step 2, best 2.5000 at step 2\n" in said  # metrics.csv has one value a step
    assert "tokens   900 in all; 16 tokens/s on average\n" in said  # 10 s and 2.5 s
    assert f"saved    {run.out_dir}/checkpoints/step-00000009\n" in said
    convert = f"python scripts/convert_lit_checkpoint.py {run.out_dir} {run.out_dir / 'hf'} --tokenizer TOKENIZER\n"
    assert f"next     {convert}" in said  # verified by default: no flag for it
    assert said.endswith(f"done: 9 steps, 900 tokens, in {run.out_dir}\n")
    events = [json.loads(line) for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("checkpoint", 2), ("done", 9)]
    assert set(events[1]["seconds"]) == {"training", "validation", "checkpoints"}


def in_terminal(columns: int, write: Callable[[], None]) -> bytes:
    """Return what ``write`` writes to stdout if that is a terminal of ``columns`` columns."""
    reader, writer = pty.openpty()
    with (
        os.fdopen(writer, "w", encoding="utf-8") as terminal,
        contextlib.redirect_stdout(terminal),
        pytest.MonkeyPatch.context() as env,
    ):
        env.setenv("TERM", "xterm-256color")
        env.setenv("COLUMNS", str(columns))
        env.delenv("NO_COLOR", raising=False)
        write()
    said = b""
    with contextlib.suppress(OSError):  # a terminal that nobody writes to any more
        while chunk := os.read(reader, 65536):
            said += chunk
    os.close(reader)
    return said


def test_a_terminal_gets_a_bar_and_the_lines_that_count(run: Run) -> None:
    """The same through a pseudo-terminal."""

    def write() -> None:
        show_summary("pretrain", start_summary(run, "master float32", ["here: rank 0"]))
        with RunLog(run, None, is_rank_zero=True) as log:
            log.row({"step": 3, "tokens": 100, "loss": 3.25}, seconds_left=61)
            log.event("skip", "skipped step 4")

    said = in_terminal(60, write)  # as narrow as a phone's
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode())
    assert "─ pretrain ─" in plain
    assert all(len(line) <= 60 for line in plain.replace("\r", "\n").split("\n"))
    assert "step 3/9  33.3%  1m 01s left" in plain
    assert "loss 3.2500" in plain
    assert b"\x1b[36m\xe2\x94\x81" in said  # the bar is cyan: red is for alarms
    assert "skipped step 4\r\n" in plain
    assert said.rstrip().endswith(b"\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize("columns", [40, 100])
def test_what_a_person_copies_stands_below_the_frame_as_it_is(
    run: Run, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain/train.py", "--config", "configs/of_a_rather_long_name.yaml"])
    saved = run.out_dir / "checkpoints/step-00000002"
    saved.mkdir(parents=True)
    rows = [{"step": 2, "tokens": 64, "val_loss": 2.5} | {f"val_loss/{name}": 2.5 for name in ("web", "code")}]
    summary = end_summary(run, rows, {"training": 1.0}, TrainState(step=2, tokens=64))
    said = in_terminal(columns, lambda: show_summary("stopped", summary))
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode()).splitlines()
    frame = next(number for number, line in enumerate(plain) if line.startswith("╰"))
    assert any("web 2.5000, code 2.5000" in line for line in plain[:frame])  # to be read
    assert plain[frame + 1 :] == [
        f"saved    {saved}",
        "next     python pretrain/train.py --config configs/of_a_rather_long_name.yaml    # resumes from there",
        f"         python scripts/generate.py {run.out_dir} --tokenizer TOKENIZER --prompt TEXT",
        f"         python scripts/report.py {run.out_dir}",
    ]


@pytest.mark.parametrize(
    ("name", "details", "text", "is_alarm"),
    [
        *[("stop", {"by": by}, "stopped", False) for by in ("SIGTERM", "SIGUSR1", "SIGINT", "train.max_time")],
        ("stop", {"by": "checkpoint.on_failure"}, "stopped", True),
        ("stop", {"reason": "a spike"}, "stopped for good", True),
        ("checkpoint_failed", {}, "error: no space left", True),
        ("checkpoint", {}, "checkpoint of step 3", False),
    ],
)
def test_red_in_a_terminal_is_for_errors_and_stops_that_nobody_asked_for(
    run: Run, name: str, details: dict[str, Any], text: str, is_alarm: bool
) -> None:
    def write() -> None:
        with RunLog(run, None, is_rank_zero=True) as log:
            log.event(name, text, step=3, **details)

    said = in_terminal(100, write)
    assert text.encode() in said
    assert (b"\x1b[1;31m" + text.encode() in said) is is_alarm


def done(step: int) -> StepResult:
    return StepResult(step, (0, 0), 3.0, 1.0, finite=True, skipped=False, fatal=False, ranks=[])


def test_the_time_left_does_not_count_the_first_step(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def steps(log: RunLog, *results: tuple[float, list[int]]) -> None:
        for seconds, steps in results:
            now[0] += seconds
            log.record_skips([done(step) for step in steps])

    with RunLog(run, None, is_rank_zero=True) as log:
        steps(log, (60.0, []), (2.0, [1]), (2.0, [2]), (2.0, [3, 4]))
        log.row({"step": 4, "tokens": 32, "loss": 3.0}, seconds_left=82.5)  # by a meter that counts the first step
        steps(log, (2.0, []), (2.0, [5, 6]))
        log.row({"step": 6, "tokens": 48, "loss": 2.5}, seconds_left=6.0)
    expected = ["step 4/9  loss 3.0000  10s left", "step 6/9  loss 2.5000  6s left"]
    assert capsys.readouterr().out.splitlines() == expected
    (run.out_dir / "metrics.csv").unlink()
    with RunLog(run, None, is_rank_zero=True) as log:
        steps(log, (60.0, [1]))
        log.row({"step": 1, "tokens": 8, "loss": 3.0}, seconds_left=480.0)
        steps(log, (2.0, [2]))
        log.row({"step": 2, "tokens": 16, "loss": 2.5}, seconds_left=14.0)
    assert capsys.readouterr().out.splitlines() == ["step 1/9  loss 3.0000", "step 2/9  loss 2.5000  14s left"]

    def write() -> None:
        with RunLog(run, None, is_rank_zero=True) as log:
            steps(log, (60.0, [1]), (2.0, [2]), (2.0, [3]))  # and no row yet

    assert "step 3/9  33.3%  12s left" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", in_terminal(60, write).decode())
