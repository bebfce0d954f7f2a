import contextlib
import csv
import dataclasses
import importlib.metadata
import io
import json
import os
import pty
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from limits import files_up_to

from tinyllama import InputError
from tinyllama.checkpoint.state import TrainState
from tinyllama.config import cli
from tinyllama.config.args import DataArgs, ModelArgs, OptimArgs, PretrainArgs, Source, TrainArgs
from tinyllama.config.model import ModelConfig
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import open_packed
from tinyllama.model import GPT
from tinyllama.monitor.console import console_line, end_summary, mean_speed, show_summary, start_summary
from tinyllama.monitor.metrics import RunLog, max_memory_gb, source_columns
from tinyllama.monitor.run_files import COLUMNS, read_metrics, read_samples
from tinyllama.train.anomaly import StepResult
from tinyllama.train.evaluate import source_names
from tinyllama.train.launch import World
from tinyllama.train.run import Run


@pytest.fixture
def run(packed_folder: Any, tmp_path: Path) -> Run:
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


def rows(run: Run) -> list[dict[str, str]]:
    with (run.out_dir / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v and k != "tokens_packed"} for row in csv.DictReader(file)]


def test_each_step_is_one_row_across_restarts(run: Run) -> None:
    log = RunLog(run, None, is_rank_zero=True)
    log.row({"step": 0, "tokens": 0, "val_loss": 7.5})
    for step in range(1, 5):
        log.row({"step": step, "tokens": 8 * step, "loss": 7.0 - step})
    log.row({"step": 4, "tokens": 32, "val_loss": 3.5})
    with (run.out_dir / "metrics.csv").open("a") as file:
        file.write("5,40,2.")  # killed while writing
    log = RunLog(run, 3, is_rank_zero=True)
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
    assert (run.out_dir / "metrics.csv").read_text().splitlines()[0] == ",".join([*COLUMNS, "tokens_packed"])
    RunLog(run, None, is_rank_zero=True)
    assert rows(run) == []


def test_damaged_rows_are_left_out(run: Run) -> None:
    log = RunLog(run, None, is_rank_zero=True)
    log.row({"step": 1, "tokens": 8, "loss": float("inf"), "val_loss": 7.5})
    good = (run.out_dir / "metrics.csv").read_text()
    head, last = good.splitlines()
    empty = "," * (head.count(",") - 1)  # the cells after step and tokens
    for cells in (
        *["2,,1,1", "2,16", f"2,abc,2{empty[1:]}", f"2,16,abc,def{empty[2:]}", f"²,16{empty}", f"-2,16{empty}"],
        *["9" * 5000 + f",16{empty}", "2," + "9" * 400 + empty, '2,"' + "9" * 200_000 + f'"{empty}'],
        *[f"2,16{empty},", f'2,"16{empty}', f"2,{empty}", f"2,16,1e{empty[1:]}", ""],
    ):
        (run.out_dir / "metrics.csv").write_text(f"{head}\n{cells}\n{last}\n")
        assert [row["loss"] for row in read_metrics(run.out_dir / "metrics.csv")] == [float("inf")], cells
        damaged = (run.out_dir / "metrics.csv").read_bytes()
        with RunLog(run, 2, is_rank_zero=True) as log:
            assert rows(run) == [{"step": "1", "tokens": "8", "loss": "inf", "val_loss": "7.5"}]
            assert (run.out_dir / "metrics.csv.damaged").read_bytes() == damaged
            log.end(TrainState(step=2, tokens=16), None)
    (run.out_dir / "metrics.csv").write_text(f"{head},note\n{last},good\n")  # a column of the user's
    assert [row["note"] for row in read_metrics(run.out_dir / "metrics.csv")] == ["good"]


def test_what_a_damaged_file_was_is_kept_and_told(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(run, None, is_rank_zero=True) as log:
        for step in (1, 2, 3):
            log.row({"step": step, "tokens": 8 * step, "loss": 7.0})
    file = run.out_dir / "metrics.csv"
    whole = file.read_bytes()
    head, first, second, third = whole.splitlines(keepends=True)
    for content, lost in (
        (whole, 0),
        (head, 0),
        (b"", 0),
        (whole[:-9], 0),  # the last row was being written
        (b"\0" + whole, 3),  # no column has its name
        (head[:7] + b"\n" + first + second + third, 3),
        (head + first[:5] + b"\n" + second + third, 1),
        (head + b"\0" * 40 + second[20:] + third, 1),
        (bytes(range(11, 200)), 1),  # not one line
    ):
        file.write_bytes(content)
        capsys.readouterr()
        with RunLog(run, 3, is_rank_zero=True):
            told = capsys.readouterr().out
        kept = file.with_name("metrics.csv.damaged")
        assert f"{lost} lines of {file} cannot be read: {kept} is what it was" in told if lost else told == "", content
        assert kept.exists() == bool(lost)
        if lost:
            assert kept.read_bytes() == content
            kept.unlink()


def test_a_file_that_is_removed_stops_nobody_and_is_told(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(run, None, is_rank_zero=True) as log:
        log.row({"step": 1, "tokens": 8, "loss": 7.0})
        (run.out_dir / "metrics.csv").unlink()
        log.row({"step": 1, "tokens": 8, "val_loss": 7.0})
        log.row({"step": 2, "tokens": 16, "loss": 6.0})
        log.end(TrainState(step=2, tokens=16), None)
    assert read_metrics(run.out_dir / "metrics.csv") == []
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error: ")]
    file = run.out_dir / "metrics.csv"
    assert told == [
        f"error: cannot write {file} (No such file or directory): it lacks the rows from step 1 on",
        f"error: {file} lacks the rows from step 1 to 2, which are printed above",
    ]


def test_a_fresh_run_sets_aside_what_it_rewrites(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    files = [run.out_dir / name for name in ("metrics.csv", "samples.jsonl")]
    before: dict[str, bytes] = {}
    copies: dict[Path, bytes] = {}
    for start in range(3):  # of the first of which there is nothing before
        with RunLog(run, None, is_rank_zero=True) as log:
            told = capsys.readouterr().out.splitlines()
            new = sorted({*run.out_dir.glob("*.aside-*")} - copies.keys())
            assert len(new) == (2 if start else 0)
            said = "set aside: {} is what {} was before this run, which starts anew"
            assert told == [said.format(*pair) for pair in zip(new, files, strict=False)]
            copies |= {copy: before[copy.stem] for copy in new}
            assert read_metrics(files[0]) == []
            log.row({"step": 1, "tokens": 8, "loss": 7.0 + start})
            log.samples(1, 8, [("a", f"b{start}")])
        before = {file.name: file.read_bytes() for file in files}
        capsys.readouterr()
    assert {path: path.read_bytes() for path in run.out_dir.glob("*.aside-*")} == copies
    events = [json.loads(line)["event"] for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    assert events == ["set_aside"] * 4
    with RunLog(run, 0, is_rank_zero=True):  # resumed, what it drops will be done again
        assert read_metrics(files[0]) == []
    RunLog(run, None, is_rank_zero=True)  # of a header, there is nothing to lose
    files[0].unlink()
    RunLog(run, None, is_rank_zero=True)
    assert {*run.out_dir.glob("*.aside-*")} == copies.keys()


def start(run: Run, *checkpoints: int, step: int | None = None) -> None:
    """What a start of ``run`` leaves that is killed after two steps and, if any, these ``checkpoints``."""
    with RunLog(run, step, is_rank_zero=True) as log:
        (run.out_dir / "config.yaml").write_text(cli.dump(run.resolved()))
        log.start(step or 0)
        log.row({"step": (step or 0) + 1, "tokens": 8, "loss": 7.0})
        for saved in checkpoints:
            with log.clock("checkpoints", saved):
                pass
        log.row({"step": (step or 0) + 2, "tokens": 16, "loss": 6.0})
        log.samples(2, 16, [("a", "b")])


def test_a_run_that_is_begun_again_before_its_first_checkpoint_sets_nothing_aside(run: Run) -> None:
    for _ in range(3):  # as a resumed run drops the rows that it does again
        start(run)
        assert [row["step"] for row in read_metrics(run.out_dir / "metrics.csv")] == [1, 2]
        assert len(read_samples(run.out_dir / "samples.jsonl")) == 1
    assert not [*run.out_dir.glob("*.aside-*")]


@pytest.mark.parametrize("case", ["other settings", "no settings", "other data", "saved", "resumed", "no events"])
def test_rows_that_are_not_done_again_are_set_aside(run: Run, case: str) -> None:
    start(run, *([1] if case in ("saved", "resumed") else []))
    if case == "resumed":
        start(run, step=1)
    elif case == "other settings":
        args = run.args
        run = dataclasses.replace(run, args=dataclasses.replace(args, optim=dataclasses.replace(args.optim, lr=1e-5)))
    elif case == "other data":
        run = dataclasses.replace(run, sources=[dataclasses.replace(run.sources[0], fingerprint="other")])
    elif case in ("no settings", "no events"):
        (run.out_dir / {"no settings": "config.yaml", "no events": "events.jsonl"}[case]).unlink()
    before = {name: (run.out_dir / name).read_bytes() for name in ("metrics.csv", "samples.jsonl")}
    for _ in range(2):  # of the second there is nothing to keep
        start(run)
        copies = {copy.stem: copy.read_bytes() for copy in run.out_dir.glob("*.aside-*")}
        assert copies == before
    assert len([*run.out_dir.glob("*.aside-*")]) == 2


def test_what_is_in_the_place_of_metrics_csv_is_named(run: Run) -> None:
    (run.out_dir / "metrics.csv").mkdir(parents=True)
    with pytest.raises(InputError, match=r"^cannot rewrite .*/metrics.csv \(.*\): move it away or make room$"):
        RunLog(run, 3, is_rank_zero=True)
    assert [path.name for path in run.out_dir.iterdir()] == ["metrics.csv"]


def test_what_is_in_the_place_of_samples_jsonl_is_named(run: Run) -> None:
    with RunLog(run, None, is_rank_zero=True) as log:
        log.row({"step": 3, "tokens": 24, "loss": 7.0})
    file = run.out_dir / "samples.jsonl"
    file.mkdir()
    reason = f"cannot rewrite {file} (it is there and is not a file): move it away or make room"
    with pytest.raises(InputError, match=f"^{re.escape(reason)}$"):
        RunLog(run, 3, is_rank_zero=True)
    assert [row["loss"] for row in read_metrics(run.out_dir / "metrics.csv")] == [7.0]


def test_events_are_kept_and_other_ranks_are_silent(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    RunLog(run, None, is_rank_zero=True).event("start", "here we go", step=0)
    RunLog(run, 5, is_rank_zero=True).stop(step=7, reason="a spike")
    events = [json.loads(line) for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("start", 0), ("stop", 7)]
    assert json.loads((run.out_dir / "STOPPED").read_text()) == {"step": 7, "reason": "a spike"}
    said = capsys.readouterr().out
    assert said.startswith("here we go\n")
    silent = RunLog(run, 5, is_rank_zero=False)
    silent.row({"step": 6, "tokens": 1})
    silent.event("start", "nobody hears this")
    silent.stop(step=1)
    assert capsys.readouterr().out == ""
    assert len((run.out_dir / "events.jsonl").read_text().splitlines()) == 2


def test_a_start_records_what_the_run_was_started_by_and_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pretrain/train.py", "--out_dir", "a b"])
    RunLog(run, None, is_rank_zero=True).start(3)
    RunLog(run, None, is_rank_zero=False).start(4)
    assert capsys.readouterr().out == "start    a new run at step 3\n"
    (event,) = [json.loads(line) for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["step"], event["max_steps"], event["nodes"]) == ("start", 3, 9, 1)
    assert event["command"] == "python pretrain/train.py --out_dir 'a b'"
    assert event["versions"]["torch"] == importlib.metadata.version("torch")  # without a local part, as "+cpu"
    assert event.keys() >= {"device", "commit"}


def test_a_start_after_failed_saves_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    full = "checkpoints/step-00000004 is not saved: No space left on device"
    failed = ("checkpoint_failed", {"error": full, "step": 4})
    gave_up = ("stop", {"by": "checkpoint.on_failure", "step": 4})
    for events, is_told in (
        ([failed, gave_up], True),
        ([failed], True),  # and killed
        ([("checkpoint", {"step": 4}), failed, gave_up, ("metrics_damaged", {})], True),
        ([failed, ("checkpoint", {"step": 8})], False),
        ([failed, gave_up, ("start", {"step": 0}), ("stop", {"by": "SIGTERM", "step": 3})], False),
        ([("stop", {"reason": "a spike"})], False),
        ([], False),
    ):
        log = RunLog(run, None, is_rank_zero=True)
        (run.out_dir / "events.jsonl").unlink(missing_ok=True)
        for name, details in events:
            log.event(name, **details)
        RunLog(run, None, is_rank_zero=True).start(3)
        hint = f"check that {run.out_dir} has room"
        before = [f"before   the last save failed ({full}): {hint}"] if is_told else []
        assert capsys.readouterr().out.splitlines() == ["start    a new run at step 3", *before], events


def test_a_console_line() -> None:
    row: dict[str, float | None] = {"step": 10, "loss": 2.34567, "lr": 4e-4, "grad_norm": 1.25, "mfu": None}
    row |= {"tokens_per_second": 24000.4, "max_memory_gb": 37.123, "skipped": 0}
    line = "loss 2.3457  lr 4.000e-04  grad_norm 1.250  24,000 tokens/s  memory 37.12 GB  1d 02h left"
    assert console_line(row, 1430512, 93784.0) == f"step      10/1430512  {line}"
    assert console_line({"step": 10, "mfu": 0.561, "skipped": 3}, 20, None) == "step 10/20  mfu 56.1%  skipped 3"


def test_tokens_of_each_source_are_counted(packed_folder: Any, tmp_path: Path) -> None:
    folders = [packed_folder([[list(range(100))]], name=name) for name in ("slim", "star")]
    sources = [Source(str(folder), weight) for folder, weight in zip(folders, (0.75, 0.25), strict=True)]
    args = PretrainArgs(
        out_dir=str(tmp_path / "out"),
        data=DataArgs(sources=sources),
        optim=OptimArgs(warmup_steps=0),
        train=TrainArgs(max_steps=9),
    )
    mixture = Mixture([5, 5], [0.75, 0.25], 0, ["x", "y"])
    run = Run(
        args,
        args.model.resolve(),
        World(1, 1, 1),
        [open_packed(folder) for folder in folders],
        [],
        mixture,
        1,
        {},
        None,
    )
    RunLog(run, None, is_rank_zero=True).row({"step": 1, "tokens": 1024 * 2048, "loss": 1.0})
    (row,) = rows(run)
    assert (row["tokens_slim"], row["tokens_star"]) == (str(768 * 2048), str(256 * 2048))
    assert source_columns(["a/x", "b/x", "c/y/", "x"]) == ["tokens_x", "tokens_x_1", "tokens_y", "tokens_x_3"]


NAMES = [
    *(["x_2", "x", "x"], ["x", "x", "x_1"], ["x_1", "x_1", "x_1_1"], ["per_second", "a/per_second"], ["/", ".", ""]),
    *(["a,b", '"a"', "a\nb", "a\rb", "a\x85b", "a\u2028b", "\udcff"], ["z" * 3000, "y/" + "z" * 3000], ["x"] * 50),
]


@pytest.mark.parametrize("paths", NAMES)
def test_the_loss_of_each_validation_source_is_read_back(paths: list[str], run: Run) -> None:
    datasets = [dataclasses.replace(run.sources[0], path=Path(path)) for path in paths]
    run = dataclasses.replace(run, validation=datasets)
    columns = [f"val_loss/{name}" for name in source_names(paths)]
    assert len(set(columns)) == len(paths)
    cells = {column: 1.0 + i for i, column in enumerate(columns)}
    for step in (None, 1):  # resumed, the columns stay where they are
        with RunLog(run, step, is_rank_zero=True) as log:
            log.row({"step": (step or 0) + 1, "tokens": 32, "val_loss": 2.0} | cells)
    for row in read_metrics(run.out_dir / "metrics.csv"):
        assert {name: row[name] for name in columns} == cells
        assert [name for name in row if name.startswith("val_loss")] == ["val_loss", *columns]


@pytest.mark.parametrize("paths", NAMES)
def test_each_source_has_a_column_of_its_own(paths: list[str], packed_folder: Any, tmp_path: Path) -> None:
    columns = source_columns(paths)
    assert len({*columns, *COLUMNS}) == len(paths) + len(COLUMNS)
    assert all(name.startswith("tokens_") for name in columns)
    folder = packed_folder([[list(range(100))]])
    args = PretrainArgs(
        out_dir=str(tmp_path / "out"),
        data=DataArgs(sources=[Source(path) for path in paths]),
        optim=OptimArgs(warmup_steps=0),
        train=TrainArgs(max_steps=9),
    )
    mixture = Mixture([5] * len(paths), [1.0] * len(paths), 0, ["x"] * len(paths))
    sources = [open_packed(folder)] * len(paths)
    run = Run(args, args.model.resolve(), World(1, 1, 1), sources, [], mixture, 1, {}, None)
    for step in (None, 1):
        with RunLog(run, step, is_rank_zero=True) as log:
            log.row({"step": (step or 0) + 1, "tokens": 1024 * 2048, "loss": 1.0, "tokens_per_second": 12.5})
    first, second = read_metrics(run.out_dir / "metrics.csv")
    assert list(first) == [*COLUMNS, *columns]
    assert first["tokens_per_second"] == 12.5
    assert sum(first[name] for name in columns) == 1024 * 2048
    assert second == first | {"step": 2}


def test_a_renamed_source_keeps_its_counts_of_earlier_rows(run: Run) -> None:
    tokens = run.config.block_size * 10
    with RunLog(run, None, is_rank_zero=True) as log:
        log.row({"step": 1, "tokens": tokens, "loss": 7.0, "tokens_per_second": 12.5})
    run.args.data.sources[0] = Source("elsewhere/renamed")
    for step in (1, 2):  # once renamed, it is resumed twice
        with RunLog(run, step, is_rank_zero=True) as log:
            log.row({"step": step + 1, "tokens": tokens * (step + 1), "loss": 6.0})
    found = read_metrics(run.out_dir / "metrics.csv")
    assert list(found[0]) == [*COLUMNS, "tokens_renamed", "tokens_packed"]
    assert [row["tokens_packed"] for row in found] == [tokens, None, None]
    assert [row["tokens_renamed"] for row in found] == [None, 2 * tokens, 3 * tokens]


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
            with log.clock("validation", 2):
                log.row({"step": 2, "tokens": 200, "val_loss": val_loss})
        with log.clock("checkpoints", 2):
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


def full_row(step: int, **changes: Any) -> dict[str, Any]:
    """A value in every column, written in two digits or more."""
    numbers = {"loss": 7.25, "val_loss": 7.75, "val_bpb": 1.25, "lr": 4e-4, "grad_norm": 1.5}
    numbers |= {"tokens_per_second": 1500.5, "mfu": 0.45, "step_seconds": 2.5, "data_seconds": 0.25}
    numbers |= {"forward_seconds_median": 0.5, "forward_seconds_slowest": 0.75, "slowest_rank": 3}
    numbers |= {"save_seconds": 1.5, "validation_seconds": 2.25}
    return {"step": step, "tokens": 32 * step} | numbers | {"max_memory_gb": 37.12, "skipped": 12} | changes


def test_every_column_is_written_where_its_name_stands(run: Run) -> None:
    RunLog(run, None, is_rank_zero=True).row(full_row(3))
    lines = (run.out_dir / "metrics.csv").read_text().splitlines()
    assert lines == [
        "step,tokens,loss,val_loss,val_bpb,lr,grad_norm,tokens_per_second,mfu,max_memory_gb,skipped,"
        "step_seconds,forward_seconds_median,forward_seconds_slowest,slowest_rank,"
        "data_seconds,save_seconds,validation_seconds,tokens_packed",
        "3,96,7.25,7.75,1.25,0.0004,1.5,1500.5,0.45,37.12,12,2.5,0.5,0.75,3,0.25,1.5,2.25,96",
    ]


def test_a_row_whose_last_digits_are_missing_is_no_row(run: Run) -> None:
    log = RunLog(run, None, is_rank_zero=True)
    for step in (11, 12):
        log.row(full_row(step))
    file = run.out_dir / "metrics.csv"
    whole = file.read_bytes()
    end = whole[:-2].rfind(b"\n") + 1  # of the first row
    last = len(whole.rstrip())  # what may be missing behind it is the line's end
    for cut in range(end, last + 1):
        file.write_bytes(whole[:cut])
        assert [row["step"] for row in read_metrics(file)] == [11], whole[end:cut]
    file.write_bytes(whole)
    assert [row["tokens"] for row in read_metrics(file)] == [352, 384]
    file.write_bytes(whole[:-3])
    with RunLog(run, 12, is_rank_zero=True) as log:
        assert [row["step"] for row in rows(run)] == ["11"]
        log.row(full_row(12, loss=6.5))
    assert [(row["step"], row["loss"]) for row in rows(run)] == [("11", "7.25"), ("12", "6.5")]
    assert file.read_bytes().count(b"\n") == 3


def test_a_resumed_run_has_the_columns_of_today_and_the_rows_of_then(run: Run) -> None:
    run.out_dir.mkdir()
    file = run.out_dir / "metrics.csv"
    file.write_text("tokens,step,val_loss,of_old,loss\n32,1,,x,9.5\n64,2,8.5,y,9.25\n96,3,8.25,z,9.0\n")
    with RunLog(run, 2, is_rank_zero=True) as log:
        log.row({"step": 2, "tokens": 64, "grad_norm": 1.5})  # the last of the old rows is added to
        log.row({"step": 3, "tokens": 96, "loss": 8.75})
    assert file.read_text().splitlines()[0] == ",".join([*COLUMNS, "tokens_packed"])
    assert rows(run) == [
        {"step": "1", "tokens": "32", "loss": "9.5"},
        {"step": "2", "tokens": "64", "loss": "9.25", "val_loss": "8.5", "grad_norm": "1.5"},
        {"step": "3", "tokens": "96", "loss": "8.75"},
    ]


def test_a_validation_joins_the_row_of_its_step_and_no_other(run: Run) -> None:
    with RunLog(run, None, is_rank_zero=True) as log:
        log.row({"step": 1, "tokens": 32, "loss": 7.0})
        log.row({"step": 2, "tokens": 64, "val_loss": 6.0})
        log.row({"step": 2, "tokens": 64, "val_loss": 5.0})
    expected = [{"step": "1", "tokens": "32", "loss": "7.0"}, {"step": "2", "tokens": "64", "val_loss": "5.0"}]
    assert rows(run) == expected
    with RunLog(run, 2, is_rank_zero=True) as log:  # and so after a restart
        assert rows(run) == expected
        log.row({"step": 2, "tokens": 64, "loss": 4.5})
        log.row({"step": 3, "tokens": 96, "loss": 4.0})
    assert rows(run) == [
        *[expected[0], expected[1] | {"loss": "4.5"}],
        {"step": "3", "tokens": "96", "loss": "4.0"},
    ]


def test_the_best_value_outlives_a_restart(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    values = {2: 5.0, 4: 4.0, 6: 4.5, 7: 4.25, 8: 3.0}
    with RunLog(run, None, is_rank_zero=True) as log:
        for step, val_loss in values.items():
            log.row({"step": step, "tokens": 32 * step, "val_loss": val_loss})
    endings = [line.partition("val_loss ")[2] for line in capsys.readouterr().out.splitlines()]
    best = "the best so far"
    assert endings == [
        f"5.0000  {best}",
        f"4.0000  {best}",
        "4.5000  best 4.0000",
        "4.2500  best 4.0000",
        f"3.0000  {best}",
    ]
    with RunLog(run, 6, is_rank_zero=True) as log:  # what step 8 came to is done again
        for step, val_loss in ((7, 4.25), (8, 3.5), (9, 3.5)):
            log.row({"step": step, "tokens": 32 * step, "val_loss": val_loss})
    endings = [line.partition("val_loss ")[2] for line in capsys.readouterr().out.splitlines()]
    assert endings == ["4.2500  best 4.0000", f"3.5000  {best}", "3.5000  best 3.5000"]


@contextlib.contextmanager
def room_until(size: int) -> Iterator[io.StringIO]:
    """Let no file of this process grow beyond ``size`` bytes; gives what is printed meanwhile."""
    with files_up_to(size), contextlib.redirect_stdout(io.StringIO()) as printed:  # which pytest has in a file
        yield printed


def test_a_full_disk_delays_rows_and_leaves_no_half_of_one(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(run, None, is_rank_zero=True)
    log.row({"step": 1, "tokens": 32, "loss": 7.0})
    log.event("start", step=0)
    file, events = run.out_dir / "metrics.csv", run.out_dir / "events.jsonl"
    before = file.read_bytes()
    events.write_bytes(events.read_bytes().ljust(len(before)) + b"\n")  # there is no room for an event either
    with room_until(len(before) + 7) as printed:  # of the next row, there is room for a part
        for row in ({"step": 2, "loss": 6.0}, {"step": 2, "val_loss": 6.5}, {"step": 3, "loss": 5.0}):
            log.row({"tokens": 96, **row})
            assert file.read_bytes() == before
    said = printed.getvalue().splitlines()
    assert "loss 6.0000" in said[1]
    assert said[0] == f"error: cannot write {file} (File too large): it lacks the rows from step 2 on"
    assert sum("error: " in line for line in said) == 1
    log.row({"step": 4, "tokens": 128, "loss": 4.0})
    assert f"{file} can be written again: it has the rows from step 2 on\n" in capsys.readouterr().out
    log.row({"step": 4, "tokens": 128, "val_loss": 4.5})
    log.row({"step": 5, "tokens": 160, "loss": 3.0})
    found = [(row["step"], row.get("loss"), row.get("val_loss")) for row in rows(run)]
    expected = [("1", "7.0", None), ("2", "6.0", "6.5"), ("3", "5.0", None), ("4", "4.0", "4.5"), ("5", "3.0", None)]
    assert found == expected
    _, _, half, whole = events.read_text().splitlines()
    assert half == '{"time'  # that it cannot be written
    assert json.loads(whole)["event"] == "metrics_written"


def test_a_full_disk_costs_no_row_that_was_written(run: Run) -> None:
    """A validation that joins its row when there is room for the row only."""
    log = RunLog(run, None, is_rank_zero=True)
    log.row({"step": 1, "tokens": 32, "loss": 7.0})
    size = (run.out_dir / "metrics.csv").stat().st_size
    with room_until(size + 1):
        log.row({"step": 1, "tokens": 32, "val_loss": 7.5})
        log.row({"step": 2, "tokens": 64, "loss": 6.0})
    log.row({"step": 3, "tokens": 96, "loss": 5.0})
    found = [(row["step"], row.get("loss"), row.get("val_loss")) for row in rows(run)]
    assert found == [("1", "7.0", "7.5"), ("2", "6.0", None), ("3", "5.0", None)]


@pytest.mark.parametrize("fatal", [False, True])
def test_what_was_skipped_is_told_and_may_stop_the_run(
    run: Run, fatal: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = StepResult(4, (24, 31), 2.5, 1.0, finite=True, skipped=False, fatal=False, ranks=[])
    spike = StepResult(5, (32, 39), 9.5, 80.0, finite=True, skipped=True, fatal=False, ranks=[])
    broken = StepResult(6, (40, 47), float("inf"), 1.0, finite=False, skipped=True, fatal=fatal, ranks=[1])
    after = StepResult(7, (48, 55), 9.5, 80.0, finite=True, skipped=True, fatal=False, ranks=[])
    with RunLog(run, None, is_rank_zero=True) as log:
        assert log.record_skips([fine, spike]) is False
        assert log.record_skips([broken, after]) is fatal
        assert RunLog(run, None, is_rank_zero=False).record_skips([broken]) is fatal
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "skipped step 5, samples 32 to 39: loss 9.5000, grad_norm 80.000: a spike"
    assert said[1] == "skipped step 6, samples 40 to 47: loss inf, grad_norm 1.000: not finite on rank 1"
    events = [json.loads(line) for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["skip", "skip", "stop" if fatal else "skip"]
    assert {key: value for key, value in events[0].items() if key != "time"} == {
        **{"event": "skip", "step": 5, "samples": [32, 39], "loss": 9.5, "grad_norm": 80.0},
        **{"finite": True, "skipped": True, "fatal": False, "ranks": []},
    }
    if not fatal:
        assert not (run.out_dir / "STOPPED").exists()
        return
    reason = {"step": 6, "samples": 48, "reason": "not finite on rank 1: step 6, samples 40 to 47"}
    assert json.loads((run.out_dir / "STOPPED").read_text()) == reason
    assert {key: events[2][key] for key in reason} == reason
    assert said[2].startswith(f"stopped for good, see {run.out_dir / 'STOPPED'}: fix the cause and delete the file")


def test_the_clocks_count_and_a_checkpoint_is_an_event(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with RunLog(run, None, is_rank_zero=True) as log:
        for what, step, seconds in (("validation", 2, 3.0), ("checkpoints", 2, 1.23456), ("checkpoints", 4, 2.0)):
            with log.clock(what, step):
                now[0] += seconds
            now[0] += 10.0
        log.end(TrainState(step=4, tokens=128), "SIGTERM")
    events = [json.loads(line) for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    saves = [(event["event"], event["step"], event["seconds"]) for event in events[:2]]
    assert saves == [("checkpoint", 2, 1.235), ("checkpoint", 4, 2.0)]
    assert (events[2]["event"], events[2]["by"], events[2]["step"]) == ("stop", "SIGTERM", 4)
    assert events[2]["seconds"] == pytest.approx({"training": 30.0, "validation": 3.0, "checkpoints": 3.23456})
    assert abs(events[0]["time"] - time.time()) < 600


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


def test_the_waits_are_those_since_the_row_before(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    with RunLog(run, None, is_rank_zero=True) as log:
        for saves, validations in ((3.0, 5.0), (0.0, 0.0), (1.5, 0.0)):
            for what, seconds in (("checkpoints", saves), ("validation", validations)):
                with log.clock(what, 2):
                    now[0] += seconds
            assert log.waits() == {"save_seconds": saves, "validation_seconds": validations}


def test_a_stop_that_was_asked_for_says_how_to_resume(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (run.out_dir / "checkpoints/step-00000004").mkdir(parents=True)
    with RunLog(run, None, is_rank_zero=True) as log:
        log.end(TrainState(step=4, tokens=128), "SIGTERM")
    said = capsys.readouterr().out
    assert said.endswith("stopped by SIGTERM at step 4; the same command resumes from there\n")
    assert "# resumes from there" in said
    assert not (run.out_dir / "STOPPED").exists()


@pytest.mark.parametrize("by", ["SIGTERM", "SIGUSR1", "train.max_time"])
def test_in_a_batch_job_the_job_is_what_resumes(
    run: Run, by: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLURM_JOB_ID": "1234", "ENVIRONMENT": "BATCH"}.items():  # as sbatch sets them
        monkeypatch.setenv(name, value)
    (run.out_dir / "checkpoints/step-00000004").mkdir(parents=True)
    with RunLog(run, None, is_rank_zero=True) as log:
        log.end(TrainState(step=4, tokens=128), by)
    said = capsys.readouterr().out
    again = "unless Slurm requeues the job, sbatch of the same script resumes from there"
    assert said.endswith(f"stopped by {by} at step 4; {again}\n")
    assert "next     sbatch ...    # the script of job 1234, unless Slurm requeues it: resumes from there\n" in said
    monkeypatch.delenv("ENVIRONMENT")  # in a shell of salloc's or srun's
    with RunLog(run, None, is_rank_zero=True) as log:
        log.end(TrainState(step=4, tokens=128), by)
    assert "sbatch" not in capsys.readouterr().out


def test_what_is_shown_of_an_event_is_a_line_each(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(run, None, is_rank_zero=True)
    log.event("start", "start\x1b[2J of\nall", "changed \u202ex", step=0, run="\x1b\n\udcff")
    log.event("checkpoint_failed", f"error: {'x' * 10**7}: make room", step=1)
    first, second, third = capsys.readouterr().out.splitlines()
    assert (first, second) == ("start\\x1b[2J of\\nall", "changed \\u202ex")
    assert third.startswith("error: xxx")
    assert third.endswith("x: make room")
    assert len(third) < 2100
    events = [json.loads(line) for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    assert events[0]["run"] == "\x1b\n\udcff"


def test_events_that_cannot_be_written_are_shown(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(run, None, is_rank_zero=True)
    (run.out_dir / "events.jsonl").mkdir()
    log.event("start", "here we go", step=0)
    assert capsys.readouterr().out == "here we go\n"


def test_memory_is_told_in_units_of_a_thousand_million_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {resource.RUSAGE_SELF: 2_000_000, resource.RUSAGE_CHILDREN: 7_000_000}
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=peaks[who]))
    for system, peak in (("linux", 2.048), ("darwin", 0.002)):  # the one counts in KiB, the other in bytes
        monkeypatch.setattr(sys, "platform", system)
        assert max_memory_gb(torch.device("cpu")) == peak, system
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {3: 5e9}[device.index])
    assert max_memory_gb(torch.device("cuda", 3)) == 5.0


def test_the_mean_speed_weighs_rows_by_their_tokens() -> None:
    spoken = [{"tokens": 100, "tokens_per_second": 10.0}, {"tokens": 200, "tokens_per_second": 40.0}]
    assert mean_speed(spoken) == 200 / 12.5
    silent = [{"tokens": 300, "tokens_per_second": None}, {"tokens": 400, "tokens_per_second": 50.0}]
    assert mean_speed([*spoken, *silent]) == 300 / 14.5  # of the tokens from 200 to 300 nobody knows the time
    assert mean_speed(silent[:1]) == 0
    assert mean_speed([]) == 0


def test_a_gpu_that_has_no_more_memory_is_explained(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [{"filename": "/repo/tinyllama/ops/swiglu.py", "line": 40, "name": "reference"}]
    block = {"address": 0, "size": 7 * 10**9, "state": "active_allocated", "frames": frames}
    snapshot = {"segments": [{"total_size": 8 * 10**9, "blocks": [block]}], "device_traces": []}
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: snapshot)
    model = GPT(ModelConfig("tiny", block_size=2, vocab_size=8, n_layer=1, n_head=2, n_embd=4, n_query_groups=1))
    log = RunLog(run, None, is_rank_zero=True)
    log.watch_memory(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(torch.OutOfMemoryError) as caught, log:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    (note,) = caught.value.__notes__
    assert note.startswith(
        "error: rank 0 is out of GPU memory, with 7.00 of 8.00 GB in use: 7.00 GB activations of ops/swiglu.py:40 "
        "reference: lower train.micro_batch_size"
    )
    assert (run.out_dir / "memory" / "rank-00000.pickle").exists()
    (event,) = [json.loads(line) for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["text"]) == ("out_of_memory", note.removeprefix("error: "))
