"""Reports of runs whose files are absent, damaged, or hold names, texts and numbers of any kind."""

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from reports import HOSTILE, SIZES, data_of, hostile_run

from tinyllama import InputError
from tinyllama.monitor import report
from tinyllama.monitor.run_files import COLUMNS


def test_losses_that_are_no_numbers_are_not_smoothed() -> None:
    rows: list[dict[str, Any]] = [{"step": i, "loss": loss} for i, loss in enumerate([4.0, math.inf, 2.0, 3.0])]
    assert report.smooth([{"step": 0, "val_loss": 9.0}, *rows]) == round(5 * 3 / 2)
    assert [row.get("smooth") for row in rows] == pytest.approx([4.0, None, 3.0, 3.0])
    assert report.smooth([{"step": 3, "val_loss": 9.0}]) == 5


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
