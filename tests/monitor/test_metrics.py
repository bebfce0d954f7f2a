"""The rows of metrics.csv: each step once, across restarts, damage and full disks."""

import contextlib
import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from limits import files_up_to

from tinyllama import InputError
from tinyllama.checkpoint.state import TrainState
from tinyllama.config.args import DataArgs, OptimArgs, PretrainArgs, Source, TrainArgs
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import open_packed
from tinyllama.monitor.metrics import RunLog
from tinyllama.monitor.run_files import COLUMNS, read_metrics, source_columns
from tinyllama.train.evaluate import source_names
from tinyllama.train.launch import World
from tinyllama.train.run import Run


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


def test_a_held_out_loss_that_is_no_number_is_not_the_best(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(run, None, is_rank_zero=True) as log:
        for step, loss in enumerate((math.nan, -math.inf, 2.0), start=1):
            log.row({"step": step, "tokens": 8 * step, "val_loss": loss})
    endings = [line.partition("val_loss ")[2] for line in capsys.readouterr().out.splitlines()]
    assert endings == ["nan", "-inf", "2.0000  the best so far"]
    for step, loss, rank in ((4, 3.0, "best 2.0000"), (5, 1.5, "the best so far")):
        with RunLog(run, step - 1, is_rank_zero=True) as log:
            capsys.readouterr()
            log.row({"step": step, "tokens": 8 * step, "val_loss": loss})
            assert capsys.readouterr().out.endswith(f"val_loss {loss:.4f}  {rank}\n")


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
