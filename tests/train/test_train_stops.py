"""Runs that end early: by signals, time, numbers that are not finite and steps that are skipped."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import column, metrics, tensors

from tinyllama.checkpoint import reader
from tinyllama.checkpoint.names import step_dir

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(config: dict[str, Any]) -> dict[str, Any]:
    """The run of 40 steps in 12, which is validated and saved at step 8."""
    config["train"]["max_steps"] = 12
    config["eval"]["interval"] = config["checkpoint"]["interval"] = 8
    return config


@pytest.fixture(scope="module")
def _straight() -> dict[int, Path]:
    """Runs of ``straight`` of these tests alone."""
    return {}


@pytest.mark.parametrize(
    ("phase", "step", "asynchronous"),
    [
        ("7", 7, True),
        ("validation", 8, False),
        ("checkpoint", 9, True),
        pytest.param("1", 1, False, marks=pytest.mark.slow),
        pytest.param("checkpoint", 9, False, marks=pytest.mark.slow),
        ("ctrl-c", 7, True),
        pytest.param("both", 7, True, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_stops_all_and_loses_nothing(
    world, straight, config_file: Path, tmp_path: Path, phase: str, step: int, asynchronous: bool
) -> None:
    stopped = tmp_path / "stopped"
    flags = ["--checkpoint.asynchronous", asynchronous]
    answers = world(2)("train_signalled", phase, 1, "--config", config_file, "--out_dir", stopped, *flags)
    assert [answer["result"] for answer in answers] == [75, 75]
    assert metrics(stopped)[-1]["step"] == str(step)
    by = "SIGINT" if phase == "ctrl-c" else "SIGUSR1"
    assert f"stopped by {by} at step {step}; the same command resumes from there" in answers[0]["said"]
    assert (step_dir(stopped / "checkpoints", step) / ".metadata").exists()
    world(2).train("--config", config_file, "--out_dir", stopped)
    for name in ("step", "loss", "val_loss", "grad_norm"):
        assert column(stopped, name) == column(straight(2), name), name


def test_a_second_ctrl_c_stops_at_once(world, config_file: Path, tmp_path: Path) -> None:
    (answer,) = world(1)("train_signalled", "ctrl-c twice", 0, "--config", config_file, "--out_dir", tmp_path / "run")
    assert answer["result"] == "interrupted"
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_stopped_run_says_what_it_did_and_how_to_go_on(world, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--config", config_file, "--out_dir", out, "--eval.interval", 3]
    answers = world(2)("train_signalled", "7", 1, *flags)
    rows = [row for row in metrics(out) if row["val_loss"]]
    best = min(rows, key=lambda row: float(row["val_loss"]))
    summary = answers[0]["said"].splitlines()[-9:]
    last, lowest = (f"{float(row['val_loss']):.4f}" for row in (rows[-1], best))
    assert summary[0] == f"val_loss {last} at step 6, best {lowest} at step {best['step']}"
    assert summary[1] == f"loss     {float(metrics(out)[-1]['loss']):.4f} at step 7"
    assert re.fullmatch(rf"tokens   {int(metrics(out)[-1]['tokens']):,} in all; [\d,]+ tokens/s on average", summary[2])
    assert summary[3].startswith("time     since this start: training ")
    assert summary[4] == f"saved    {out}/checkpoints/step-00000007"
    assert re.fullmatch(r"next     torchrun \.\.\. .*rank\.py'?    # resumes from there", summary[5])
    assert summary[7].split() == ["python", "scripts/report.py", str(out)]
    assert summary[8] == "stopped by SIGUSR1 at step 7; the same command resumes from there"
    event = json.loads((out / "events.jsonl").read_text().splitlines()[-1])
    assert (event["event"], event["by"], event["step"]) == ("stop", "SIGUSR1", 7)
    assert answers[1]["said"] == ""


def test_no_rank_ends_before_the_last_word(world, config_file: Path, tmp_path: Path) -> None:
    answers = world(2)("train_ending_late", "--config", config_file, "--out_dir", tmp_path / "run")
    assert [answer["result"] for answer in answers] == [True, True]


def test_a_signal_in_the_last_step_stops_nothing(world, config_file: Path, tmp_path: Path) -> None:
    answers = world(2)("train_signalled", "12", 1, "--config", config_file, "--out_dir", tmp_path / "run")
    assert [answer["result"] for answer in answers] == [0, 0]
    assert answers[0]["said"].splitlines()[-1].startswith("done: 12 steps, 3,072 tokens")


def test_steps_that_are_judged_late_are_named_and_saved_right(world, config_file: Path, tmp_path: Path) -> None:
    flags = ["--config", config_file, "--train.on_nonfinite", "skip", "--train.skip_spikes", 1e6]
    flags += ["--checkpoint.interval", 5, "--checkpoint.keep_last", "null", "--eval.interval", 100]
    each, fourth = tmp_path / "each", tmp_path / "fourth"
    for out, interval in ((each, 1), (fourth, 4)):
        answers = world(1)(
            *("train_poisoned", 0, "6,9,10", *flags, "--out_dir", out, "--train.max_steps", 13),
            *("--log.interval", interval),
        )
        assert [answer["result"] for answer in answers] == [0]
        world(1).train(*flags, "--out_dir", out, "--train.max_steps", 15, "--log.interval", interval)
        lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        skips = [(line["step"], line["samples"], line["ranks"]) for line in lines if line["event"] == "skip"]
        assert skips == [(6, [40, 47], [0]), (9, [64, 71], [0]), (10, [72, 79], [0])]
        for step in (6, 9, 10):
            assert f"skipped step {step}, samples {8 * step - 8} to {8 * step - 1}: loss " in answers[0]["said"]
        rows = {int(row["step"]): row for row in metrics(each) if row["loss"]}
        # what is due at step 10, amid skipped ones, is saved after them
        for step, skipped, in_a_row in ((5, 0, 0), (11, 3, 0), (13, 3, 0), (15, 3, 0)):
            state = reader.read_state(step_dir(out / "checkpoints", step))
            assert (state["skipped"], state["skipped_in_a_row"], state["samples"]) == (skipped, in_a_row, 8 * step)
            usual = [rows[number] for number in range(1, step + 1) if number not in (6, 9, 10)]
            assert state["recent"] == [[float(row["loss"]), float(row["grad_norm"])] for row in usual], step
    assert [row["step"] for row in metrics(fourth) if row["loss"]] == ["4", "8", "12", "13", "15"]
    for row in metrics(fourth):
        for name in ("tokens", "loss", "lr", "grad_norm", "skipped") if row["loss"] else ():
            assert row[name] == rows[int(row["step"])][name], (row["step"], name)


def test_a_step_that_must_stop_the_run_is_not_saved(world, config_file: Path, tmp_path: Path) -> None:
    flags = ["--config", config_file, "--out_dir", tmp_path / "run", "--log.interval", 5, "--checkpoint.interval", 4]
    (answer,) = world(1)("train_poisoned", 0, 8, *flags)
    assert answer["result"] == 1
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000004"]
    stop = json.loads((tmp_path / "run" / "STOPPED").read_text())
    assert (stop["step"], stop["samples"]) == (8, 64)
    assert stop["reason"] == "not finite on rank 0: step 8, samples 56 to 63"


def test_the_checkpoint_that_a_failed_run_waits_for_may_take_as_long_as_one(
    world, config_file: Path, tmp_path: Path
) -> None:
    flags = ["--config", config_file, "--out_dir", tmp_path / "run", "--checkpoint.interval", 4]
    (answer,) = world(1)("last_beats_of_poisoned", 0, 6, *flags)
    assert answer["result"] == [[5, "step"], [6, "checkpoint"]]


def test_a_run_goes_on_from_what_another_has_saved_while_it_waited(world, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--config", config_file, "--out_dir", out, "--checkpoint.interval", 4]
    world(1).train(*flags, "--train.max_steps", 6)
    (answer,) = world(1)("train_set_up_before_another", *flags, "--train.max_steps", 12)
    assert answer["result"] == [0, 0]
    assert f"resumed from {out}/checkpoints/step-00000012 at step 12" in answer["said"]
    assert "set aside" not in answer["said"]
    assert [int(row["step"]) for row in metrics(out)] == [*range(13)]


def test_max_time_stops_as_a_signal_does(world, config_file: Path, tmp_path: Path) -> None:
    flags = ["--config", config_file, "--out_dir", tmp_path / "run"]
    world(2).train(*flags, "--train.max_steps", 6)
    answers = world(2)("train", *flags, "--train.max_time", 1e-6)
    assert [answer["result"] for answer in answers] == [75, 75]
    assert f"saved    {tmp_path}/run/checkpoints/step-00000006" in answers[0]["said"]
    assert "stopped by train.max_time at step 6; the same command resumes from there" in answers[0]["said"]


def test_a_stop_before_the_first_step_has_no_checkpoint_and_does_not_say_so(
    world, config_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    answers = world(2)("train", "--config", config_file, "--out_dir", out, "--train.max_time", 1e-6)
    assert [answer["result"] for answer in answers] == [1, 1]  # a job that is requeued at 75 would never end
    assert "saved    nothing, as no step was done" in answers[0]["said"]
    assert "stopped by train.max_time at step 0; there was nothing to save: raise it" in answers[0]["said"]
    assert not list(out.glob("checkpoints/*"))


def test_nan_in_one_ranks_gradient_stops_all(world, straight, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    answers = world(2)("train_poisoned", 1, 10, "--config", config_file, "--out_dir", out)
    assert [answer["result"] for answer in answers] == [1, 1]
    assert "skipped step 10, samples 72 to 79" in answers[0]["said"]
    assert "not finite on rank 1" in answers[0]["said"]
    stop = json.loads((out / "STOPPED").read_text())
    assert (stop["step"], stop["samples"]) == (10, 80)
    # nothing after the last good checkpoint was written, and nobody goes on by accident
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000008"]
    (problem,) = world(2)("train", "--config", config_file, "--out_dir", out)[0]["problems"]
    assert problem.startswith(f"{out / 'STOPPED'} says why this run ended: ")
    assert "step 10" in problem
    (out / "STOPPED").unlink()
    world(2).train("--config", config_file, "--out_dir", out)
    assert column(out, "loss") == column(straight(2), "loss")


def test_a_skipped_step_leaves_the_weights_as_they_were(world, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--config", config_file, "--out_dir", out, "--train.on_nonfinite", "skip"]
    flags += ["--checkpoint.interval", 1, "--checkpoint.keep_last", 3]
    # of skipped steps only a run's last one is saved
    answers = world(2)("train_poisoned", 0, 8, *flags, "--train.max_steps", 8)
    assert [answer["result"] for answer in answers] == [0, 0]
    world(2).train(*flags, "--train.max_steps", 9)
    before, after, next_one = (tensors(step_dir(out / "checkpoints", step)) for step in (7, 8, 9))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert next_one["optimizer.step.lm_head.weight"] == 8
    assert not torch.equal(after["model.lm_head.weight"], next_one["model.lm_head.weight"])
    assert [row["skipped"] for row in metrics(out)[-3:]] == ["0", "1", "1"]
    assert reader.read_state(out / "checkpoints" / "step-00000009")["skipped"] == 1


def test_too_many_skips_in_a_row_stop_the_run(world, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--train.on_nonfinite", "skip", "--train.max_skips", 2]
    answers = world(2)("train_poisoned", 0, -7, "--config", config_file, "--out_dir", out, *flags)
    assert [answer["result"] for answer in answers] == [1, 1]
    assert answers[0]["said"].count("skipped step") == 3
    assert (out / "STOPPED").exists()
