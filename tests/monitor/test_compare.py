"""Runs written by hand, whose comparison is known."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tinyllama import InputError
from tinyllama.config.args import DataArgs, PretrainArgs, Source, ValidationSource
from tinyllama.config.model import named_config
from tinyllama.monitor import compare, report
from tinyllama.monitor.compare import read_curve, read_curves
from tinyllama.monitor.run_files import COLUMNS, branched_from

SPEED = COLUMNS.index("tokens_per_second")
VAL_LOSS = COLUMNS.index("val_loss")

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A function that writes a run of 10 tokens a step: ``val_losses`` by step, and ``speeds`` of the steps after.

    The loss of each validation source is by one above that of the source before.
    """
    from dataclasses import asdict, replace

    def make(
        name: str,
        val_losses: dict[int, float],
        speeds: dict[int, float],
        origin: Path | None = None,
        ends: str = "done",
        sources: tuple[str, ...] = (),
        **settings: Any,
    ) -> Path:
        out_dir = tmp_path / name
        out_dir.mkdir(parents=True)
        with (out_dir / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *(f"val_loss/{source}" for source in sources)])
            writer.writeheader()
            for step in sorted(val_losses.keys() | speeds.keys()):
                row: dict[str, Any] = {"step": step, "tokens": 10 * step, "val_loss": val_losses.get(step)}
                for i, source in enumerate(sources if step in val_losses else ()):
                    row[f"val_loss/{source}"] = val_losses[step] + i
                writer.writerow(row | {"tokens_per_second": speeds.get(step), "skipped": 0})
        step = int(origin.name[5:]) if origin else 0
        events = [{"time": 1, "event": "start", "step": step, "resumed_from": str(origin) if origin else None}]
        events += [{"time": 2, "event": ends, "step": max(val_losses, default=0)}]
        (out_dir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        args = PretrainArgs(out_dir=str(out_dir))
        args = replace(args, data=DataArgs([Source("data/train")], [ValidationSource("data/held_out")]))
        content = asdict(args) | {"model": asdict(named_config("quickstart"))}
        for key, value in settings.items():
            group, _, field = key.partition("__")
            content[group][field] = value
        (out_dir / "config.yaml").write_text(yaml.safe_dump(content))
        return out_dir

    return make


@pytest.fixture
def three(make_run: MakeRun) -> list[Path]:
    """AdamW; Muon, as good after 125 of its 200 tokens; and one that never is, and was not done."""
    slow = {5: 10.0, 10: 10.0, 20: 20.0}  # 100 tokens in 10 s, 100 in 5 s
    return [
        make_run("adamw", {0: 8.0, 10: 4.0, 20: 2.0}, slow),
        make_run("muon", {0: 9.0, 10: 3.0, 15: 1.0}, {5: 5.0, 15: 5.0}, optim__name="muon", optim__lr=8e-3),
        make_run("worse", {0: 8.0, 10: 4.0, 20: 5.0}, {20: 40.0}, ends="stop", optim__lr=4e-3),
    ]


def test_what_a_run_needs_to_the_loss_of_another(three: list[Path]) -> None:
    found = compare.compare(read_curves(three))
    adamw, muon, worse = map(str, three)
    assert [
        {key: run[key] for key in ("run", "tokens", "seconds", "loss", "best_loss", "is_done")} for run in found["runs"]
    ] == [
        {"run": adamw, "tokens": 200, "seconds": 15.0, "loss": 2.0, "best_loss": 2.0, "is_done": True},
        {"run": muon, "tokens": 150, "seconds": 30.0, "loss": 1.0, "best_loss": 1.0, "is_done": True},
        {"run": worse, "tokens": 200, "seconds": 5.0, "loss": 5.0, "best_loss": 4.0, "is_done": False},
    ]
    reached = {(row["run"], row["target"]): row for row in found["reached"]}
    assert len(reached) == 6
    # half way between 3.0 at 100 tokens and 1.0 at 150, at 5 tokens/s
    assert reached[muon, adamw] == {
        **{"run": muon, "target": adamw, "loss": 2.0, "tokens": 125.0, "share_of_tokens": 0.625},
        **{"seconds": 25.0, "share_of_seconds": 25 / 15, "at_most": False},
    }
    # three quarters of the way from 8.0 to 4.0
    assert reached[adamw, worse]["tokens"] == 75.0
    assert reached[adamw, worse]["seconds"] == 7.5
    assert reached[adamw, muon] == {
        **{"run": adamw, "target": muon, "loss": 1.0, "tokens": None, "share_of_tokens": None},
        **{"seconds": None, "share_of_seconds": None, "at_most": False},
    }
    assert found["losses"] == [
        {"tokens": 0, "losses": [8.0, 9.0, 8.0]},
        {"tokens": 100, "losses": [4.0, 3.0, 4.0]},
        {"tokens": 150, "losses": [3.0, 1.0, 4.5]},
    ]
    assert found["settings"] == {"optim.name": ["adamw", "muon", "adamw"], "optim.lr": [4e-4, 8e-3, 4e-3]}


def test_the_first_validation_may_have_reached_it(make_run: MakeRun) -> None:
    runs = [make_run("one", {10: 3.0, 20: 2.0}, {20: 1.0}), make_run("two", {10: 2.5, 20: 3.5}, {20: 1.0})]
    one, two = compare.compare(read_curves(runs))["reached"]
    assert (one["target"], one["tokens"], one["at_most"]) == (str(runs[0]), None, False)
    assert (two["target"], two["tokens"], two["at_most"]) == (str(runs[1]), 100.0, True)


def test_a_branch_has_the_tokens_and_the_time_of_its_history(make_run: MakeRun) -> None:
    trunk = make_run("trunk", {0: 9.0, 10: 5.0, 20: 4.0, 30: 3.5}, {10: 10.0, 20: 5.0, 30: 1.0})
    branch = make_run("branch", {24: 2.0}, {24: 8.0}, origin=trunk / "checkpoints" / "step-00000020")
    of_branch = make_run("again", {22: 3.0}, {22: 4.0}, origin=branch / "checkpoints" / "step-00000021")
    curve = read_curve(branch)
    assert (curve.tokens, curve.losses) == ([0, 100, 200, 240], [9.0, 5.0, 4.0, 2.0])
    assert curve.seconds_at(240) == 10 + 20 + 5
    assert curve.branched_from == trunk / "checkpoints" / "step-00000020"
    curve = read_curve(of_branch)
    assert (curve.tokens, curve.losses) == ([0, 100, 200, 220], [9.0, 5.0, 4.0, 3.0])
    assert curve.seconds_at(220) == 10 + 20 + 5  # the branch has no row at step 21: 20 tokens at 4 tokens/s
    reached = compare.compare(read_curves([trunk, branch]))["reached"]
    assert [row["tokens"] for row in reached] == [210.0, None]  # a quarter of the way from 4.0 to 2.0

    # moved together, and alone
    moved = trunk.parent / "moved"
    moved.mkdir()
    trunk, branch = (run.rename(moved / run.name) for run in (trunk, branch))
    assert read_curve(branch).seconds_at(240) == 35
    trunk.rename(moved / "gone")
    curve = read_curve(branch)
    assert (curve.tokens, curve.losses, curve.clock) == ([240], [2.0], None)


def test_a_branch_that_was_validated_otherwise_has_only_its_own_losses(make_run: MakeRun) -> None:
    trunk = make_run("trunk", {0: 9.0, 10: 5.0}, {10: 10.0})
    origin = trunk / "checkpoints" / "step-00000010"
    branch = make_run("branch", {20: 3.0}, {20: 10.0}, origin=origin, eval__max_samples=7)
    curve = read_curve(branch)
    assert (curve.tokens, curve.losses, curve.seconds_at(200)) == ([200], [3.0], 20.0)


def test_branches_in_a_circle_end(make_run: MakeRun, tmp_path: Path) -> None:
    one = make_run("one", {20: 3.0}, {20: 10.0}, origin=tmp_path / "two" / "checkpoints" / "step-00000010")
    make_run("two", {20: 3.0}, {20: 10.0}, origin=one / "checkpoints" / "step-00000010")
    assert read_curve(one).tokens == [200]


def test_losses_that_are_not_finite_and_rows_without_a_speed_are_passed_over(make_run: MakeRun) -> None:
    run = make_run("run", {0: 9.0, 10: float("nan"), 20: 3.0, 30: 2.0}, {10: float("inf"), 20: 10.0})
    curve = read_curve(run)
    assert (curve.tokens, curve.losses) == ([0, 200, 300], [9.0, 3.0, 2.0])
    assert curve.seconds_at(300) == 30  # as fast after the last speed as there
    assert read_curve(make_run("no_speed", {0: 9.0}, {})).clock is None


def test_each_validation_source_is_compared_where_all_runs_have_it(make_run: MakeRun, script: Any) -> None:
    runs = [
        make_run("one", {0: 8.0, 10: 4.0, 20: 2.0}, {20: 1.0}, sources=("web", "code", "old")),
        make_run("two", {0: 9.0, 10: 3.0, 15: 1.0}, {15: 1.0}, sources=("web", "code")),
    ]
    found = compare.compare(read_curves(runs))
    assert found["by_source"] == [
        {"source": "web", "tokens": 150, "losses": [3.0, 1.0]},
        {"source": "code", "tokens": 150, "losses": [4.0, 2.0]},
    ]
    table = """\
Held-out loss by validation source after 150 tokens
source                                            A          B
web                                          3.0000     1.0000
code                                         4.0000     2.0000
"""
    code, out, _ = script("compare_runs", *runs)
    assert code == 0
    assert table in out
    later = make_run("later", {30: 1.0}, {30: 1.0}, sources=("web", "code"))
    assert compare.compare(read_curves([runs[0], later]))["by_source"] == []  # no token count in common


def test_a_branch_has_the_sources_of_its_history_unless_it_was_validated_otherwise(make_run: MakeRun) -> None:
    trunk = make_run("trunk", {0: 9.0, 10: 5.0}, {10: 1.0}, sources=("web", "code"))
    origin = trunk / "checkpoints" / "step-00000010"
    branch = make_run("branch", {20: 2.0}, {20: 1.0}, origin=origin, sources=("web", "code"))
    assert read_curve(branch).by_source["code"] == ([0, 100, 200], [10.0, 6.0, 3.0])
    other = make_run("other", {20: 2.0}, {20: 1.0}, origin=origin, sources=("web",), eval__max_samples=7)
    assert read_curve(other).by_source == {"web": ([200], [2.0])}


def test_many_validations_are_thinned_to_ten_and_keep_the_last(make_run: MakeRun) -> None:
    runs = [make_run(name, {step: 9 - step / 10 for step in range(50)}, {49: 1.0}) for name in ("one", "two")]
    tokens = compare.common_tokens(read_curves(runs))
    assert len(tokens) == 10
    assert (tokens[0], tokens[-1]) == (0, 490)


def test_runs_without_a_token_count_in_common_are_compared(make_run: MakeRun, script: Any) -> None:
    runs = [make_run("one", {0: 9.0, 5: 8.0}, {5: 1.0}), make_run("two", {20: 9.0, 30: 8.0}, {30: 1.0})]
    assert compare.compare(read_curves(runs))["losses"] == []
    assert script("compare_runs", *runs)[0] == 0


TABLES = """\
A    .../adamw
B    .../muon
C    .../worse, not done

Where each run stands
run              tokens           training      held-out loss               best
A                   200                15s             2.0000             2.0000
B                   150                30s             1.0000             1.0000
C                   200                 5s             5.0000             4.0000

Held-out loss at equal tokens, interpolated between validations
tokens                        A          B          C
0                        8.0000     9.0000     8.0000
100                      4.0000     3.0000     4.0000
150                      3.0000     1.0000     4.5000

What each run needs to reach another's last held-out loss, and as a share of what that run needed
run                loss             tokens              share           training              share
B            A's 2.0000                125              0.625                25s              1.667
C            A's 2.0000              never
A            B's 1.0000              never
C            B's 1.0000              never
A            C's 5.0000                 75              0.375                 8s              1.500
B            C's 5.0000                 67              0.333                13s              2.667

Settings that differ
                                                       A                     B                     C
optim.lr                                          0.0004                 0.008                 0.004
optim.name                                         adamw                  muon                 adamw

report   .../page.html
"""


def test_the_command_prints_tables(three: list[Path], script: Any, tmp_path: Path) -> None:
    code, out, err = script("compare_runs", *three, "--output", tmp_path / "page.html")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    assert out.replace(str(tmp_path), "...") == TABLES


def test_the_command_prints_json_and_writes_the_page(three: list[Path], script: Any, tmp_path: Path) -> None:
    code, out, err = script("compare_runs", *three, "--json", "--output", tmp_path / "page.html")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(json.dumps(compare.compare(read_curves(three))))
    assert "<title>3 runs" in (tmp_path / "page.html").read_text()


def test_any_number_of_runs_with_any_name_fits_the_width(make_run: MakeRun, script: Any) -> None:
    names = [f"{'long' * 40}{i}" for i in range(28)] + ["a\x1b[2J\nb"]
    runs = [make_run(name, {0: 9.0, 10: 1e30 / (i + 1)}, {10: 1.0}, optim__lr=i) for i, name in enumerate(names)]
    code, out, err = script("compare_runs", *runs)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    assert all(line.isprintable() for line in out.splitlines())
    assert "AA " in out


def refused(script: Any, *runs: Path) -> str:
    code, out, err = script("compare_runs", *runs)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    return line.removeprefix("error: ")


def test_runs_that_cannot_be_compared_are_refused_in_a_line(make_run: MakeRun, three: list[Path], script: Any) -> None:
    one = three[0]
    assert refused(script, one) == f"{one} alone cannot be compared: give the out_dir of another run, too"
    assert refused(script, one, one / ".") == f"{one} is given twice: give each run once"
    nowhere = one.parent / "nowhere"
    begun = f"{nowhere / 'metrics.csv'} is not there: give the out_dir of a run that has begun"
    assert refused(script, one, nowhere) == begun
    unseen = make_run("unseen", {}, {10: 1.0})
    assert refused(script, one, unseen) == (
        f"{unseen / 'metrics.csv'} has no held-out loss (val_loss): compare runs with data.validation, after a "
        "validation"
    )
    other = make_run("other", {0: 9.0}, {10: 1.0}, data__validation=[{"path": "data/more"}])
    assert refused(script, one, other) == (
        f"{other} and {one} have held-out losses of another data.validation (['data/more'], ['data/held_out']): "
        "compare runs that were validated alike"
    )
    fewer = make_run("fewer", {0: 9.0}, {10: 1.0}, eval__max_samples=5)
    assert "held-out losses of another eval.max_samples (5, 2048)" in refused(script, one, fewer)
    longer = make_run("longer", {0: 9.0}, {10: 1.0}, model__block_size=8192)
    assert "held-out losses of another model.block_size (8192, 256)" in refused(script, one, longer)


def test_the_same_held_out_data_may_be_in_two_folders(make_run: MakeRun, packed_folder: Any) -> None:
    one, two, more = (packed_folder([[list(range(n))]], name=f"held_out_{i}") for i, n in enumerate((90, 90, 91)))
    runs = [
        make_run(f"run_{i}", {0: 9.0}, {10: 1.0}, data__validation=[{"path": str(p)}]) for i, p in enumerate((one, two))
    ]
    assert len(read_curves(runs)) == 2
    other = make_run("other", {0: 9.0}, {10: 1.0}, data__validation=[{"path": str(more)}])
    with pytest.raises(InputError, match="of another data.validation"):
        read_curves([runs[0], other])


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda lines: [*lines[:2], lines[2].replace("4.0", "4.x"), *lines[3:]], 3),
        (lambda lines: [*lines[:2], "x", *lines[2:]], 3),
        (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], 4),
        (lambda lines: [*lines, lines[-1]], 6),
        (lambda lines: [lines[0][:9], *lines[1:]], 2),
        (lambda lines: [*lines[:2], "\0" * 50, *lines[3:]], 3),
    ],
)
def test_a_damaged_line_is_named(make_run: MakeRun, three: list[Path], script: Any, damage: Any, line: int) -> None:
    run = make_run("damaged", {0: 8.0, 10: 4.0, 20: 2.0, 30: 1.0}, {30: 10.0})
    file = run / "metrics.csv"
    file.write_text("\n".join(damage(file.read_text().splitlines())) + "\n")
    assert refused(script, three[0], run) == f"{file} is damaged in line {line}: restore the file, or delete that line"


def record_starts(out_dir: Path, *starts: dict[str, Any]) -> None:
    """Give ``out_dir`` the events of these starts, of a run that is no branch."""
    common = {"time": 1, "event": "start", "resumed_from": None, "world_size": 1}
    (out_dir / "events.jsonl").write_text("".join(json.dumps(common | start) + "\n" for start in starts))


def record_validation(out_dir: Path, *starts: tuple[int, list[str]]) -> None:
    """Give ``out_dir`` the events of these starts: a step, and the fingerprints of the validation data."""
    record_starts(out_dir, *({"step": step, "data": {"validation": fingerprints}} for step, fingerprints in starts))


def test_held_out_losses_of_one_folder_that_held_other_data_are_refused(make_run: MakeRun) -> None:
    runs = [make_run(name, {0: 8.0, 10: 4.0}, {10: 10.0}) for name in ("one", "two")]
    for run, fingerprint in zip(runs, "ab", strict=True):
        record_validation(run, (0, [fingerprint]))
    with pytest.raises(InputError) as error:
        read_curves(runs)
    assert str(error.value) == (
        f"{runs[1]} and {runs[0]} have held-out losses of another fingerprint of data.validation (['b'], ['a']): "
        "compare runs that were validated alike"
    )
    record_validation(runs[1], (0, ["a"]))
    assert len(read_curves(runs)) == 2


def test_one_validation_set_may_lie_in_two_folders_that_are_gone(make_run: MakeRun) -> None:
    there = [{"path": f"data/{name}"} for name in "ab"]
    runs = [make_run(one["path"][-1], {0: 8.0, 10: 4.0}, {10: 10.0}, data__validation=[one]) for one in there]
    with pytest.raises(InputError, match="another data.validation"):
        read_curves(runs)  # of earlier versions, which recorded no fingerprints
    for run in runs:
        record_validation(run, (0, ["same"]))
    assert len(read_curves(runs)) == 2


def test_document_masks_make_other_losses(make_run: MakeRun) -> None:
    runs = [make_run(str(mask), {0: 8.0, 10: 4.0}, {10: 10.0}, data__document_mask=mask) for mask in (False, True)]
    with pytest.raises(InputError, match="another data.document_mask"):
        read_curves(runs)


def test_losses_on_validation_data_that_were_replaced_during_the_run_do_not_count(make_run: MakeRun) -> None:
    run = make_run("run", {0: 8.0, 10: 1.0, 20: 1.5, 30: 3.0, 40: 2.0}, {40: 10.0}, sources=("web",))
    record_validation(run, (0, ["a"]), (20, ["b"]))
    curve = read_curve(run)
    assert (curve.tokens, curve.losses) == ([300, 400], [3.0, 2.0])
    assert curve.by_source == {"web": ([300, 400], [3.0, 2.0])}
    record_validation(run, (0, ["b"]), (20, ["b"]))
    assert read_curve(run).losses == [8.0, 1.0, 1.5, 3.0, 2.0]


@pytest.mark.parametrize(
    ("changed", "losses"),
    [
        ({"eval.max_samples": [2048, 64]}, [3.0, 2.0]),
        ({"optim.lr": [1e-3, 2e-3], "data.document_mask": [False, True]}, [3.0, 2.0]),
        ({"optim.lr": [1e-3, 2e-3], "eval.interval": [10, 20]}, [8.0, 1.0, 1.5, 3.0, 2.0]),
        ("damaged", [8.0, 1.0, 1.5, 3.0, 2.0]),
    ],
)
def test_losses_of_other_samples_or_masks_during_the_run_do_not_count(
    changed: Any, losses: list[float], make_run: MakeRun
) -> None:
    run = make_run("run", {0: 8.0, 10: 1.0, 20: 1.5, 30: 3.0, 40: 2.0}, {40: 10.0})
    record_starts(run, {"step": 0, "changed": {}}, {"step": 20, "changed": changed}, {"step": 30, "changed": {}})
    assert read_curve(run).losses == losses


def test_a_change_after_the_step_that_was_gone_back_to_does_not_count(make_run: MakeRun) -> None:
    run = make_run("run", {0: 8.0, 10: 1.0, 15: 1.5, 20: 3.0}, {20: 10.0})
    other = {"eval.max_samples": [64, 8]}
    record_starts(run, {"step": 0, "changed": {}}, {"step": 20, "changed": other}, {"step": 12, "changed": {}})
    assert read_curve(run).losses == [1.5, 3.0]  # those before are left out, though they are of 64 samples, too


def test_a_line_that_is_being_written_is_no_damage(make_run: MakeRun) -> None:
    run = make_run("run", {0: 8.0, 10: 4.0}, {10: 10.0})
    with (run / "metrics.csv").open("a") as file:
        file.write("20,200,1.")
    assert read_curve(run).tokens == [0, 100]


def test_the_report_says_what_was_branched_from_what(make_run: MakeRun) -> None:
    trunk = make_run("trunk", {0: 9.0, 10: 5.0}, {10: 10.0})
    origin = trunk / "checkpoints" / "step-00000010"
    branch = make_run("branch", {20: 3.0}, {20: 10.0}, origin=origin)
    assert report.read_run(branch)["summary"]["branched from"] == str(origin)
    assert report.read_run(branch)["events"][0]["details"] == f"resumed_from {origin}"
    assert "branched from" not in report.read_run(trunk)["summary"]
    own = make_run("own", {20: 3.0}, {20: 10.0}, origin=trunk.parent / "own" / "checkpoints" / "step-00000010")
    assert "branched from" not in report.read_run(own)["summary"]  # its first events are gone


@pytest.mark.parametrize("origin", [None, "trunk"])
def test_a_run_whose_folder_was_renamed_is_no_branch_of_the_old_one(make_run: MakeRun, origin: str | None) -> None:
    """Not even if another run has the old name now."""
    make_run("trunk", {0: 9.0, 10: 5.0}, {10: 10.0})
    old = make_run("old", {0: 1.0, 10: 1.0, 20: 1.0}, {10: 10.0})
    renamed = make_run("renamed", {20: 3.0, 30: 2.0} if origin else {0: 8.0, 20: 3.0, 30: 2.0}, {10: 10.0})
    first = str(old.parent / origin / "checkpoints" / "step-00000010") if origin else None
    starts = [(first, 10 if origin else 0), *((str(old / "checkpoints" / f"step-{n:08d}"), n) for n in (20, 30))]
    with (renamed / "events.jsonl").open("w") as file:
        for step_dir, step in starts:
            events = [{"event": "start", "resumed_from": step_dir, "step": step}, {"event": "checkpoint"}]
            events[1]["step"] = step + 10 if step else 20
            file.write("".join(json.dumps({"time": 1} | event) + "\n" for event in events))
    assert branched_from(renamed) == (Path(first) if first else None)
    assert read_curve(renamed).losses == ([9.0, 5.0, 3.0, 2.0] if origin else [8.0, 3.0, 2.0])


def test_a_branch_into_the_folder_of_a_run_that_was_never_saved_is_one(make_run: MakeRun) -> None:
    trunk = make_run("trunk", {0: 9.0, 10: 5.0}, {10: 10.0})
    origin = trunk / "checkpoints" / "step-00000010"
    branch = make_run("branch", {20: 3.0}, {20: 10.0}, origin=origin)
    begun = json.dumps({"time": 0, "event": "start", "resumed_from": None, "step": 0})
    (branch / "events.jsonl").write_text(begun + "\n" + (branch / "events.jsonl").read_text())
    assert branched_from(branch) == origin


def test_an_earlier_version_recorded_the_origin_in_the_settings_only(make_run: MakeRun) -> None:
    trunk = make_run("trunk", {0: 9.0, 10: 5.0}, {10: 10.0})
    origin = trunk / "checkpoints" / "step-00000010"
    for resume, found in ((str(origin), origin), ("auto", None), (3, None)):
        branch = make_run(f"branch_{resume}".replace("/", ""), {20: 3.0}, {20: 10.0}, train__resume=resume)
        (branch / "events.jsonl").write_text('{"time": 1, "event": "start", "step": 10}\n')
        assert branched_from(branch) == found
        assert read_curve(branch).tokens == ([0, 100, 200] if found else [200])


@pytest.mark.parametrize(
    "event",
    [
        b'{"event": "start"}',
        b'{"event": "start", "resumed_from": 3, "step": 1}',
        b"[[",
        b'{"event": "start", "resumed_from": "\\u0000", "step": 1}',
    ],
)
def test_an_origin_that_is_none_is_passed_over(make_run: MakeRun, event: bytes) -> None:
    run = make_run("run", {0: 9.0, 10: 5.0}, {10: 10.0})
    (run / "events.jsonl").write_bytes(event + b"\n")
    assert read_curve(run).tokens == [0, 100]
