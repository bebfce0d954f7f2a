"""What a new run sets aside of the files in its folder, and what a resume says of another validation."""

import dataclasses
import json
from pathlib import Path

import pytest

from tinyllama.checkpoint.names import step_dir
from tinyllama.config import cli
from tinyllama.monitor.metrics import RunLog
from tinyllama.monitor.run_files import read_metrics, read_samples, read_starts
from tinyllama.train.run import Run


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
            log.sample_texts(1, 8, [("a", f"b{start}")])
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
        assert (run.out_dir / "config.yaml").read_text() == cli.dump(run.resolved())
        log.start(step or 0)
        log.row({"step": (step or 0) + 1, "tokens": 8, "loss": 7.0})
        for saved in checkpoints:
            with log.time_spent("checkpoints", saved):
                pass
        log.row({"step": (step or 0) + 2, "tokens": 16, "loss": 6.0})
        log.sample_texts(2, 16, [("a", "b")])


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
    names = ["metrics.csv", "samples.jsonl", *(["config.yaml"] if case == "other settings" else [])]
    before = {name: (run.out_dir / name).read_bytes() for name in names}
    for _ in range(2):  # of the second there is nothing to keep
        start(run)
        copies = {copy.stem: copy.read_bytes() for copy in run.out_dir.glob("*.aside-*")}
        assert copies == before
    assert len([*run.out_dir.glob("*.aside-*")]) == len(names)


def test_a_branch_in_the_folder_of_another_run_sets_its_rows_aside(run: Run, tmp_path: Path) -> None:
    start(run)
    names = ["metrics.csv", "samples.jsonl", "config.yaml"]
    before = {name: (run.out_dir / name).read_bytes() for name in names}
    saved = step_dir(tmp_path / "other" / "checkpoints", 40)
    saved.mkdir(parents=True)
    (saved / "config.yaml").write_text(cli.dump(run.resolved()))
    train = dataclasses.replace(run.args.train, resume=str(saved), max_steps=60)
    branch = dataclasses.replace(run, args=dataclasses.replace(run.args, train=train), resume=saved)
    for _ in range(2):  # killed before its first checkpoint, it does its own steps again
        start(branch, step=40)
        assert {copy.stem: copy.read_bytes() for copy in run.out_dir.glob("*.aside-*")} == before
        assert [row["step"] for row in read_metrics(run.out_dir / "metrics.csv")] == [41, 42]
        assert {begun["step"] for begun in read_starts(run.out_dir)} == {40}
    own = step_dir(run.out_dir / "checkpoints", 41)
    own.mkdir(parents=True)
    (own / "config.yaml").write_text(cli.dump(run.resolved()))
    with RunLog(dataclasses.replace(branch, resume=own), 41, is_rank_zero=True):  # the branch resumes
        assert [row["step"] for row in read_metrics(run.out_dir / "metrics.csv")] == [41]
    assert len([*run.out_dir.glob("*.aside-*")]) == 3


def test_validation_data_that_were_replaced_are_told_once_and_their_losses_are_no_rivals(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "before   data.validation was other data: do not compare earlier held-out losses with those to come"
    starts = [("a", 2.0, "the best so far"), ("a", 3.0, "best 2.0000")]
    starts += [("b", 5.0, "the best so far"), ("b", 6.0, "best 5.0000"), ("b", 4.0, "the best so far")]
    for step, (fingerprint, loss, rank) in enumerate(starts):
        run = dataclasses.replace(run, validation=[dataclasses.replace(run.sources[0], fingerprint=fingerprint)])
        with RunLog(run, step or None, is_rank_zero=True) as log:
            log.start(step)
            assert (said in capsys.readouterr().out) is (step == 2)
            log.row({"step": step + 1, "tokens": 8 * (step + 1), "val_loss": loss})
            assert rank in capsys.readouterr().out
    events = [json.loads(line) for line in (run.out_dir / "events.jsonl").read_text().splitlines()]
    assert [event["data"]["validation"] for event in events] == [[one] for one, _, _ in starts]


def test_held_out_losses_by_another_number_of_samples_are_no_rivals(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    starts = [(64, 2.0, "the best so far"), (64, 3.0, "best 2.0000"), (8, 5.0, "the best so far")]
    starts += [(8, 6.0, "best 5.0000"), (64, 4.0, "the best so far")]
    for step, (samples, loss, rank) in enumerate(starts):
        args = dataclasses.replace(run.args, eval=dataclasses.replace(run.args.eval, max_samples=samples))
        run = dataclasses.replace(run, args=args)
        with RunLog(run, step or None, is_rank_zero=True) as log:
            log.start(step)
            log.row({"step": step + 1, "tokens": 8 * (step + 1), "val_loss": loss})
            assert rank in capsys.readouterr().out, step
        saved = step_dir(run.out_dir / "checkpoints", step + 1)
        saved.mkdir(parents=True)
        (saved / "config.yaml").write_text(cli.dump(run.resolved()))
        run = dataclasses.replace(run, resume=saved)


def test_a_config_written_by_hand_into_the_folder_of_the_run_is_set_aside(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.out_dir.mkdir()
    config = run.out_dir / "config.yaml"
    config.write_bytes(by_hand := b"# the rate of the sweep's best run\noptim: {lr: 4.0e-4}\n")
    start(run)
    (copy,) = run.out_dir.glob("*.aside-*")
    assert copy.read_bytes() == by_hand
    said = f"set aside: {copy} is what {config} was before this run, which starts anew"
    assert said in capsys.readouterr().out.splitlines()
    start(run)  # the file is the run's own now
    assert [*run.out_dir.glob("*.aside-*")] == [copy]
