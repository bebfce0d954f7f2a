import base64
import csv
import gzip
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tinyllama import InputError, __version__
from tinyllama.config.model import named_config
from tinyllama.eval import harness
from tinyllama.monitor import report
from tinyllama.monitor.run_files import COLUMNS, read_metrics
from tinyllama.throughput import duration

STEPS = 40
TOKENS = 16 * 256  # a step


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


def test_where_the_time_went_in_each_stretch_of_a_run() -> None:
    """A stretch of 10 steps of 0.5 s takes 5 s, and what else training waited for."""
    rows = [{"step": 0, "tokens": 0, "val_loss": 9.0}, timed(10, validation_seconds=5.0, data_seconds=1.0)]
    rows += [{"step": 15, "tokens": 15 * TOKENS, "val_loss": 8.0}, timed(20, save_seconds=15.0, data_seconds=None)]
    none = {"slowest rank, estimated": 0.0}
    assert report.where_time_goes(rows) == [
        {"step": 0, "tokens": 0, "validation": 0.5, "checkpoints": 0.0, "data": 0.1, **none},
        {"step": 10, "tokens": 10 * TOKENS, "validation": 0.5, "checkpoints": 0.0, "data": 0.1, **none},
        {"step": 20, "tokens": 20 * TOKENS, "validation": 0.0, "checkpoints": 0.75, "data": 0.0, **none},
    ]
    assert report.where_time_goes(rows, stretches=1)[1:] == [
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


def test_losses_that_are_no_numbers_are_not_smoothed() -> None:
    rows: list[dict[str, Any]] = [{"step": i, "loss": loss} for i, loss in enumerate([4.0, math.inf, 2.0, 3.0])]
    assert report.smooth([{"step": 0, "val_loss": 9.0}, *rows]) == round(5 * 3 / 2)
    assert [row.get("smooth") for row in rows] == pytest.approx([4.0, None, 3.0, 3.0])
    assert report.smooth([{"step": 3, "val_loss": 9.0}]) == 5


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


def test_the_picture_in_the_terminal() -> None:
    falling: list[dict[str, Any]] = [{"tokens": i, "loss": 10 - i} for i in range(11)]
    lines = report.picture(falling, width=10, height=4)
    assert lines == [
        "  10.000 │⠙⢦⡀⠀⠀⠀⠀⠀⠀⠀",
        "         │⠀⠀⠈⠳⣄⠀⠀⠀⠀⠀",
        "    loss │⠀⠀⠀⠀⠀⠙⢦⡀⠀⠀",
        "   0.000 │⠀⠀⠀⠀⠀⠀⠀⠈⠳⣄",
        "         └──────────",
        "          010 tokens",
    ]
    assert report.picture([]) == []


def test_no_run_is_said_in_a_line(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="nowhere has no metrics.csv with a row in it"):
        report.write([tmp_path / "nowhere"], tmp_path / "report.html")
    run = make_run("one")
    with pytest.raises(InputError, match=r"nowhere/x.html cannot be written \(No such file or directory\)"):
        report.write([run], tmp_path / "nowhere" / "x.html")
    with pytest.raises(
        InputError, match=r"one cannot be written \(it is there and is not a file\): give another --out"
    ):
        report.write([run], run)
    with pytest.raises(InputError, match=r"^\. cannot be written \(.*\): give another --output"):
        report.write([run], Path(""))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


@pytest.mark.parametrize("name", ["metrics.csv", "config.yaml", "events.jsonl", "thesis.tex"])
def test_a_report_replaces_a_report_and_no_other_file(
    name: str, tmp_path: Path, make_run: Callable[..., Path], script: Any
) -> None:
    run = make_run("one")
    (run / "thesis.tex").write_text("the work of years")
    before = (run / name).read_bytes()
    said = f"error: {run / name} is there and is no report, and is left as it is: give another --output\n"
    assert script("report", run, "--output", run / name) == (2, "", said)
    assert (run / name).read_bytes() == before
    page = tmp_path / "report.html"
    page.touch()  # as mktemp does
    for _ in range(2):
        assert script("report", run, "--output", page)[0] == 0
        assert page.stat().st_size > 10**6


def test_a_report_through_a_link_keeps_the_link(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    run, link = make_run("one"), tmp_path / "link.html"
    (tmp_path / "web").mkdir()
    link.symlink_to("web/report.html")
    for _ in range(2):  # the link is to nothing, and then to a report
        report.write([run], link)
        assert link.is_symlink()
        assert b" run report</title>" in (tmp_path / "web" / "report.html").read_bytes()
        assert [path.name for path in (tmp_path / "web").iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    "content", [b"a,b\n1,2\n", b"", b"step,tokens\n1", b"\xff\0,\n\x81\n", b"step,tokens\n\xc2\xb2,1\n", b"step\n1\n"]
)
def test_metrics_that_are_none(make_run: Callable[..., Path], content: bytes) -> None:
    run = make_run("one")
    (run / "metrics.csv").write_bytes(content)
    with pytest.raises(InputError, match="one has no metrics.csv with a row in it"):
        report.read_run(run)


@pytest.mark.parametrize(
    "content",
    [
        *[b"model: 3", b"", b"train: [1", b"\xff\xfe\0", b"{n_layr}", b"{x: 1, train: {}}", b"[" * 3000],
        b"{train: {global_batch_size: .inf}, model: {block_size: 3}}",
    ],
)
def test_a_config_that_is_none(make_run: Callable[..., Path], content: bytes) -> None:
    run = make_run("one")
    config = (run / "config.yaml").read_bytes()
    (run / "config.yaml").write_bytes(config.replace(b"n_layer", b"n_layr") if b"n_layr" in content else content)
    with pytest.raises(InputError, match="config.yaml is not what a run writes there: take that of its newest check"):
        report.read_run(run)


def test_a_config_that_is_a_pipe_is_not_waited_for(make_run: Callable[..., Path]) -> None:
    run = make_run("one")
    (run / "config.yaml").unlink()
    os.mkfifo(run / "config.yaml")
    with pytest.raises(InputError, match="config.yaml is not what a run writes there: take that of its newest check"):
        report.read_run(run)


def test_a_config_that_stands_for_a_tree_without_end(make_run: Callable[..., Path]) -> None:
    run = make_run("one")
    with (run / "config.yaml").open("a") as file:
        file.write("log: &a [*a]\n")
    with pytest.raises(InputError, match="config.yaml is not what a run writes there: take that of its newest check"):
        report.read_run(run)


def test_lines_that_are_no_events_and_no_scores_are_passed_over(make_run: Callable[..., Path]) -> None:
    run = make_run("one")
    before = report.read_run(run)
    with (run / "events.jsonl").open("ab") as file:
        file.write(b'\n[1]\n"x"\n{"event": 3, "time": "x"}\n{"event": "start", "time": 1, "step": "x"}\n\xff\xfe\n')
        for time, step in (("NaN", "1"), ("1e400", "1"), ("1", "Infinity"), ("1", "9" * 4000), ("1", "-1")):
            file.write(f'{{"event": "done", "time": {time}, "step": {step}}}\n'.encode())
        file.write(b"[" * 100_000 + b"\n")
    with (run / "eval.csv").open("ab") as file:
        file.write(b'\xff\n7,8\n7,8,a,acc,nan\n7,1e400,a,acc,1\n7,8,"' + b"a" * 200_000 + b'",acc,1\n7,8,a,acc,1,2\n')
    assert report.read_run(run) == before
    (run / "events.jsonl").unlink()
    (run / "events.jsonl").mkdir()
    assert report.read_run(run)["events"] == []


def test_nothing_in_the_data_ends_the_script(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("<b>one")
    (run / "eval.csv").write_text("step,tokens,task,metric,value\n1,2,</script><script>alert(1)</script>,acc,0.5\n")
    report.write([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page
    assert "<b>one" not in page.split("<script")[0]


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
        assert 250 < len(run["columns"]["step"]) <= 2 * 250 + 301 + 2  # of 3001, two a stretch and the validations


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


def six_digits(number: float) -> float:
    """The number as a page has it, whose points no screen tells apart by more digits."""
    return float(f"{number:.6g}")


def data_of(page: Path) -> dict[str, Any]:
    """What the page's script reads."""
    packed = page.read_text().partition('<script id="data" type="text/plain">')[2].partition("</script>")[0]
    return json.loads(gzip.decompress(base64.b85decode(packed.replace(",", "<"))))


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


def test_numbers_that_json_has_none_for_are_gaps(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("one", steps=3)
    lines = (run / "metrics.csv").read_text().splitlines()
    cells = lines[2].split(",")
    cells[COLUMNS.index("loss")], cells[COLUMNS.index("grad_norm")] = "inf", "nan"
    (run / "metrics.csv").write_text("\n".join([*lines[:2], ",".join(cells), *lines[3:]]) + "\n")
    report.write([run], tmp_path / "report.html")
    columns = data_of(tmp_path / "report.html")["runs"][0]["columns"]
    for name in ("loss", "grad_norm"):
        assert columns[name][:2] == [None, None]
        assert None not in columns[name][2:]
    assert columns["lr"][1] == 1e-3


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


def test_an_event_without_a_step_is_at_that_of_the_one_before(tmp_path: Path) -> None:
    lines = [
        {"time": 5, "event": "start", "step": 3, "ops": {}, "changed": [], "note": None, "world_size": 2, "skipped": 0},
        {"time": 6, "event": "checkpoint_failed", "error": "disk full"},
        {"time": 7, "event": "start", "step": 0},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.read_events(tmp_path / "events.jsonl", {0: 0, 10: 100}) == [
        {"kind": "start", "step": 3, "tokens": 30, "time": 5.0, "details": "world_size 2, skipped 0"},
        {"kind": "checkpoint_failed", "step": 3, "tokens": 30, "time": 6.0, "details": "error disk full"},
        {"kind": "restart", "step": 0, "tokens": 0, "time": 7.0, "details": ""},
    ]
    assert report.read_events(tmp_path / "none", {0: 0}) == []


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


def test_the_picture_shows_validations_apart_and_leaves_out_what_is_infinite() -> None:
    rows: list[dict[str, Any]] = [{"tokens": 0, "val_loss": 10.0}, {"tokens": 10, "loss": None, "val_loss": 0.0}]
    rows += [{"tokens": 5, "loss": math.inf}]
    assert report.picture(rows, width=4, height=2) == [
        "  10.000 │⠁⠀⠀⠀",
        "    loss │⠀⠀⠀⢀",  # two points, no line between them
        "         └────",
        "          010 tokens",
    ]


def test_the_command_draws_and_says_where_the_page_is(
    make_run: Callable[..., Path], tmp_path: Path, script: Any
) -> None:
    runs = [make_run("one"), make_run("two", height=3.0)]
    code, out, err = script("report", *runs)
    assert (code, err) == (0, "")
    drawn = report.picture(read_metrics(runs[0] / "metrics.csv"))
    assert out.splitlines() == [*drawn, f"report   {runs[0] / 'report.html'}"]
    assert [run["name"] for run in data_of(runs[0] / "report.html")["runs"]] == ["one", "two"]
    code, out, err = script("report", runs[1], "--output", tmp_path / "page.html")
    assert out.splitlines()[-1] == f"report   {tmp_path / 'page.html'}"
    assert not (runs[1] / "report.html").exists()


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


def show(browser: Any, page: Path) -> None:
    """Open the page, and return once it has drawn everything."""
    from selenium.webdriver.support.wait import WebDriverWait

    browser.get(page.as_uri())
    WebDriverWait(browser, 60).until(
        lambda _: browser.execute_script("return 'drawn' in document.documentElement.dataset")
    )


def shown(browser: Any, plot: str) -> list[dict[str, Any]]:
    """The curves of a plot as plotly.js holds them."""
    script = "return JSON.stringify(document.getElementById(arguments[0]).data.map(({name, x, y}) => ({name, x, y})))"
    return json.loads(browser.execute_script(script, f"plot-{plot}"))


def curve(run: Path, x: str, y: str) -> tuple[list[float], list[float]]:
    rows = [row for row in read_metrics(run / "metrics.csv") if row[y] is not None]
    return [row[x] for row in rows], [six_digits(row[y]) for row in rows]


@pytest.mark.browser
def test_each_plot_has_the_values_of_metrics_csv(browser: Any, make_run: Callable[..., Path], tmp_path: Path) -> None:
    run, page = make_run("one"), tmp_path / "report.html"
    report.write([run], page)
    assert page.stat().st_size < 2e6
    show(browser, page)
    for plot, name, column in [
        ("loss", "training, as logged", "loss"),
        ("loss", "validation", "val_loss"),
        ("val_bpb", "val_bpb", "val_bpb"),
        *((name, name, name) for name in ("lr", "grad_norm", "tokens_per_second", "mfu", "max_memory_gb")),
    ]:
        (found,) = [one for one in shown(browser, plot) if one["name"] == name]
        assert (found["x"], found["y"]) == curve(run, "tokens", column), column
    assert [one["name"] for one in shown(browser, "sources")] == ["prose", "code"]
    assert [set(one["y"]) for one in shown(browser, "sources")] == [{0.75}, {0.25}]
    assert shown(browser, "time") == [
        {
            "name": "data",
            "x": [step * TOKENS for step in range(STEPS + 1)],
            "y": [pytest.approx(1 / 3)] * (STEPS + 1),
        }
    ]
    marks = {one["name"]: one["x"] for one in shown(browser, "timeline")}
    assert marks["restart"] == [10 * TOKENS, 20 * TOKENS, 30 * TOKENS]
    assert marks["skip"] == [15 * TOKENS]
    assert marks["checkpoint_failed"] == [30 * TOKENS]
    scores = shown(browser, "eval-hellaswag-acc_norm")[0]
    assert (scores["x"], scores["y"]) == ([10 * TOKENS, 20 * TOKENS], [0.26, 0.27])
    browser.find_element("xpath", "//div[@id='x-axis']/button[text()='step']").click()
    assert shown(browser, "lr")[0]["x"] == curve(run, "step", "lr")[0]
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_each_validation_source_is_a_line(browser: Any, make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs, page = [make_run("one"), make_run("two", height=3.0)], tmp_path / "report.html"
    for run in runs:
        with (run / "metrics.csv").open(newline="") as file:
            header, *rows = list(csv.reader(file))
        at = header.index("val_loss")
        halves = [[row[at] and str(float(row[at]) * share) for share in (0.5, 2.0)] for row in rows]
        with (run / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*header, "val_loss/web", "val_loss/<b>code, 7"])
            writer.writerows([row + extra for row, extra in zip(rows, halves, strict=True)])
    report.write(runs[:1], page)
    show(browser, page)
    tokens, losses = curve(runs[0], "tokens", "val_loss")
    assert shown(browser, "by-source") == [
        {"name": "web", "x": tokens, "y": pytest.approx([loss / 2 for loss in losses], rel=1e-5)},
        {"name": "&lt;b&gt;code, 7", "x": tokens, "y": pytest.approx([loss * 2 for loss in losses], rel=1e-5)},
    ]
    assert "web 2.0122, <b>code, 7 8.0488" in browser.find_element("id", "summary").text
    assert not browser.find_element("id", "card-bits-by-source").is_displayed()  # nobody knows its bytes
    report.write(runs, page)
    show(browser, page)
    names = [one["name"] for one in shown(browser, "by-source")]
    assert names == [f"{run} · {source}" for run in ("one", "two") for source in ("web", "&lt;b&gt;code, 7")]
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_a_plot_is_saved_as_a_picture(browser: Any, make_run: Callable[..., Path], tmp_path: Path) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    run, page, downloads = make_run("one"), tmp_path / "report.html", tmp_path / "downloads"
    report.write([run], page)
    behavior = {"behavior": "allow", "downloadPath": str(downloads)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
    show(browser, page)
    browser.find_element("xpath", "//article[@id='card-loss']//button[text()='save']").click()
    picture = downloads / "one loss.png"
    WebDriverWait(browser, 60).until(lambda _: picture.is_file())
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(picture.read_bytes()[at : at + 4]) for at in (16, 20))
    size = browser.execute_script("const box = document.getElementById('plot-loss'); return [box.clientWidth, 400]")
    assert [width, height] == [2 * length for length in size]
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_settings_and_scale_as_the_page_opens(browser: Any, make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs, page = [make_run("one"), make_run("two", height=3.0)], tmp_path / "report.html"
    for run, lr, timeout in zip(runs, (1e-3, 2e-3), (300, 300.0), strict=True):
        settings = yaml.safe_load((run / "config.yaml").read_text())
        settings |= {"out_dir": str(run), "optim": {"lr": lr, "name": "<b>adamw"}, "log": {"timeout": timeout}}
        sample = {"step": 1000, "tokens": 9, "prompt": "<b>Once", "text": " upon\n  a <i>time" + "\n" * 99}
        (run / "samples.jsonl").write_text(json.dumps(sample))
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
    report.write(runs, page)
    show(browser, page)
    cells = "return [...document.querySelectorAll(arguments[0])].map(cell => cell.textContent)"
    assert browser.execute_script(cells, "#differing :is(th, td)") == ["", "one", "two", "optim.lr", "0.001", "0.002"]
    texts = [f"{name} · step 1,000| upon\n  a <i>time" + "\n" * 99 for name in ("one", "two")]
    assert "|".join(browser.execute_script(cells, "#samples td")) == "|".join(texts)
    tallest = "return Math.max(...[...document.querySelectorAll('#samples tr')].map(row => row.clientHeight))"
    assert browser.execute_script(tallest) < 200  # a text of blank lines scrolls
    assert browser.execute_script(cells, "#samples summary") == ["Samples of “<b>Once”"]
    everything = browser.execute_script(cells, "#settings td")
    at = everything.index("optim.name")
    assert everything[at : at + 3] == ["optim.name", "<b>adamw", "<b>adamw"]
    assert "model.n_layer" in everything
    shown_now = "return [...document.querySelectorAll('table')].map(table => table.checkVisibility())"
    assert browser.execute_script(shown_now) == [True, True, False]  # all of them when asked for
    axis = "return document.getElementById('plot-loss').layout.yaxis.type"
    assert browser.execute_script(axis) == "linear"
    report.write(runs[:1], page)
    show(browser, page)
    assert browser.execute_script(cells, "#differing td") == []
    assert browser.get_log("browser") == []


HOSTILE = ["<b>x</b>", "a<br>b", "<img src=x onerror=alert(1)>", "&lt;&amp;", "$x_1$", "%{y}", "<extra>e</extra>"]
HOSTILE += [
    "__proto__",
    "constructor",
    "toString",
    "@DATA@",
    "@PLOTLY@ @TITLE@",
    "</script>",
    "学习",
    "\u202eabc",
    "a\nb\x1b",
]
SIZES = [1e-30, 1e300, 1.7e308, 5e-324, 0.0, -1e300, -1.7e308, 2.5, math.inf, -math.inf, math.nan]


def hostile_run(run: Path) -> Path:
    """Put names and texts of every kind, and losses of every size, wherever a file of ``run`` may hold them."""
    columns = [*COLUMNS, *(f"tokens_{name}" for name in HOSTILE if name.isprintable())]
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for step, size in enumerate(SIZES, 1):
            row = dict.fromkeys(columns, size) | {"step": step, "tokens": step * TOKENS}
            writer.writerow(row | {name: step * TOKENS for name in columns if name not in COLUMNS})
    with (run / "events.jsonl").open("w") as file:
        for step, text in enumerate([*HOSTILE, "x" * 10**7, "start", "start"], 1):
            file.write(json.dumps({"event": text, "time": 60 * step, "step": step, text: text, "more": [text]}) + "\n")
    with (run / "eval.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "tokens", "task", "metric", "value"])
        for text in HOSTILE:
            writer.writerow([1, TOKENS, text.replace("\n", ""), text.replace("\n", ""), 0.5])
            writer.writerow([2, 2 * TOKENS, text.replace("\n", ""), "acc", 1e300])
    return run


def test_any_name_text_and_loss_makes_a_page(make_run: Callable[..., Path], tmp_path: Path, script: Any) -> None:
    for name in ("<img src=x onerror=alert(1)>", "@PLOTLY@ @DATA@", "__proto__", "\u202ea\nb\x1b"):
        run = hostile_run(make_run(name))
        page = tmp_path / "report.html"
        code, out, err = script("report", run, "--output", page)
        assert (code, err) == (0, "")
        assert all(len(line) <= 79 for line in out.splitlines()[:-1])
        (shown,) = data_of(page)["runs"]
        assert shown["name"] == run.name
        assert shown["columns"]["loss"] == [size if math.isfinite(size) else None for size in SIZES]
        assert all(math.isfinite(value) for value in shown["columns"]["smooth"] if value is not None)
        assert all(event["kind"].isprintable() and event["details"].isprintable() for event in shown["events"])
        assert len(shown["events"]) == len(HOSTILE) + 3
        assert page.read_text().count("Plotly.react(") == page.read_text().count("function draw(plot)") == 1
        assert page.stat().st_size < 2e6
        shutil.rmtree(run)
    page_of_bytes = make_run("one").rename(tmp_path / "of\udcffbytes")
    report.write([page_of_bytes], tmp_path / "report.html")
    assert "<title>of?bytes ·" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1e-30, 2e-30, ["2.0e-30", "1.0e-30"]),
        (2.5, 1e300, ["1.0e+300", "2.500"]),
        (-1.7e308, 1.7e308, ["1.7e+308", "-1.7e+308"]),
        (5e-324, 5e-324, ["4.9e-324", "4.9e-324"]),
        (0.0, 0.0, ["0.000", "0.000"]),
        (-3.0, 12345.0, ["1.2e+04", "-3.000"]),
    ],
)
def test_the_picture_has_losses_of_any_size(low: float, high: float, labels: list[str]) -> None:
    rows: list[dict[str, Any]] = [{"tokens": 0, "loss": high}, {"tokens": 2**62, "loss": low, "val_loss": low}]
    top, *middle, bottom, axis, _ = report.picture(rows)
    assert [line.partition("│")[0].strip() for line in (top, bottom)] == labels
    assert (top[-1] != "⠀") is (low == high)  # from the upper left to the lower right, or all the way along the top
    assert axis.strip() == "└" + "─" * 68


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        *[("train", "global_batch_size", int("9" * 4000)), ("train", "global_batch_size", -1)],
        *[
            ("model", "n_layer", size)
            for size in (int("9" * 4000), 0, -1, 10**20, "x", "x" * 4000, [1], None, math.nan)
        ],
        *[("model", "n_embd", size) for size in ("x", "%s", {}, math.inf)],
        *[("model", "name", name) for name in (["x"], None, 3)],
    ],
)
def test_settings_of_no_run_are_said_in_a_line(
    make_run: Callable[..., Path], group: str, name: str, value: Any
) -> None:
    run = make_run("one")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings[group][name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match="config.yaml is not what a run writes there"):
        report.read_run(run)


@pytest.mark.browser
def test_any_name_and_text_is_drawn_as_it_is(browser: Any, make_run: Callable[..., Path], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    names = ["<b>x<b>", "a<br>b & $y$ %{x}"]
    report.write([hostile_run(make_run(name)) for name in names], page)
    show(browser, page)
    texts = "return [...document.querySelectorAll(arguments[0])].map(text => text.textContent)"
    assert browser.execute_script("return document.querySelectorAll('b, img, main i, a[href]').length") == 0
    assert browser.execute_script(texts, "#summary h2") == names
    legend = browser.execute_script(texts, "#plot-loss .legendtext")
    assert [text.replace("\xa0", " ") for text in legend] == [
        f"{name} · {what}" for name in names for what in ("training, mean of 5 steps", "validation")
    ]
    kinds = {event["kind"] for event in data_of(page)["runs"][0]["events"]}
    assert {text.replace("\xa0", " ") for text in browser.execute_script(texts, "#plot-timeline .ytick text")} == kinds
    tasks = {text.replace("\n", "") for text in HOSTILE}
    shown_tasks = browser.execute_script(texts, "#plots h2")
    assert {text for title in shown_tasks for text in tasks if title in (text + "acc", 2 * text)} == tasks
    ids = browser.execute_script("return [...document.querySelectorAll('.plot')].map(plot => plot.id)")
    assert len(set(ids)) == len(ids)
    numbers = "return [...document.querySelectorAll('.plot path')].map(path => path.getAttribute('d') || '').join()"
    for _ in range(2):  # linear, then logarithmic
        assert [one["y"] for one in shown(browser, "loss") if one["name"].endswith("as logged")][0] == SIZES[:8]
        assert not re.search("NaN|Infinity", browser.execute_script(numbers))
        browser.find_element("xpath", "//article[@id='card-loss']//button[text()='log']").click()
    assert browser.get_log("browser") == []


@pytest.mark.browser
def test_two_runs_on_a_phone_in_the_dark_and_in_print(
    browser: Any, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    runs, page = [make_run("one"), make_run("two", height=3.0)], tmp_path / "report.html"
    report.write(runs, page)
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    show(browser, page)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390  # nothing sticks out
    assert [one["name"] for one in shown(browser, "lr")] == ["one", "two"]
    validations = [one for one in shown(browser, "loss") if one["name"].endswith("validation")]
    assert [one["name"] for one in shown(browser, "time")] == ["one · data", "two · data"]
    assert [one["y"] for one in validations] == [curve(run, "tokens", "val_loss")[1] for run in runs]
    browser.find_element("xpath", "//section[@id='summary']//h2[contains(., 'one')]").click()
    assert [one["name"] for one in shown(browser, "lr")] == ["two"]
    ink = "return document.getElementById('plot-loss').layout.font.color"
    light = browser.execute_script(ink)
    browser.find_element("xpath", "//div[@id='theme']/button[text()='dark']").click()
    dark = browser.execute_script(ink)
    assert light != dark
    sizes = (
        "return [...document.querySelectorAll('.card:not([hidden]) .plot')].map(plot => [plot.clientWidth, "
        "plot.clientHeight, plot.querySelector('svg').clientWidth, plot.querySelector('svg').clientHeight])"
    )
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script(ink) == light
    drawn = browser.execute_script(sizes)
    assert all(plot[:2] == plot[2:] for plot in drawn)
    assert all(300 < width < 340 or 600 < width < 700 for width, *_ in drawn)  # of a sheet, not of the phone
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script(ink) == dark
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    assert all(plot[0] == plot[2] < 390 for plot in browser.execute_script(sizes))
    assert browser.get_log("browser") == []
