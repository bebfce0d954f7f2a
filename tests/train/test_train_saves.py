"""Runs that save, that cannot, and what a start does with the checkpoints that it finds."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from runs import SHORT, beating, branch, column, tensors

from tinyllama.checkpoint import hashes, reader
from tinyllama.config import cli
from tinyllama.config.args import PretrainArgs
from tinyllama.monitor import report

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("size", [1, 2])
def test_a_resumed_run_is_the_straight_run(world, straight, config_file: Path, tmp_path: Path, size: int) -> None:
    straight = straight(size)
    resumed = branch(straight, 20).rename(tmp_path / "resumed")
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


@pytest.mark.parametrize("flag", ["--train.resume", "--train.init_from"])
def test_a_start_parses_the_metadata_of_its_checkpoint_once(
    flag: str, world, straight, config_file: Path, tmp_path: Path
) -> None:
    """With 512 ranks that takes some 20 s. It is read to find the step, to load it, and to find old ones to remove."""
    straight = straight(2)
    out = branch(straight, 20).rename(tmp_path / "run") if flag == "--train.resume" else tmp_path / "run"
    start = "auto" if flag == "--train.resume" else straight
    flags = ["--train.max_steps", 22, "--checkpoint.interval", 1, "--checkpoint.keep_last", 1]
    answers = world(2)("train_counting_parses", "--config", config_file, "--out_dir", out, flag, start, *flags)
    assert [answer["result"] for answer in answers] == [1, 1]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000022"]


@pytest.mark.slow
def test_a_run_goes_on_in_any_world(world, straight, config_file: Path, tmp_path: Path) -> None:
    alone = straight(1)
    for before, after in ((4, 2), (2, 4), (4, 1), (1, 4)):
        out = tmp_path / f"{before} then {after}"
        flags = ["--train.micro_batch_size", 8 // max(before, after)]
        world(before).train("--config", config_file, "--out_dir", out, *flags)
        resumed = branch(out, 20)
        world(after).train("--config", config_file, "--out_dir", resumed, "--train.micro_batch_size", 1)
        assert column(resumed, "loss") == pytest.approx(column(alone, "loss"), abs=2e-6, rel=0), (before, after)
        state = reader.read_state(resumed / "checkpoints" / "step-00000040")
        assert (state["samples"], state["world_size"]) == (320, after)


def test_settings_that_a_resumed_run_changes_are_told(world, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = ["--config", config_file, "--out_dir", out]
    world(1)("train_signalled", "7", 0, *flags)
    others = ["--optim.weight_decay", 0.3, "--log.interval", 5]
    planned = world(1).train(*flags, *others, "--dry_run").splitlines()
    assert "changed  optim.weight_decay 0.1 -> 0.3, log.interval 1 -> 5" in planned
    assert "changed  " not in world(1).train(*flags, "--dry_run")
    answers = world(1)("train", *flags, *others)
    said = " ".join(answers[0]["said"].split())  # summaries fold long lines
    start = f"start resumed from {out}/checkpoints/step-00000007 at step 7"
    assert said.count(f" {start} ") == 1
    assert " ".join(" ".join(planned).split()).startswith(f"{start} changed ")
    changes = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines() if '"start"' in line]
    assert [event["changed"] for event in changes] == [
        {},
        {"optim.weight_decay": [0.1, 0.3], "log.interval": [1, 5]},
    ]
    assert " changed optim.weight_decay 0.1 -> 0.3, log.interval 1 -> 5 " in said


@pytest.mark.parametrize("is_async", [True, False])
def test_a_checkpoint_is_called_on_disk_when_it_is(world, config_file: Path, tmp_path: Path, is_async: bool) -> None:
    flags = ["--config", config_file, "--out_dir", tmp_path / "run", *SHORT, "--checkpoint.asynchronous", is_async]
    said = [line for line in world(1).train(*flags).splitlines() if line.startswith("checkpoint of step ")]
    said = [re.sub(r"waited \d+\.\d s", "waited N s", line) for line in said]
    background = ["is being written: training waited N s for it", "is on disk"]
    waiting = ["is on disk: training waited N s for it"]
    usual = background if is_async else waiting
    expected = [*((4, how) for how in usual), *((8, how) for how in usual), *((12, how) for how in waiting)]
    assert said == [f"checkpoint of step {step} {how}" for step, how in expected]


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_disk_that_fills_up(world, straight, config_file: Path, small_disk: Path, on_failure: str) -> None:
    straight, out = straight(2), small_disk / "run"
    flags = ["--checkpoint.interval", 10, "--checkpoint.asynchronous", "true", "--checkpoint.on_failure", on_failure]
    answers = world(2)("train_on_a_full_disk", "--config", config_file, "--out_dir", out, *flags)
    assert "checkpoint of step 10 is on disk\n" in answers[0]["said"]
    assert "checkpoint of step 20 is on disk" not in answers[0]["said"]
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


def test_ranks_that_see_different_checkpoints_resume_from_the_first_ranks(
    world, config_file: Path, tmp_path: Path
) -> None:
    flags = ["--config", config_file, "--out_dir", tmp_path / "run", *SHORT]
    world(2).train(*flags)
    answers = world(2)("resumed_from", *flags, "--dry_run")
    assert [answer["result"] for answer in answers] == ["step-00000012"] * 2


def test_checkpoints_are_kept_as_asked_for(world, config_file: Path, tmp_path: Path) -> None:
    keep = ["--checkpoint.interval", 2, "--checkpoint.keep_last", 1, "--checkpoint.keep_every", 6]
    world(1).train("--config", config_file, "--out_dir", tmp_path / "run", *SHORT, *keep)
    there = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert there == ["step-00000006", "step-00000012"]


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


@pytest.mark.parametrize("name", ["metrics.csv", "config.yaml"])
def test_every_rank_ends_with_the_error_of_the_log(world, config_file: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    answers = world(2)("train", "--config", config_file, "--out_dir", tmp_path / "run")
    problems = [answer["problems"] for answer in answers]
    assert problems[0] == problems[1]
    assert problems[0][0].startswith(f"cannot rewrite {tmp_path / 'run' / name} (")


def test_an_incomplete_checkpoint_is_passed_over(world, straight, config_file: Path, tmp_path: Path) -> None:
    straight = straight(2)
    broken = tmp_path / "broken"
    shutil.copytree(straight, broken)
    (broken / "checkpoints" / "step-00000040" / ".metadata").unlink()
    shutil.copytree(straight / "checkpoints" / "step-00000040", broken / "checkpoints" / "step-00000050.tmp")
    said = [answer["said"] for answer in world(2)("train", "--config", config_file, "--out_dir", broken)]
    step = broken / "checkpoints" / "step-00000040"
    passed_over = f"passed over: {step} is not a complete checkpoint (.metadata is missing)"
    assert [of_rank.count(passed_over) for of_rank in said] == [1, 0]
    assert "at step 20" in said[0]
    assert column(broken, "loss") == column(straight, "loss")


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


def test_branching_off_an_older_step_needs_its_own_folder(world, straight, config_file: Path, tmp_path: Path) -> None:
    out = straight(1)
    step = out / "checkpoints" / "step-00000020"
    (problem,) = world(1)("train", "--config", config_file, "--out_dir", out, "--train.resume", step)[0]["problems"]
    assert problem.endswith(f"is newer than train.resume {step}: give another out_dir to branch off there")
    other = tmp_path / "other"
    assert "at step 20" in world(1).train("--config", config_file, "--out_dir", other, "--train.resume", step)
    assert column(other, "loss") == column(out, "loss")[20:]


def test_the_same_command_resumes_a_branch(world, straight, config_file: Path, tmp_path: Path) -> None:
    parent, out = shutil.copytree(straight(1), tmp_path / "parent"), tmp_path / "out"
    start = parent / "checkpoints" / "step-00000020"
    flags = ["--config", config_file, "--out_dir", out, "--checkpoint.interval", 4]
    same = [*flags, "--train.resume", start]
    assert f"resumed from {start} at step 20" in " ".join(world(1).train(*same, "--train.max_steps", 24).split())
    assert reader.read_state(out / "checkpoints" / "step-00000024")["origin"]["resume"] == str(start)
    # its own newest step wins, however the path is written, and at every start
    relative = ["--train.resume", os.path.relpath(start, ROOT)]
    planned = " ".join(world(1).train(*same, "--dry_run").split())
    assert f"resumed from {out}/checkpoints/step-00000024" in planned
    assert "at step 24" in world(1).train(*flags, *relative, "--train.max_steps", 28)
    assert "at step 28" in world(1).train(*flags, "--train.max_steps", 32)
    shutil.rmtree(start)  # as its run's keep_last does
    assert "at step 32" in world(1).train(*same)
    assert column(out, "step") == list(range(21, 41))
    assert reader.read_state(out / "checkpoints" / "step-00000040")["origin"]["resume"] == str(start)
    assert report.read_run(out)["summary"]["branched from"] == str(start)
    # a damaged step of its own is passed over, as with train.resume auto
    spoiled = out / "checkpoints" / "step-00000040" / "__0_0.distcp"
    spoiled.write_bytes(bytes([byte ^ 1 for byte in spoiled.read_bytes()]))
    said = " ".join(world(1).train(*same).split())
    assert f"passed over: {spoiled.parent} is damaged (__0_0.distcp does not match its hash)" in said
    assert f"resumed from {out}/checkpoints/step-00000036 at step 36" in said


def test_a_branch_of_another_step_is_not_taken_for_it(world, straight, config_file: Path, tmp_path: Path) -> None:
    parent, out = straight(1), tmp_path / "out"
    first, last = (parent / "checkpoints" / f"step-000000{step}" for step in (20, 40))
    flags = ["--config", config_file, "--out_dir", out, "--checkpoint.interval", 4]
    world(1).train(*flags, "--train.resume", first, "--train.max_steps", 28)
    own = out / "checkpoints" / "step-00000028"
    (problem,) = world(1)("train", *flags, "--train.resume", last)[0]["problems"]
    hint = "give another out_dir to branch off there"
    assert problem == f"{own} did not branch off from train.resume {last}: {hint}"
    back = own.with_name("step-00000024")
    (problem,) = world(1)("train", *flags, "--train.resume", back)[0]["problems"]
    assert problem == f"{own} is newer than train.resume {back}: {hint}"


@pytest.mark.parametrize("checkpoints", ["its own", "a link"])
def test_a_branch_of_a_runs_newest_step_may_be_named_by_the_run_or_the_step(
    world, straight, config_file: Path, tmp_path: Path, checkpoints: str
) -> None:
    parent, out = shutil.copytree(straight(1), tmp_path / "parent"), tmp_path / "out"
    steps = parent / "checkpoints"
    if checkpoints == "a link":
        steps.symlink_to(steps.rename(tmp_path / "scratch"))
    start, older = steps / "step-00000040", steps / "step-00000020"
    flags = ["--config", config_file, "--out_dir", out, "--checkpoint.interval", 1]
    world(1).train(*flags, "--train.resume", parent, "--train.max_steps", 41)
    assert reader.read_state(out / "checkpoints" / "step-00000041")["origin"]["resume"] == str(start.resolve())
    shutil.rmtree(start)  # as its run's keep_last does
    for step, how in enumerate((parent, start, steps, os.path.relpath(parent, ROOT), os.path.relpath(start, ROOT)), 41):
        said = world(1).train(*flags, "--train.resume", how, "--train.max_steps", step + 1)
        assert f"at step {step}" in said
    (problem,) = world(1)("train", *flags, "--train.resume", older)[0]["problems"]
    assert f"did not branch off from train.resume {older}: " in problem


def test_a_branch_of_a_version_that_recorded_no_origin_goes_on(
    world, straight, config_file: Path, tmp_path: Path
) -> None:
    start, out = straight(1) / "checkpoints" / "step-00000020", tmp_path / "out"
    flags = ["--config", config_file, "--out_dir", out, "--train.resume", start, "--checkpoint.interval", 4]
    world(1).train(*flags, "--train.max_steps", 24)
    state = out / "checkpoints" / "step-00000024" / "state.json"
    content, _ = hashes.unseal(state.read_bytes())
    content.pop("origin", None)
    state.write_text(json.dumps(content))  # without hashes, as then
    said = " ".join(world(1).train(*flags, "--train.max_steps", 28).split())
    assert f"resumed from {out}/checkpoints/step-00000024 at step 24" in said
    assert reader.read_state(out / "checkpoints" / "step-00000028")["origin"]["resume"] == str(start)


def test_checkpoints_are_looked_for_once_before_the_run_lock_is_taken(
    world, recipe: Any, config_file: Path, tmp_path: Path
) -> None:
    flags = ["--config", str(config_file), "--out_dir", str(tmp_path / "run"), "--train.max_steps", "6"]
    world(1).train(*flags)
    with mock.patch.object(reader, "problem", wraps=reader.problem) as looks:
        run = recipe.setup(cli.parse(PretrainArgs, flags))
    assert run.resume == tmp_path / "run/checkpoints/step-00000006"
    assert looks.call_count == 1
