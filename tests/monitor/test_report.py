"""What a report says of a run and of several, from their files."""

import csv
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from reports import TOKENS, data_of, six_digits

from tinyllama import __version__
from tinyllama.config.model import named_config
from tinyllama.eval import harness
from tinyllama.monitor import report
from tinyllama.monitor.run_files import COLUMNS, read_metrics
from tinyllama.throughput import duration


def test_what_the_page_is_told(make_run: Callable[..., Path]) -> None:
    run = report.read_run(make_run("one"))
    kinds = [(event["kind"], event["step"]) for event in run["events"]]
    assert kinds == [
        *[("start", 0), ("checkpoint", 10), ("restart", 10), ("checkpoint", 20), ("skip", 15), ("restart", 20)],
        *[("checkpoint", 30), ("restart", 30), ("checkpoint_failed", 30), ("done", 40)],
    ]
    assert run["events"][1] | {"time": 0} == {
        **{"kind": "checkpoint", "step": 10, "tokens": 10 * TOKENS, "time": 0, "details": "seconds 0.5"}
    }
    assert run["sources"] == ["tokens_prose", "tokens_code"]
    assert run["summary"] == {
        "state": "done",
        "progress": "step 40, 163,840 tokens",
        "GPU-hours": f"{sum(2 * TOKENS / (1000 + step) for step in range(1, 41)) / 3600:.3g} in steps",
        "model": "quickstart, 1,311,872 parameters",
        "validation loss": "4.0244 (best 4.0244 at step 40)",
        "perplexity": "55.95",
        "bits per byte": "1.3415",
        "training loss": "4.0217",
        "speed": "1,020 tokens/s, MFU 52.0%",
        "peak memory": "2.40 GB",
        "events": "3 restarts, 3 checkpoints, 1 skip",
        "elapsed": "2h 01m",
    }


def test_what_is_smoothed_does_not_lag() -> None:
    """A loss that falls evenly is its own mean, and a step is seen as early as it is late."""
    rows: list[dict[str, Any]] = [{"step": 10 * i, "loss": 9 - i / 300} for i in range(1001)]
    assert report.smooth(rows) == 210  # ten rows on either side
    assert [row["smooth"] for row in rows] == pytest.approx([row["loss"] for row in rows])
    rows = [{"step": i, "loss": float(i < 500)} for i in range(1000)]
    report.smooth(rows)
    assert rows[489]["smooth"] == pytest.approx(1)
    assert rows[494]["smooth"] == pytest.approx(1 - 5 / 21)
    assert rows[505]["smooth"] == pytest.approx(5 / 21)


def timed(step: int, **waits: float | None) -> dict[str, Any]:
    return {"step": step, "tokens": step * TOKENS, "loss": 3.0, "step_seconds": 0.5, **waits}


def test_where_the_time_went_in_each_bucket_of_a_run() -> None:
    """A bucket of 10 steps of 0.5 s takes 5 s, and what else training waited for."""
    rows = [{"step": 0, "tokens": 0, "val_loss": 9.0}, timed(10, validation_seconds=5.0, data_seconds=1.0)]
    rows += [{"step": 15, "tokens": 15 * TOKENS, "val_loss": 8.0}, timed(20, save_seconds=15.0, data_seconds=None)]
    none = {"slowest rank, estimated": 0.0}
    assert report.where_time_goes(rows) == [
        {"step": 0, "tokens": 0, "validation": 0.5, "checkpoints": 0.0, "data": 0.1, **none},
        {"step": 10, "tokens": 10 * TOKENS, "validation": 0.5, "checkpoints": 0.0, "data": 0.1, **none},
        {"step": 20, "tokens": 20 * TOKENS, "validation": 0.0, "checkpoints": 0.75, "data": 0.0, **none},
    ]
    assert report.where_time_goes(rows, buckets=1)[1:] == [
        {"step": 20, "tokens": 20 * TOKENS, "validation": 5 / 30, "checkpoints": 15 / 30, "data": 1 / 30, **none}
    ]


def test_what_the_slowest_rank_costs_is_estimated_from_its_forward_pass() -> None:
    """Where it takes a quarter longer than the median, a fifth of the time in steps is waiting for it."""
    ranks = {"forward_seconds_median": 0.08, "forward_seconds_slowest": 0.1, "data_seconds": 1.0}
    rows = [timed(0), timed(10, **ranks)]
    _, found = report.where_time_goes(rows)
    assert found["slowest rank, estimated"] == pytest.approx((5 - 1) * 0.2 / 5)
    assert found["data"] == 0.2


def test_rows_without_times_have_no_place_in_them() -> None:
    assert report.where_time_goes([{"step": 0, "tokens": 0}, {"step": 10, "tokens": 5, "loss": 3.0}]) == []
    assert report.where_time_goes([timed(10)]) == []  # nobody knows of how many steps it is
    rows = [
        timed(0),
        timed(10, data_seconds=-1.0),
        timed(20, data_seconds=1e300),
        timed(20),
        timed(30) | {"step_seconds": 0},
    ]
    assert all(0 <= share <= 1 for row in report.where_time_goes(rows) for share in list(row.values())[2:])


def test_a_long_curve_keeps_its_extremes_and_its_validations() -> None:
    rows: list[dict[str, Any]] = [{"step": i, "loss": 3 + math.sin(i), "val_loss": None} for i in range(50_001)]
    rows[31_234]["loss"] = 77.0
    rows[12_345]["loss"] = 0.5
    rows[40_001]["val_loss"] = 3.3
    kept = report.thin(rows)
    assert len(kept) <= 2 * report.BUCKETS + 3
    assert {row["step"] for row in kept} >= {0, 12_345, 31_234, 40_001, 50_000}
    assert [row["step"] for row in kept] == sorted(row["step"] for row in kept)
    assert report.thin(rows[: 2 * report.BUCKETS]) == rows[: 2 * report.BUCKETS]


def test_many_validations_keep_the_best_and_the_worst() -> None:
    rows: list[dict[str, Any]] = [{"step": i, "loss": None, "val_loss": 3 + math.sin(i)} for i in range(6000)]
    rows[1234]["val_loss"], rows[4321]["val_loss"] = 0.5, 77.0
    kept = report.thin(rows)
    assert report.BUCKETS / 2 - 2 < len(kept) <= report.BUCKETS / 2 + 2
    assert {row["step"] for row in kept} >= {0, 1234, 4321, 5999}


def test_a_report_through_a_link_keeps_the_link(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    run, link = make_run("one"), tmp_path / "link.html"
    (tmp_path / "web").mkdir()
    link.symlink_to("web/report.html")
    for _ in range(2):  # the link is to nothing, and then to a report
        report.write([run], link)
        assert link.is_symlink()
        assert b" run report</title>" in (tmp_path / "web" / "report.html").read_bytes()
        assert [path.name for path in (tmp_path / "web").iterdir()] == ["report.html"]


def test_long_names_are_told_apart_in_legends() -> None:
    assert report.short(["one", "two"]) == ["one", "two"]
    assert report.short(["a-name-of-many-many-letters"]) == ["a-name-of-many-many-letters"]
    names = [f"tinyllama_1.1b_warmup_2000_seed_{i}_attempt_of_monday" for i in (7, 13)]
    assert report.short(names) == ["…seed_7_attempt…", "…seed_13_attempt…"]
    names = ["quickstart", "quickstart_with_another_rate"]
    assert report.short(names) == names
    assert report.short(["run_of_" + "b" * 17, "run_of_c"]) == [
        "run_of_" + "b" * 17,
        "run_of_c",
    ]  # 24 letters have room
    assert report.short(["run_of_" + "b" * 18, "run_of_c"]) == ["…of_" + "b" * 18, "…of_c"]


def test_several_runs_share_the_points_of_a_page(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [make_run(name, steps=3000) for name in ("one", "two", "three", "four")]
    report.write(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 2e6
    assert "<title>4 runs ·" in page
    for run in data_of(tmp_path / "report.html")["runs"]:
        assert 250 < len(run["columns"]["step"]) <= 2 * 250 + 301 + 2  # of 3001, two a bucket and the validations


@pytest.mark.parametrize(
    ("last", "state"),
    [
        ("done", "done"),
        ("failure", "failed"),
        ("checkpoint", "not ended; last row 2001-09-09 01:46 UTC"),
        (None, "not ended; last"),
    ],
)
def test_whether_a_run_has_ended(tmp_path: Path, last: str | None, state: str) -> None:
    metrics = tmp_path / "metrics.csv"
    metrics.touch()
    os.utime(metrics, (1e9, 1e9))
    events = [{"kind": "start"}, {"kind": "stop"}, {"kind": "restart"}, {"kind": last}] if last else []
    assert report.state(events, metrics).startswith(state)


def test_the_page_holds_the_numbers_of_the_files(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [make_run("a&b<c"), make_run("two", height=3.0, steps=12)]
    report.write(runs, tmp_path / "report.html")
    data = data_of(tmp_path / "report.html")
    assert [(run["name"], run["label"]) for run in data["runs"]] == [("a&b<c", "a&b<c"), ("two", "two")]
    for run, shown in zip(runs, data["runs"], strict=True):
        with (run / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        columns = shown["columns"]
        assert set(columns) == {*COLUMNS, "tokens_prose", "tokens_code", "smooth"}
        for name in (*COLUMNS, "tokens_prose", "tokens_code"):
            assert columns[name] == [six_digits(float(row[name])) if row[name] else None for row in rows], name
        assert [row["value"] for row in shown["evaluations"]] == [0.26, 0.27]
        assert [row["tokens"] for row in shown["evaluations"]] == [10 * TOKENS, 20 * TOKENS]
        assert {(row["task"], row["metric"]) for row in shown["evaluations"]} == {("hellaswag", "acc_norm")}
    with (Path(harness.__file__).parent / "published_scores.csv").open() as file:
        published = list(csv.DictReader(file))
    assert [row["value"] for row in data["published"]] == [float(row["value"]) for row in published]
    report.write(runs[:1], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<title>a&amp;b&lt;c · run report</title>" in page
    assert f"Written by tinyllama {__version__} from" in page
    assert not any(f"@{mark}@" in page for mark in ("TITLE", "VERSION", "DATA", "PLOTLY"))


def test_runs_of_one_name_are_told_by_their_paths(make_run: Callable[..., Path], tmp_path: Path) -> None:
    one, other = make_run("run"), tmp_path / "elsewhere" / "run"
    shutil.copytree(one, other)
    report.write([one, other, make_run("two")], tmp_path / "report.html")
    assert [run["name"] for run in data_of(tmp_path / "report.html")["runs"]] == [str(one), str(other), "two"]


def test_the_summary_says_best_and_last_and_means_over_the_run() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 0, "tokens": 0, "val_loss": 9.0},
        {"step": 1, "tokens": 100, "loss": 8.0, "tokens_per_second": 10.0, "mfu": 0.25, "max_memory_gb": 3.0},
        {"step": 2, "tokens": 200, "val_loss": 7.5},
        {"step": 3, "tokens": 300, "loss": 7.0, "tokens_per_second": 40.0, "mfu": 0.75, "max_memory_gb": 5.5},
        {"step": 1400, "tokens": 140000, "loss": 7.25, "val_loss": 8.5, "val_bpb": 3.25, "mfu": None},
    ]
    events = [
        {"kind": kind, "time": time} for kind, time in (("start", 60), ("restart", 70), ("skip", 80), ("skip", 120))
    ]
    assert report.summary(rows, events, named_config("quickstart")) == {
        "model": "quickstart, 1,311,872 parameters",
        "validation loss": "8.5000 (best 7.5000 at step 2)",
        "perplexity": "4,914.77",
        "bits per byte": "3.2500",
        "training loss": "7.2500",
        "speed": "20 tokens/s, MFU 50.0%",  # 300 tokens in 10 s and 5 s; nobody knows of the others
        "peak memory": "5.50 GB",
        "events": "1 restart, 0 checkpoints, 2 skips",
        "elapsed": "1m 00s",
    }
    assert report.summary(rows[:1], [], named_config("quickstart")).keys() == {
        *("model", "validation loss", "perplexity", "events")
    }


def test_an_event_is_at_the_tokens_that_were_done_at_its_step(make_run: Callable[..., Path]) -> None:
    out_dir = make_run("one")
    # 10 steps of half the batch that the settings have today, 10 of today's
    rows = f"10,{5 * TOKENS}\n20,{15 * TOKENS}\n"
    (out_dir / "metrics.csv").write_text(f"step,tokens\n{rows}")
    lines = [{"time": 5 + step, "event": "checkpoint", "step": step} for step in (0, 4, 10, 15, 24)]
    (out_dir / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [event["tokens"] / TOKENS for event in report.read_run(out_dir)["events"]]
    assert found == [0, 2, 5, 10, 19]


def start_of(step: int, ranks: int, **changes: Any) -> dict[str, Any]:
    """What a run records when it starts."""
    versions = {"tinyllama": "0.1.0", "torch": "2.13"}
    found = {"event": "start", "time": 60 + step, "step": step, "world_size": ranks, "max_steps": 100, "nodes": 2}
    return found | {"device": "H100", "command": "srun a", "commit": "1f-dirty", "versions": versions} | changes


def test_how_far_a_run_is_and_what_it_has_taken() -> None:
    rows = [{"step": step, "tokens": 3600 * step, "tokens_per_second": 1.0} for step in (1, 2, 3)]
    rows += [{"step": 4, "tokens": 4 * 3600, "val_loss": 3.0}]
    starts = [start_of(0, 8), start_of(2, 16), start_of(1, 2)]  # again from step 1 on, on two
    assert report.progress(rows, starts, 3600) == {
        "progress": "step 4 of 100 (4.0%), 14,400 tokens",
        "time left": "4d 00h, without validations and saves",
        "GPU-hours": "12 in steps",
    }
    on_cpu = report.progress(rows, [start_of(0, 2, device="CPU (x86_64)", max_steps=4)], 3600)
    assert on_cpu == {"progress": "step 4 of 4 (100.0%), 14,400 tokens", "CPU-hours": "6 in steps"}
    assert report.progress(rows, [], 3600) == {"progress": "step 4, 14,400 tokens"}
    published = [{"step": 1_430_512, "tokens": 3 * 10**12, "tokens_per_second": 384_243.0}]
    found = report.progress(published, [start_of(0, 16)], 2_097_152)
    assert found["GPU-hours"] == "34,700 in steps"


def test_hours_count_every_token_once_where_validations_come_between_and_a_branch_only_its_own() -> None:
    rows = [{"step": step, "tokens": 3600 * step, "tokens_per_second": 1.0} for step in (12, 14, 16)]
    validations = [{"step": step, "tokens": 3600 * step, "val_loss": 3.0} for step in (13, 15, 17)]
    mixed = sorted(rows + validations, key=lambda row: row["step"])
    for found in (rows, mixed):
        hours = {begin: report.progress(found, [start_of(*begin)], 3600)["GPU-hours"] for begin in ((10, 2), (0, 2))}
        assert hours == {(10, 2): "32 in steps", (0, 2): "32 in steps"}  # earlier versions said no tokens at a start
        branch = [start_of(10, 2, tokens=36_000), start_of(14, 4, tokens=50_400)]
        assert report.progress(found, branch, 3600)["GPU-hours"] == "16 in steps"  # (4 steps on 2 and 2 on 4) x 1 h


def test_the_speed_of_a_branch_is_that_of_its_own_rows(make_run: Callable[..., Path]) -> None:
    out_dir = make_run("branch")
    rows = read_metrics(out_dir / "metrics.csv")
    first, *later = [row for row in rows if row["tokens_per_second"]]
    begin = first["tokens"] - 1  # one token in the first row: it hardly counts
    (out_dir / "events.jsonl").write_text(json.dumps(start_of(0, 1, tokens=begin)) + "\n")
    seconds = 1 / first["tokens_per_second"]
    for before, row in itertools.pairwise([first, *later]):
        seconds += (row["tokens"] - before["tokens"]) / row["tokens_per_second"]
    expected = (later[-1]["tokens"] - begin) / seconds
    assert report.read_run(out_dir)["summary"]["speed"].startswith(f"{expected:,.0f} tokens/s")


def test_a_run_is_as_far_as_its_last_event(make_run: Callable[..., Path]) -> None:
    """It was stopped between two log intervals, and its checkpoint is later than the last row."""
    out_dir = make_run("one")
    stop = [start_of(30, 2), {"time": 9000, "event": "checkpoint", "step": 43, "seconds": 0.5}]
    stop += [{"time": 9001, "event": "stop", "by": "SIGTERM", "step": 43}]
    with (out_dir / "events.jsonl").open("a") as file:
        file.write("\n" + "".join(json.dumps(event) + "\n" for event in stop))
    found = report.read_run(out_dir)["summary"]
    assert found["progress"] == f"step 43 of 100 (43.0%), {43 * TOKENS:,} tokens"
    assert found["time left"] == f"{duration(57 * TOKENS / 1040)}, without validations and saves"
    rows = [{"step": 4, "tokens": 14_400, "tokens_per_second": 1.0}]
    for step, expected in ((3, 4), (4, 4), (6, 6)):  # a row that is later counts
        events = [{"step": 9, "tokens": 32_400}, {"step": step, "tokens": 3600 * step}]
        progress = report.progress(rows, [start_of(0, 1)], 3600, events)["progress"]
        assert progress == f"step {expected} of 100 ({expected}.0%), {3600 * expected:,} tokens"


def test_a_perplexity_of_any_size_is_short() -> None:
    for loss, said in ((2.0, "7.39"), (10.37, "31,888.48"), (14.0, "1.2e+06"), (800.0, "1.0e+304")):
        row = {"step": 1, "tokens": 1, "val_loss": loss}
        assert report.summary([row], [], named_config("quickstart"))["perplexity"] == said


def test_what_a_run_was_started_by_and_on(make_run: Callable[..., Path]) -> None:
    assert report.surroundings([start_of(0, 1, commit="0"), start_of(2, 16)]) == {
        "hardware": "16 x H100 on 2 nodes",
        "software": "tinyllama 0.1.0, torch 2.13",
        "commit": "1f-dirty",
        "command": "srun a",
    }
    assert report.surroundings([start_of(0, 1, nodes=1, commit=None)])["hardware"] == "1 x H100"
    assert report.surroundings([]) == {}
    run = make_run("one")
    with (run / "events.jsonl").open("a") as file:
        odd = {"device": ["\n"], "versions": {"<b>": None}, "max_steps": True, "nodes": {}, "command": 3, "commit": {}}
        for event in (start_of(3, 2, **odd), start_of(3, 2) | {"step": math.nan}):
            file.write("\n" + json.dumps(event))
    found = report.read_run(run)["summary"]
    assert {key: found[key] for key in ("hardware", "software", "command")} == {
        "hardware": "2 x ['\\n'] on {} nodes",
        "software": "<b> None",
        "command": "3",
    }


def test_a_stop_that_nobody_asked_for_is_a_failure(make_run: Callable[..., Path]) -> None:
    run = make_run("one")
    for stop, kind, state in [
        ({"by": "SIGTERM", "step": 9}, "stop", "stopped by SIGTERM; the same command resumes"),
        ({"by": "train.max_time"}, "stop", "stopped by train.max_time; the same command resumes"),
        ({"by": "checkpoint.on_failure"}, "failure", "failed"),
        ({"reason": "a spike: step 7"}, "failure", "failed"),
    ]:
        (run / "events.jsonl").write_text(json.dumps({"event": "stop", "time": 9, **stop}))
        found = report.read_run(run)
        assert found["events"][0]["kind"] == kind
        assert found["summary"]["state"] == state


def test_the_page_has_sample_texts_of_some_steps(make_run: Callable[..., Path]) -> None:
    run = make_run("one")
    lines = [{"step": n, "tokens": n, "prompt": p, "text": f"of {n}"} for n in range(0, 1000, 7) for p in ("a", "b")]
    odd: list[Any] = [
        {"step": 1, "tokens": 1, "prompt": "a", "text": 3},
        {"step": -1},
        [1],
        {**lines[0], "text": "new"},
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, *odd]) + '{"step": 3')
    found = report.read_run(run)["samples"]
    steps = sorted({sample["step"] for sample in found})
    assert (len(steps), steps[0], steps[-1], len(found)) == (12, 0, 994, 24)
    assert [sample["text"] for sample in found if sample["step"] == 0] == ["new", "of 0"]
    (run / "samples.jsonl").unlink()
    assert report.read_run(run)["samples"] == []


def test_the_page_has_the_settings(make_run: Callable[..., Path]) -> None:
    run = make_run("one")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"] = {"sources": [{"path": "a,b", "weight": 0.5}], "document_mask": False}
    settings["train"] |= {"max_time": None, "lr": 4e-4, "day": yaml.safe_load("2026-01-01")}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    found = report.read_run(run)["settings"]
    assert {key: value for key, value in found.items() if not key.startswith("model.")} == {
        "data.document_mask": "false",
        "data.sources[0].path": "a,b",
        "data.sources[0].weight": "0.5",
        "train.day": '"2026-01-01"',
        "train.global_batch_size": "16",
        "train.lr": "0.0004",
        "train.max_time": "null",
    }
