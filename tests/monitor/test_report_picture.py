"""The picture of the loss that report.py draws in the terminal."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reports import data_of

from tinyllama.monitor import report
from tinyllama.monitor.run_files import read_metrics


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
