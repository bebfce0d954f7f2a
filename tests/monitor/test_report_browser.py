"""The report in a browser: its plots hold the values of the run's files, whatever their names and texts are."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from reports import HOSTILE, SIZES, STEPS, TOKENS, data_of, hostile_run, six_digits

from tinyllama.monitor import report
from tinyllama.monitor.run_files import read_metrics


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
