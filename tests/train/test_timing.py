"""Where a run's time goes: the slow rank, what training waits for, and traces of steps."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from runs import branch, column, metrics


def traced(file: Path) -> tuple[int, list[str]]:
    """The rank that wrote the trace, and the marks of its steps."""
    with gzip.open(file) as stream:
        trace = json.load(stream)
    events = trace["traceEvents"]
    assert sum("aten::mm" in event["name"] for event in events) > 100
    return trace["distributedInfo"]["rank"], [event["name"] for event in events if event["name"].startswith("step ")]


@pytest.mark.parametrize("size", [1, 2])
def test_every_rank_writes_a_trace_of_the_steps_asked_for(world, config_file: Path, tmp_path: Path, size: int) -> None:
    out = tmp_path / "run"
    flags = ["--config", config_file, "--train.max_steps", 6, "--checkpoint.interval", 4]
    said = world(size).train(*flags, "--out_dir", out, "--log.profile", "[3, 5]")
    files = sorted((out / "profile").iterdir())
    assert [file.name for file in files] == [f"steps-3-5-rank-{rank:05d}.json.gz" for rank in range(size)]
    assert [traced(file) for file in files] == [(rank, ["step 3", "step 4", "step 5"]) for rank in range(size)]
    said = " ".join(said.split())  # summaries fold long lines
    assert f" trace steps 3 to 5 of every rank, into {out}/profile " in said
    assert f" traced steps 3 to 5 of every rank, in {out}/profile: open the files in https://ui.perfetto.dev " in said
    assert f" traces {size} in {out}/profile, for https://ui.perfetto.dev " in said
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "profile"] == [5]


def test_a_resumed_run_traces_what_is_left_or_says_that_it_is_over(world, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--config", config_file, "--train.max_steps", 6, "--checkpoint.interval", 4]
    said = world(1).train(*flags, "--out_dir", out)
    assert "trace  " not in said
    assert not (out / "profile").exists()
    resumed = branch(out, 4)
    said = world(1).train(*flags, "--out_dir", resumed, "--log.profile", "[3, 5]")
    (file,) = (resumed / "profile").iterdir()
    assert (file.name, traced(file)[1]) == ("steps-5-5-rank-00000.json.gz", ["step 5"])
    again = branch(resumed, 4)
    said = world(1).train(*flags, "--out_dir", again, "--log.profile", "[3, 4]")
    assert "trace    none: log.profile [3, 4] was over at step 4\n" in said
    assert not (again / "profile").exists()


def test_a_run_that_is_stopped_leaves_the_trace_so_far(world, config_file: Path, tmp_path: Path) -> None:
    flags = ["--config", config_file, "--out_dir", tmp_path / "run", "--log.profile", "[5, 9]"]
    answers: list[dict[str, Any]] = world(1)("train_signalled", 7, 0, *flags)
    assert [answer["result"] for answer in answers] == [75]
    (file,) = (tmp_path / "run" / "profile").iterdir()
    assert (file.name, traced(file)[1]) == ("steps-5-7-rank-00000.json.gz", ["step 5", "step 6", "step 7", "step 8"])


def test_a_trace_that_cannot_be_written_costs_nothing_else(world, config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").touch()
    flags = ["--config", config_file, "--out_dir", tmp_path / "run", "--train.max_steps", 6]
    (answer,) = world(1)("train", *flags, "--log.profile", "[6, 6]")
    assert answer["result"] == 0
    assert (tmp_path / "run" / "checkpoints" / "step-00000006").is_dir()


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ("[5, 3]", "log.profile [5, 3] is not a range of steps: give the first and the last, counted from 1"),
        ("[0, 3]", "log.profile [0, 3] is not a range of steps"),
        ("[3]", "log.profile [3] is not a range of steps"),
        ("[1, 21]", "log.profile [1, 21] is not a range of steps"),
        ("[40, 41]", "log.profile [40, 41] ends after the run's 40 steps: lower it"),
        ("[a, 3]", "log.profile cannot be 'a': expected int"),
        ("3", "log.profile cannot be '3': expected [int, ...]"),
    ],
)
def test_steps_that_cannot_be_traced_are_refused(
    world, config_file: Path, tmp_path: Path, steps: str, problem: str
) -> None:
    flags = ["--config", config_file, "--out_dir", tmp_path / "run", "--log.profile", steps]
    (found,) = world(1)("train", *flags)[0]["problems"]
    assert found.startswith(problem)
    assert not (tmp_path / "run").exists()


def test_each_row_names_the_rank_that_is_slow(world, config_file: Path, tmp_path: Path) -> None:
    """Rank 1's forward pass of a block takes 3 seconds by its clock, and so does its wait for a batch."""
    flags = ["--config", config_file, "--train.max_steps", 8, "--log.interval", 4, "--out_dir", tmp_path / "run"]
    answers = world(2)("train_by_clocks", *flags)
    assert [answer["result"] for answer in answers] == [2, 2]  # a collective at each row
    rows = [row for row in metrics(tmp_path / "run") if row["loss"]]
    assert [row["forward_seconds_median"] for row in rows] == ["2.0", "2.0"]  # two blocks
    assert [row["forward_seconds_slowest"] for row in rows] == ["6.0", "6.0"]
    assert [row["slowest_rank"] for row in rows] == ["1", "1"]
    assert [row["data_seconds"] for row in rows] == ["24.0", "24.0"]  # four steps of two micro-batches
    assert "  rank 1 200% slower  waited 24.0 s for data" in answers[0]["said"]


def test_on_one_rank_there_is_nothing_to_compare(world, config_file: Path, tmp_path: Path) -> None:
    flags = ["--config", config_file, "--train.max_steps", 8, "--log.interval", 4, "--out_dir", tmp_path / "run"]
    (answer,) = world(1)("train_by_clocks", *flags)
    assert answer["result"] == 0
    assert column(tmp_path / "run", "data_seconds") == [16.0, 16.0]
    for name in ("forward_seconds_median", "forward_seconds_slowest", "slowest_rank"):
        assert column(tmp_path / "run", name) == []
    assert len(column(tmp_path / "run", "step_seconds")) == 2
