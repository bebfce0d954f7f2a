"""The recipe, for real: tiny models on CPU ranks, one process group for each world size."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from checkpoints import load_weights
from packed import change
from runs import beating, branch, column, metrics, tensors

from tinyllama.checkpoint import reader
from tinyllama.checkpoint.names import step_dir

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("size", [1, 2])
def test_a_resumed_run_is_the_straight_run(world, config_file: Path, tmp_path: Path, size: int) -> None:
    straight = tmp_path / "straight"
    world(size).train("--config", config_file, "--out_dir", straight)
    resumed = branch(straight, 20)
    said = world(size).train("--config", config_file, "--out_dir", resumed)
    assert f"resumed from {resumed}/checkpoints/step-00000020 at step 20" in said
    for name in ("step", "tokens", "loss", "val_loss", "lr", "grad_norm"):
        assert column(resumed, name) == column(straight, name), name
    assert column(straight, "step") == list(range(41))
    assert column(straight, "loss")[-1] < 0.7 * column(straight, "loss")[0]
    before, after = (tensors(run / "checkpoints" / "step-00000040") for run in (straight, resumed))
    assert before.keys() == after.keys()
    assert len(before) == 4 * sum(name.startswith("model.") for name in before)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert before["optimizer.step.lm_head.weight"] == 40
    state = reader.read_state(resumed / "checkpoints" / "step-00000040")
    assert (state["step"], state["samples"], state["tokens"], state["world_size"]) == (40, 320, 10240, size)


LAYOUTS = {
    "sharded over 2": (2, []),
    "replicated over 2": (2, ["--parallel.shard", "none", "--train.micro_batch_size", 4]),
    "sharded over 4": (4, []),
    "2 shards, 2 copies": (4, ["--parallel.shard", 2]),
    "replicated over 4": (4, ["--parallel.shard", "none"]),
    "selective checkpointing": (2, ["--train.activation_checkpointing", "selective"]),
    "full checkpointing": (4, ["--train.activation_checkpointing", "full", "--train.micro_batch_size", 1]),
    "gathered once": (2, ["--parallel.reshard_after_forward", "false"]),
    "reduced often": (2, ["--parallel.sync_every_micro_batch", "true", "--train.micro_batch_size", 1]),
}


QUICK = ["sharded over 2", "replicated over 2"]


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param([name for name in LAYOUTS if name not in QUICK], marks=pytest.mark.slow)]
)
def test_the_layout_does_not_change_the_run(world, config_file: Path, tmp_path: Path, names: list[str]) -> None:
    steps = ["--train.max_steps", 50]
    alone = tmp_path / "alone"
    world(1).train("--config", config_file, "--out_dir", alone, *steps)
    for name in names:
        size, flags = LAYOUTS[name]
        out = tmp_path / name
        world(size).train("--config", config_file, "--out_dir", out, *steps, *flags)
        for loss in ("loss", "val_loss"):
            assert column(out, loss) == pytest.approx(column(alone, loss), abs=2e-6, rel=0), (name, loss)


@pytest.mark.slow
def test_a_run_goes_on_in_any_world(world, config_file: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    world(1).train("--config", config_file, "--out_dir", alone)
    for before, after in ((4, 2), (2, 4), (4, 1), (1, 4)):
        out = tmp_path / f"{before} then {after}"
        flags = ["--train.micro_batch_size", 8 // max(before, after)]
        world(before).train("--config", config_file, "--out_dir", out, *flags)
        resumed = branch(out, 20)
        world(after).train("--config", config_file, "--out_dir", resumed, "--train.micro_batch_size", 1)
        assert column(resumed, "loss") == pytest.approx(column(alone, "loss"), abs=2e-6, rel=0), (before, after)
        state = reader.read_state(resumed / "checkpoints" / "step-00000040")
        assert (state["samples"], state["world_size"]) == (320, after)


def test_start_weights_are_the_same_for_every_world(world, config_file: Path) -> None:
    start = world(1)("start_hash", "--config", config_file)[0]["result"]
    assert world(2)("start_hash", "--config", config_file)[1]["result"] == start
    assert world(2)("start_hash", "--config", config_file, "--parallel.shard", 1)[0]["result"] == start
    assert world(1)("start_hash", "--config", config_file, "--train.seed", 1)[0]["result"] != start


def test_bf16_computes_in_bf16_and_keeps_the_rest_in_fp32(world, config_file: Path) -> None:
    for rank in world(2)("dtypes", "--config", config_file, "--train.precision", "bf16"):
        assert rank["result"] == {
            "stream": ["torch.bfloat16"],
            "tables": ["torch.float32"],
            "computed": ["torch.bfloat16"],
            "gradients": ["torch.float32"],
            "master": ["torch.float32"],
            "moments": ["torch.float32"],
        }


@pytest.mark.parametrize(
    ("phase", "step", "asynchronous"),
    [
        ("7", 7, True),
        ("validation", 20, False),
        ("checkpoint", 21, True),
        pytest.param("1", 1, False, marks=pytest.mark.slow),
        pytest.param("checkpoint", 21, False, marks=pytest.mark.slow),
        ("ctrl-c", 7, True),
        pytest.param("both", 7, True, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_stops_all_and_loses_nothing(
    world, config_file: Path, tmp_path: Path, phase: str, step: int, asynchronous: bool
) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    world(2).train("--config", config_file, "--out_dir", straight)
    flags = ["--checkpoint.asynchronous", asynchronous]
    answers = world(2)("train_signalled", phase, 1, "--config", config_file, "--out_dir", stopped, *flags)
    assert [answer["result"] for answer in answers] == [75, 75]
    assert metrics(stopped)[-1]["step"] == str(step)
    by = "SIGINT" if phase == "ctrl-c" else "SIGUSR1"
    assert f"stopped by {by} at step {step}; the same command resumes from there" in answers[0]["said"]
    assert (step_dir(stopped / "checkpoints", step) / ".metadata").exists()
    world(2).train("--config", config_file, "--out_dir", stopped)
    for name in ("step", "loss", "val_loss", "grad_norm"):
        assert column(stopped, name) == column(straight, name), name


def test_a_second_ctrl_c_stops_at_once(world, config_file: Path, tmp_path: Path) -> None:
    (answer,) = world(1)("train_signalled", "ctrl-c twice", 0, "--config", config_file, "--out_dir", tmp_path / "run")
    assert answer["result"] == "interrupted"
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_settings_that_a_resumed_run_changes_are_told(world, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--config", config_file, "--out_dir", out]
    world(1)("train_signalled", "7", 0, *flags)
    answers = world(1)("train", *flags, "--optim.weight_decay", 0.3, "--log.interval", 5)
    said = answers[0]["said"].splitlines()
    assert f"start    resumed from {out}/checkpoints/step-00000007" in said
    assert f"start    resumed from {out}/checkpoints/step-00000007 at step 7" in said
    changes = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines() if '"start"' in line]
    assert [event["changed"] for event in changes] == [
        {},
        {"optim.weight_decay": [0.1, 0.3], "log.interval": [1, 5]},
    ]
    assert "changed  optim.weight_decay 0.1 -> 0.3, log.interval 1 -> 5" in said


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


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_disk_that_fills_up(world, config_file: Path, tmp_path: Path, small_disk: Path, on_failure: str) -> None:
    straight, out = tmp_path / "straight", small_disk / "run"
    world(2).train("--config", config_file, "--out_dir", straight)
    flags = ["--checkpoint.interval", 10, "--checkpoint.asynchronous", "true", "--checkpoint.on_failure", on_failure]
    answers = world(2)("train_on_a_full_disk", "--config", config_file, "--out_dir", out, *flags)
    (said, *others) = [line for line in answers[0]["said"].splitlines() if line.startswith("error: ")]
    assert said.startswith(f"error: {out}/checkpoints/step-00000020 is not saved: ")
    assert said.endswith(("No space left on device", "(is the disk full?)"))
    steps = sorted(path.name for path in (out / "checkpoints").iterdir())
    if on_failure == "continue":
        assert [answer["result"] for answer in answers] == [0, 0]
        assert others == []
        assert steps == ["step-00000010", "step-00000030", "step-00000040"]
        after, expected = (tensors(run / "checkpoints" / "step-00000040") for run in (out, straight))
        assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())
        assert column(out, "loss")[-1] == column(straight, "loss")[-1]
        (event,) = [line for line in (out / "events.jsonl").read_text().splitlines() if "checkpoint_failed" in line]
        assert json.loads(event)["error"] == said.removeprefix("error: ")
    else:  # with a last attempt, in vain
        assert [answer["result"] for answer in answers] == [1, 1]
        assert "GB are free" in others[0]
        assert steps == ["step-00000010"]
        (small_disk / "ballast").unlink()
    assert reader.problem(out / "checkpoints" / "step-00000010") is None
    world(2).train("--config", config_file, "--out_dir", out)
    assert column(out, "loss")[-1] == column(straight, "loss")[-1]


SHORT = ["--train.max_steps", 12, "--checkpoint.interval", 4, "--eval.interval", 100]


@pytest.mark.parametrize(
    ("failing", "on_failure", "code", "steps", "last"),
    [
        (2, "continue", 0, [4, 12], "done: 12 steps"),
        (2, "stop", 1, [4, 9], "stopped by checkpoint.on_failure at step 9"),  # the save that stops it succeeds
        (3, "continue", 1, [4, 8], "error: "),  # the last step is lost, which is no success
    ],
)
def test_a_save_that_fails_is_in_the_exit_code(
    world, config_file: Path, tmp_path: Path, failing: int, on_failure: str, code: int, steps: list[int], last: str
) -> None:
    out = tmp_path / "run"
    flags = ["--config", config_file, "--out_dir", out, *SHORT, "--checkpoint.on_failure", on_failure]
    (answer,) = world(1)("train_without_room", failing, *flags)
    assert answer["result"] == code
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == [f"step-{step:08d}" for step in steps]
    assert answer["said"].splitlines()[-1].startswith(last)
    assert answer["said"].count(f"error: {out}/checkpoints/step-{4 * failing:08d} is not saved: it takes ") == 1


def test_a_save_that_fails_in_the_background_is_told_before_the_next_one(
    world, config_file: Path, tmp_path: Path
) -> None:
    flags = ["--checkpoint.asynchronous", "true", "--checkpoint.on_failure", "stop"]
    command = ["train_told_late", "--config", config_file, "--out_dir", tmp_path / "run", *SHORT, *flags]
    answers = world(2)(*command)
    assert [answer["result"] for answer in answers] == [1, 1]
    assert "stopped by checkpoint.on_failure at step 7;" in answers[0]["said"]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000007"]


def test_a_run_that_must_stop_lets_its_save_come_to_its_end(world, config_file: Path, tmp_path: Path) -> None:
    flags = ["--out_dir", tmp_path / "run", *SHORT, "--checkpoint.interval", 5, "--checkpoint.asynchronous", "true"]
    for answer in world(2)("train_stopped_in_a_save", "--config", config_file, *flags):
        assert answer["result"] == [1, ["step-00000005"]]


def test_no_rank_ends_before_the_last_word(world, config_file: Path, tmp_path: Path) -> None:
    answers = world(2)("train_ending_late", "--config", config_file, "--out_dir", tmp_path / "run", *SHORT)
    assert [answer["result"] for answer in answers] == [True, True]


def test_ranks_that_see_different_checkpoints_resume_from_the_first_ranks(
    world, config_file: Path, tmp_path: Path
) -> None:
    flags = ["--config", config_file, "--out_dir", tmp_path / "run", *SHORT]
    world(2).train(*flags)
    answers = world(2)("resumed_from", *flags, "--dry_run")
    assert [answer["result"] for answer in answers] == ["step-00000012"] * 2


def test_a_signal_in_the_last_step_stops_nothing(world, config_file: Path, tmp_path: Path) -> None:
    answers = world(2)("train_signalled", "12", 1, "--config", config_file, "--out_dir", tmp_path / "run", *SHORT)
    assert [answer["result"] for answer in answers] == [0, 0]
    assert answers[0]["said"].splitlines()[-1].startswith("done: 12 steps, 3,072 tokens")


def test_checkpoints_are_kept_as_asked_for(world, config_file: Path, tmp_path: Path) -> None:
    keep = ["--checkpoint.interval", 2, "--checkpoint.keep_last", 1, "--checkpoint.keep_every", 6]
    world(1).train("--config", config_file, "--out_dir", tmp_path / "run", *SHORT, *keep)
    there = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert there == ["step-00000006", "step-00000012"]


def test_a_run_is_watched_in_each_phase_and_after_a_resume(world, config_file: Path, tmp_path: Path) -> None:
    flags = ["--config", config_file, "--out_dir", tmp_path / "run", "--eval.interval", 2, "--checkpoint.interval", 3]
    flags += ["--train.start_timeout", 700]
    first = [[0, "validation"], [0, "step"], [1, "step"], [2, "validation"], [2, "step"], [3, "checkpoint"]]
    first += [[3, "step"], [4, "validation"], [4, "step"], [5, "step"], [6, "validation"], [6, "checkpoint"]]
    second = [[6, "step"], [7, "step"], [8, "validation"], [8, "checkpoint"]]  # step 6 has been validated
    for steps, timeout, beats in ((6, 200, first), (8, 210, second)):
        answers = world(2)("watched", *flags, "--train.max_steps", steps, "--train.timeout", timeout)
        for rank, seen in enumerate(answer["result"] for answer in answers):
            assert seen["beats"] == beats
            assert (seen["rank"], seen["world_size"], seen["code"]) == (rank, 2, 0)
            assert (seen["first_timeout"], seen["timeout"]) == (700, timeout)
            # steady from its second step on; a save may take as long as torch lets it
            assert seen["timeouts"] == [timeout + 60, 1800]
            assert seen["collects"] is False
            assert (seen["owner"]["job_id"], seen["owner"]["pid"]) == ("77", world(2).processes[0].pid)


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
    flags = ["--config", config_file, "--out_dir", tmp_path / "run", *SHORT, "--log.interval", 5]
    (answer,) = world(1)("train_poisoned", 0, 8, *flags)
    assert answer["result"] == 1
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000004"]
    stop = json.loads((tmp_path / "run" / "STOPPED").read_text())
    assert (stop["step"], stop["samples"]) == (8, 64)
    assert stop["reason"] == "not finite on rank [0]: step 8, samples 56 to 63"


def test_every_rank_refuses_a_folder_that_another_run_holds(world, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "OWNER.json").write_text(json.dumps({"host": "node7", "pid": 1, "job_id": "5", "restarts": 0}))
    with beating(out / "OWNER.json"):
        answers = world(2)("train", "--config", config_file, "--out_dir", out)
    for answer in answers:
        (problem,) = answer["problems"]
        assert problem.startswith(f"{out} belongs to another run (pid 1 on node7, job 5): stop that or give ")
    assert [path.name for path in out.iterdir()] == ["OWNER.json"]


def test_max_time_stops_as_a_signal_does(world, config_file: Path, tmp_path: Path) -> None:
    flags = ["--config", config_file, "--out_dir", tmp_path / "run"]
    world(2).train(*flags, "--train.max_steps", 20)
    answers = world(2)("train", *flags, "--train.max_time", 1e-6)
    assert [answer["result"] for answer in answers] == [75, 75]
    assert f"saved    {tmp_path}/run/checkpoints/step-00000020" in answers[0]["said"]
    assert "stopped by train.max_time at step 20; the same command resumes from there" in answers[0]["said"]


def test_a_stop_before_the_first_step_has_no_checkpoint_and_does_not_say_so(
    world, config_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    answers = world(2)("train", "--config", config_file, "--out_dir", out, "--train.max_time", 1e-6)
    assert [answer["result"] for answer in answers] == [1, 1]  # a job that is requeued at 75 would never end
    assert "saved    nothing, as no step was done" in answers[0]["said"]
    assert "stopped by train.max_time at step 0; there was nothing to save: raise it" in answers[0]["said"]
    assert not list(out.glob("checkpoints/*"))


def test_nan_in_one_ranks_gradient_stops_all(world, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    answers = world(2)("train_poisoned", 1, 25, "--config", config_file, "--out_dir", out)
    assert [answer["result"] for answer in answers] == [1, 1]
    assert "skipped step 25, samples 192 to 199" in answers[0]["said"]
    assert "not finite on rank [1]" in answers[0]["said"]
    stop = json.loads((out / "STOPPED").read_text())
    assert (stop["step"], stop["samples"]) == (25, 200)
    # nothing after the last good checkpoint was written, and nobody goes on by accident
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000020"]
    (problem,) = world(2)("train", "--config", config_file, "--out_dir", out)[0]["problems"]
    assert problem.startswith(f"{out / 'STOPPED'} says why this run ended: ")
    assert "step 25" in problem
    (out / "STOPPED").unlink()
    straight = tmp_path / "straight"
    world(2).train("--config", config_file, "--out_dir", straight)
    world(2).train("--config", config_file, "--out_dir", out)
    assert column(out, "loss") == column(straight, "loss")


def test_a_skipped_step_leaves_the_weights_as_they_were(world, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--config", config_file, "--out_dir", out, "--train.on_nonfinite", "skip"]
    flags += ["--checkpoint.interval", 1, "--checkpoint.keep_last", 3]
    # of skipped steps only a run's last one is saved
    answers = world(2)("train_poisoned", 0, 25, *flags, "--train.max_steps", 25)
    assert [answer["result"] for answer in answers] == [0, 0]
    world(2).train(*flags, "--train.max_steps", 26)
    before, after, next_one = (tensors(step_dir(out / "checkpoints", step)) for step in (24, 25, 26))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert next_one["optimizer.step.lm_head.weight"] == 25
    assert not torch.equal(after["model.lm_head.weight"], next_one["model.lm_head.weight"])
    assert [row["skipped"] for row in metrics(out)[-3:]] == ["0", "1", "1"]
    assert reader.read_state(out / "checkpoints" / "step-00000026")["skipped"] == 1


def test_too_many_skips_in_a_row_stop_the_run(world, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--train.on_nonfinite", "skip", "--train.max_skips", 2]
    answers = world(2)("train_poisoned", 0, -25, "--config", config_file, "--out_dir", out, *flags)
    assert [answer["result"] for answer in answers] == [1, 1]
    assert answers[0]["said"].count("skipped step") == 3
    assert (out / "STOPPED").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(world, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = world(2).train("--config", config_file, "--out_dir", out, "--dry_run")
    assert "ranks 0 1" in said
    assert "weights  copies: 1, ranks that share each: 2" in said
    assert "dtypes   master float32, pass float32, reduction float32" in said
    assert "8 samples a step = 2 ranks x 2 x 2, 256 tokens" in said
    assert not out.exists()


def test_validation_is_the_mean_over_every_held_out_token(world, config_file: Path, tmp_path: Path) -> None:
    from tinyllama.config.model import named_config
    from tinyllama.data.packed import open_packed
    from tinyllama.model import GPT

    out = tmp_path / "run"
    config = yaml.safe_load(config_file.read_text())
    manifest = Path(config["data"]["validation"][0]["path"]) / "manifest.json"
    figures = json.loads(manifest.read_bytes())
    figures["subsets"] = {".": {"tokens": figures["tokens"], "bytes": 3 * figures["tokens"]}}
    change(manifest, subsets=figures["subsets"])
    said = world(2).train("--config", config_file, "--out_dir", out, "--train.micro_batch_size", 4)
    model = GPT(named_config(**config["model"]))
    model.load_state_dict(load_weights(out / "checkpoints" / "step-00000040"))
    held_out = open_packed(config["data"]["validation"][0]["path"])
    blocks = torch.from_numpy(held_out.blocks(np.arange(held_out.num_blocks(32)), 32).astype(np.int64))
    with torch.no_grad():
        expected = model(blocks[:, :-1], blocks[:, 1:]) / blocks[:, 1:].numel()
    assert column(out, "val_loss")[-1] == pytest.approx(expected.item(), abs=1e-6)
    assert [row["step"] for row in metrics(out) if row["val_loss"]] == ["0", "20", "40"]
    losses, bits = ([float(row[name]) for row in metrics(out) if row["val_loss"]] for name in ("val_loss", "val_bpb"))
    assert bits == pytest.approx([loss / np.log(2) / 3 for loss in losses])
    assert f"val_loss {losses[-1]:.4f}  val_bpb {bits[-1]:.4f}  " in said
    assert f"val_bpb  {bits[-1]:.4f} bits per byte at step 40" in said


@pytest.mark.parametrize("size", [1, 2])
def test_each_validation_source_has_its_own_loss(
    world, config: dict[str, Any], packed_folder: Callable[..., Path], tmp_path: Path, size: int
) -> None:
    from tinyllama.config.model import named_config
    from tinyllama.data.packed import open_packed
    from tinyllama.model import GPT

    rng = np.random.default_rng(1)
    noise = [[int(token) for token in rng.integers(3, 250, 40)] + [2] for _ in range(18)]
    mixed, unread = packed_folder([noise], name="noise, of 学习", vocab_size=256), tmp_path / "held_out"
    for folder, share in ((unread, 3), (mixed, 2)):
        figures = json.loads((folder / "manifest.json").read_bytes())
        subset = {"tokens": figures["tokens"], "bytes": share * figures["tokens"]}
        change(folder / "manifest.json", subsets={".": subset})
    config["data"]["validation"] = [{"path": str(unread)}, {"path": str(mixed)}]
    config["train"] |= {"max_steps": 2, "micro_batch_size": 4}
    config["optim"]["warmup_steps"] = 1
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "run"
    said = world(size).train("--config", tmp_path / "two.yaml", "--out_dir", out)

    model = GPT(named_config(**config["model"]))
    model.load_state_dict(load_weights(out / "checkpoints" / "step-00000002"))
    sums, counts = [], []
    for folder in (unread, mixed):
        dataset = open_packed(folder)
        blocks = torch.from_numpy(dataset.blocks(np.arange(dataset.num_blocks(32)), 32).astype(np.int64))
        with torch.no_grad():
            sums.append(model(blocks[:, :-1], blocks[:, 1:]).item())
        counts.append(blocks[:, 1:].numel())
    row = {name: float(value) for name, value in metrics(out)[-1].items() if name.startswith("val_")}
    first, second = (loss / count for loss, count in zip(sums, counts, strict=True))
    assert row["val_loss"] == pytest.approx(sum(sums) / sum(counts), abs=1e-6)
    assert row["val_loss/held_out"] == pytest.approx(first, abs=1e-6)
    assert row["val_loss/noise, of 学习"] == pytest.approx(second, abs=1e-6)
    assert row["val_bpb/held_out"] == pytest.approx(row["val_loss/held_out"] / np.log(2) / 3)
    assert row["val_bpb/noise, of 学习"] == pytest.approx(row["val_loss/noise, of 学习"] / np.log(2) / 2)
    assert f"  held_out {first:.4f} ({first / np.log(2) / 3:.4f} bpb)  noise, of 学习 {second:.4f} (" in said


def test_a_resumed_run_may_be_validated_on_other_sources(
    world, config: dict[str, Any], packed_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """What was measured stays, under the name that it had; what is new begins with the resumption."""
    config["train"]["max_steps"] = 4
    config["optim"]["warmup_steps"] = 1
    config["eval"]["interval"] = 1
    out, file = tmp_path / "run", tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    world(1).train("--config", file, "--out_dir", out, "--train.max_steps", 2)
    before = metrics(out)
    other = packed_folder([[[7, 8, 9] * 20 + [2]] * 4], name="other", vocab_size=256)
    config["data"]["validation"] = [{"path": str(other)}, {"path": str(tmp_path / "up")}]
    file.write_text(yaml.safe_dump(config))
    world(1).train("--config", file, "--out_dir", out)
    rows = metrics(out)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    for was, row in zip(before, rows, strict=False):
        assert {name: row[name] for name in was} == was
    assert [bool(row["val_loss/held_out"]) for row in rows] == [True] * 3 + [False] * 2
    assert [bool(row["val_loss/other"]) for row in rows] == [False] * 3 + [True] * 2


def test_what_a_run_leaves_behind(world, config: dict[str, Any], config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = world(1).train("--config", config_file, "--out_dir", out, "--train.max_steps", 23, "--log.interval", 10)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000020", "step-00000023"]
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert resolved["model"]["n_head"] == 4
    assert None not in resolved["model"].values()
    assert (out / "checkpoints" / "step-00000023" / "config.yaml").read_text() == (out / "config.yaml").read_text()
    assert [row["step"] for row in metrics(out)] == ["0", "10", "20", "23"]
    assert metrics(out)[-1]["lr"] == "0.001"
    assert sorted(path.name for path in out.iterdir()) == [
        *("checkpoints", "config.yaml", "events.jsonl", "heartbeat", "metrics.csv")
    ]
    state = reader.read_state(out / "checkpoints" / "step-00000023")
    assert (state["tokenizer_sha256"], state["bos_id"], state["eos_id"]) == ("0" * 64, 1, 2)
    assert (state["step"], state["samples"], state["tokens"], state["validated"]) == (23, 184, 5888, 23)
    assert [source["weight"] for source in state["data"]["sources"]] == [0.7, 0.3]
    assert (state["data"]["seed"], state["model"]) == (3407, resolved["model"])
    assert "start (step 0) 2.000e-03  warm (step 4) 1.000e-02  half (step 11)" in said
    assert "end (step 22) 1.000e-03" in said
    # the same command again has nothing to do, and does nothing
    again = world(1).train("--config", config_file, "--out_dir", out, "--train.max_steps", 23, "--log.interval", 10)
    assert "step-00000023 at step 23" in again
    assert [row["step"] for row in metrics(out)] == ["0", "10", "20", "23"]
    # and a run that ends before its checkpoint is a mistake
    (problem,) = world(1)("train", "--config", config_file, "--out_dir", out, "--train.max_steps", 22)[0]["problems"]
    assert problem == f"{out}/checkpoints/step-00000023 is beyond the run's 22 steps: raise train.max_steps"


def test_an_incomplete_checkpoint_is_passed_over(world, config_file: Path, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    world(1).train("--config", config_file, "--out_dir", straight)
    broken = tmp_path / "broken"
    shutil.copytree(straight, broken)
    (broken / "checkpoints" / "step-00000040" / ".metadata").unlink()
    shutil.copytree(straight / "checkpoints" / "step-00000040", broken / "checkpoints" / "step-00000050.tmp")
    said = world(1).train("--config", config_file, "--out_dir", broken)
    step = broken / "checkpoints" / "step-00000040"
    assert said.count(f"passed over: {step} is no complete checkpoint (.metadata is missing)") == 1
    assert "at step 20" in said
    assert column(broken, "loss") == column(straight, "loss")


BAD_RUNS = {
    "no such folder": (["--data.sources", '[{"path": "nowhere"}]'], ["nowhere is not a folder"]),
    "no batch": (["--train.global_batch_size", 4096], ["blocks of 33 tokens, less than one batch of train.global_b"]),
    "no block": (["--model.block_size", 100000], ["up holds", "down holds", "held_out holds"]),
    "batch": (["--train.global_batch_size", 7], ["7 is not a multiple of 1 ranks x train.micro_batch_size 2; nearest"]),
    "vocabulary": (["--model.vocab_size", 999], ["up was made", "down was made", "held_out was made"]),
    "shard": (["--parallel.shard", 3], ["parallel.shard 3 does not divide the 1 ranks; valid: 1"]),
    "min_lr": (["--optim.min_lr", 1], ["optim.min_lr 1.0 is greater than optim.lr 0.01"]),
    "resume": (["--train.resume", "nowhere"], ["nowhere holds no complete checkpoint"]),
}


@pytest.mark.parametrize("bad", BAD_RUNS)
def test_bad_input_is_refused_before_anything_is_written(world, config_file: Path, tmp_path: Path, bad: str) -> None:
    flags, expected = BAD_RUNS[bad]
    out = tmp_path / "run"
    answer = world(1)("train", "--config", config_file, "--out_dir", out, *flags)[0]
    assert "problems" in answer, answer
    assert len(answer["problems"]) == len(expected)
    for problem, part in zip(answer["problems"], expected, strict=True):
        assert part in problem
    assert not out.exists()


def test_resuming_another_run_says_what_differs(
    world, config: dict[str, Any], config_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    world(1).train("--config", config_file, "--out_dir", out, "--train.max_steps", 20)
    up, down = (source["path"] for source in config["data"]["sources"])
    changes = {
        "data.seed was 3407 and is 1": ["--data.seed", 1],
        "model.block_size was 32 and is 16": ["--model.block_size", 16],
        "data.sources[1].weight was 0.3 and is 0.5": [
            "--data.sources",
            json.dumps([{"path": up, "weight": 0.7}, {"path": down, "weight": 0.5}]),
        ],
        "data.sources[0].fingerprint was ": [
            "--data.sources",
            json.dumps([{"path": down, "weight": 0.7}, {"path": up, "weight": 0.3}]),
        ],
    }
    written = (out / "metrics.csv").read_bytes()
    for difference, flags in changes.items():
        (problem,) = world(1)("train", "--config", config_file, "--out_dir", out, *flags)[0]["problems"]
        assert problem.startswith(f"cannot resume from {out}/checkpoints/step-00000020: ")
        assert difference in problem
    (problem,) = world(1)("train", "--config", config_file, "--out_dir", out, "--train.resume", "never")[0]["problems"]
    assert "step-00000020 exists and train.resume is never: give another out_dir" in problem
    assert (out / "metrics.csv").read_bytes() == written
    # the folders may have moved: it is their tokens that count
    moved = shutil.copytree(up, tmp_path / "moved")
    flags = ["--data.sources", json.dumps([{"path": str(moved), "weight": 0.7}, {"path": down, "weight": 0.3}])]
    assert "at step 20" in world(1).train("--config", config_file, "--out_dir", out, *flags)


def test_branching_off_an_older_step_needs_its_own_folder(world, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    world(1).train("--config", config_file, "--out_dir", out)
    step = out / "checkpoints" / "step-00000020"
    (problem,) = world(1)("train", "--config", config_file, "--out_dir", out, "--train.resume", step)[0]["problems"]
    assert problem.endswith(f"is newer than train.resume {step}: give another out_dir to branch off there")
    other = tmp_path / "other"
    assert "at step 20" in world(1).train("--config", config_file, "--out_dir", other, "--train.resume", step)
    assert column(other, "loss") == column(out, "loss")[20:]


def test_a_token_outside_the_vocabulary_is_found(
    world, config: dict[str, Any], config_file: Path, tmp_path: Path
) -> None:
    shard = Path(config["data"]["sources"][0]["path"]) / "shard-00000.bin"
    tokens = np.fromfile(shard, np.uint16)
    tokens[100] = 9999
    tokens.tofile(shard)
    (problem,) = world(1)("train", "--config", config_file, "--out_dir", tmp_path / "run")[0]["problems"]
    assert "token 9999 at position 100 " in problem


@pytest.mark.slow
def test_plain_python_starts_its_own_ranks(config_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "pretrain/train.py", "--config", config_file, "--parallel.devices", "2"]
    flags = ["--out_dir", tmp_path / "run", "--train.max_steps", "6", "--train.precision", "bf16"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 samples a step = 2 ranks x 2 x 2, 256 tokens" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "step-00000006" / "__1_0.distcp").exists()
    wrong = subprocess.run([*command, "--train.max_step", "6"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr == "error: unknown flag --train.max_step; did you mean train.max_steps?\n"


@pytest.fixture
def hf_dir(config: dict[str, Any], tmp_path: Path) -> Path:
    """A Hugging Face folder of random weights of the run's sizes, not made by us."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5}
    torch.manual_seed(8)
    theirs = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2, tie_word_embeddings=False))
    theirs.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_a_run_starts_from_given_weights_and_with_transformers_loss(
    world, config: dict[str, Any], config_file: Path, hf_dir: Path, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    from tinyllama.data.packed import open_packed

    held_out = open_packed(config["data"]["validation"][0]["path"])
    blocks = torch.from_numpy(held_out.blocks(np.arange(held_out.num_blocks(32)), 32).astype(np.int64))
    theirs = LlamaForCausalLM.from_pretrained(hf_dir)
    with torch.no_grad():
        logits = theirs(blocks[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten()).item()
    start = ["--config", config_file, "--train.init_from", hf_dir]
    out = tmp_path / "started"
    said = world(2).train(*start, "--out_dir", out)
    assert f"start    a new run of the weights of {hf_dir} at step 0" in said
    assert column(out, "val_loss")[0] == pytest.approx(expected, abs=1e-5)
    assert column(out, "loss")[0] != pytest.approx(column(out, "loss")[-1], abs=0.1)
    assert metrics(out)[0]["step"] == "0"
    assert tensors(out / "checkpoints/step-00000020")["optimizer.step.lm_head.weight"] == 20  # the optimizer's is fresh

    # a requeued job gives the same command and goes on from its own checkpoint, without the weights even
    requeued = branch(out, 20)
    shutil.move(hf_dir, tmp_path / "away")
    said = world(2).train(*start, "--out_dir", requeued)
    assert f"resumed from {requeued / 'checkpoints/step-00000020'} at step 20" in said
    assert column(requeued, "loss") == column(out, "loss")
    shutil.move(tmp_path / "away", hf_dir)

    # but a folder with a checkpoint of any other run is not taken for it, nor continued by mistake
    (problem,) = world(2)("train", *start[:2], "--out_dir", out, "--train.init_from", tmp_path / "other")[0]["problems"]
    assert f"is of a run that started from {hf_dir}, and train.init_from is {tmp_path / 'other'}" in problem
    (problem,) = world(2)("train", *start, "--out_dir", out, "--train.resume", out)[0]["problems"]
    assert "train.init_from and a path in train.resume are both given" in problem

    # weights only: of a checkpoint of ours, and of an upstream file, as of the folder
    step_dir = out / "checkpoints/step-00000040"
    torch.save({"model": load_weights(step_dir), "step_count": 40}, tmp_path / "lit_model.pth")
    for number, source in enumerate((step_dir, tmp_path / "lit_model.pth")):
        again = tmp_path / f"again {number}"
        world(2).train(*start[:2], "--train.init_from", source, "--out_dir", again, "--train.max_steps", 6)
        assert column(again, "val_loss")[0] == column(out, "val_loss")[-1]
        assert [float(row["lr"]) for row in metrics(again) if row["lr"]][0] == pytest.approx(0.01 / 5)


def test_weights_that_do_not_fit_the_run_are_refused(world, config_file: Path, hf_dir: Path, tmp_path: Path) -> None:
    start = ["--config", config_file, "--train.init_from", hf_dir, "--out_dir", tmp_path / "run"]
    for flags, problem in [
        (["--model.n_layer", 3], "model.n_layer is 3 and in"),
        (["--model.norm_eps", 1e-6], "model.norm_eps is 1e-06 and in"),
        (["--model.padding_multiple", 300], "makes 300 rows and"),
        (["--train.init_from", tmp_path / "none"], "holds no complete checkpoint"),
    ]:
        assert problem in world(1)("train", *start, *flags)[0]["problems"][0]
    settings = json.loads((hf_dir / "config.json").read_text())
    (hf_dir / "config.json").write_text(json.dumps(settings | {"rope_theta": 5000.0, "rope_parameters": None}))
    assert not (tmp_path / "run").exists()
    world(1).train(*start, "--train.max_steps", 6, "--out_dir", tmp_path / "of its base")
    assert yaml.safe_load((tmp_path / "of its base/config.yaml").read_text())["model"]["rope_base"] == 5000
    world(1).train(*start, "--model.rope_base", 10000, "--model.rope_condense_ratio", 2, "--train.max_steps", 6)


@pytest.mark.slow
def test_a_run_resumed_inside_a_ramp_sees_what_an_uninterrupted_one_sees(
    world, config: dict[str, Any], tmp_path: Path
) -> None:
    config["data"]["sources"][0] |= {"weight": 1, "final_weight": 0.2}
    config["data"]["sources"][1] |= {"weight": 0, "final_weight": 0.8}
    config["data"]["ramp_tokens"] = 30 * 128 * 32
    config["train"] |= {"global_batch_size": 128, "micro_batch_size": 32}  # the run is of five windows
    path = tmp_path / "ramp.yaml"
    path.write_text(yaml.safe_dump(config))
    out = tmp_path / "straight"
    world(2).train("--config", path, "--out_dir", out)
    resumed, alone = branch(out, 20), tmp_path / "alone"
    shutil.copytree(resumed, alone)
    world(2).train("--config", path, "--out_dir", resumed)
    for name in ("step", "loss", "val_loss", "grad_norm", "tokens_up", "tokens_down"):
        assert column(resumed, name) == column(out, name), name
    before, after = (tensors(run / "checkpoints" / "step-00000040") for run in (out, resumed))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    down = np.array(column(out, "tokens_down")) / 32  # its share is 0.8 of sample / 3840, then 0.8
    assert down[[8, 16, 40]] == pytest.approx(
        [0.4 * 1024**2 / 3840, 0.4 * 2048**2 / 3840, 0.4 * 3840 + 0.8 * 1280], abs=1
    )
    world(1).train("--config", path, "--out_dir", alone)
    assert column(alone, "loss") == pytest.approx(column(out, "loss"), abs=2e-6)
    (problem,) = world(1)("train", "--config", path, "--out_dir", resumed, "--data.ramp_tokens", 9999)[0]["problems"]
    assert "data.ramp_tokens was 122880 and is 9999" in problem


@pytest.mark.slow
def test_tied_embeddings_train_resume_and_export_alike_in_every_world(
    world, config_file: Path, tmp_path: Path, script: Callable[..., tuple[int, str, str]]
) -> None:
    flags = ["--config", config_file, "--model.tie_embeddings", "true"]
    alone, out, compiled = (tmp_path / name for name in ("alone", "two", "compiled"))
    world(1).train(*flags, "--out_dir", alone)
    world(2).train(*flags, "--out_dir", out)
    for name in ("loss", "val_loss"):
        assert column(out, name) == pytest.approx(column(alone, name), abs=2e-6, rel=0)
    assert column(out, "loss")[-1] < 0.7 * column(out, "loss")[0]
    saved = tensors(out / "checkpoints" / "step-00000040")
    assert "model.transformer.wte.weight" in saved
    assert not [name for name in saved if "lm_head" in name]
    resumed = branch(out, 20)
    world(2).train(*flags, "--out_dir", resumed)
    assert column(resumed, "loss") == column(out, "loss")
    again = tensors(resumed / "checkpoints" / "step-00000040")
    assert all(torch.equal(tensor, again[name]) for name, tensor in saved.items())
    code, said, err = script("convert_lit_checkpoint", out, tmp_path / "hf", "--verify")
    assert (code, json.loads((tmp_path / "hf/config.json").read_text())["tie_word_embeddings"]) == (0, True), said + err
    code, said, err = script("convert_hf_checkpoint", tmp_path / "hf", tmp_path / "back", "--verify")
    assert code == 0, said + err
    back = load_weights(tmp_path / "back/step-00000000")
    assert back.keys() == {name.removeprefix("model.") for name in saved if name.startswith("model.")}
    assert all(torch.equal(tensor, saved[f"model.{name}"]) for name, tensor in back.items())
    world(2).train(*flags, "--out_dir", compiled, "--train.compile", "true", "--train.max_steps", 12)
    world(2).train(*flags, "--out_dir", tmp_path / "eager", "--train.max_steps", 12)
    assert column(compiled, "loss") == pytest.approx(column(tmp_path / "eager", "loss"), abs=1e-5, rel=0)
