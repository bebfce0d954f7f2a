"""Runs whose checkpoints are damaged, or cannot be saved."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from processes import Process
from runs import ROOT, SHORT, column, tensors

from tinyllama.checkpoint import reader
from tinyllama.checkpoint.names import step_dir


def flip(file: Path) -> None:
    """Flip a bit of a number in a file of tensors."""
    payload = bytearray(file.read_bytes())
    payload[len(payload) // 2] ^= 64
    file.write_bytes(payload)


def events(out: Path, name: str) -> list[dict]:
    """The events of a run that have this name."""
    lines = (out / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def test_a_flipped_bit_is_passed_over_and_costs_no_more_than_the_steps_since(world, config_file, tmp_path) -> None:
    straight, out = tmp_path / "straight", tmp_path / "run"
    world(2).train("--config", config_file, "--out_dir", straight, *SHORT)
    shutil.copytree(straight, out)
    checkpoints = out / "checkpoints"
    flip(step_dir(checkpoints, 12) / "__1_0.distcp")
    (step_dir(checkpoints, 8) / "config.yaml").unlink()
    said = world(2).train("--config", config_file, "--out_dir", out, *SHORT)
    damage = f"{step_dir(checkpoints, 12)} is damaged (__1_0.distcp does not match its hash)"
    assert said.count(f"passed over: {damage}\n") == 1
    missing = f"{step_dir(checkpoints, 8)} is not a complete checkpoint (config.yaml is missing)"
    assert said.count(f"passed over: {missing}\n") == 1
    assert f"resumed from {step_dir(checkpoints, 4)} at step 4" in said
    assert column(out, "loss") == column(straight, "loss")
    after, expected = (tensors(step_dir(run / "checkpoints", 12)) for run in (out, straight))
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())
    (aside,) = checkpoints.glob("*.broken-*")  # step 8 was, too, until step 12
    assert aside.name.startswith("step-00000012.broken-")
    assert said.count(f"set aside: {aside} was not a complete checkpoint; it takes 0.0") == 1
    assert len(events(out, "set_aside")) == 2


def test_a_run_that_starts_from_another_says_from_which_step(world, config_file, tmp_path) -> None:
    trunk, out = tmp_path / "trunk", tmp_path / "run"
    world(2).train("--config", config_file, "--out_dir", trunk, *SHORT)
    newest = step_dir(trunk / "checkpoints", 12)
    kept = (newest / "config.yaml").rename(tmp_path / "kept")
    start = ["--config", config_file, *SHORT, "--out_dir", out, "--train.init_from", trunk, "--train.max_steps", 8]
    said = [answer["said"] for answer in world(2)("train", *start)]
    passed_over = f"passed over: {newest} is not a complete checkpoint (config.yaml is missing)\n"
    assert [of_rank.count("passed over: ") for of_rank in said] == [1, 0]
    assert passed_over in said[0]
    assert f"start    a new run from the weights of {step_dir(trunk / 'checkpoints', 8)} at step 0" in said[0]
    # the same command resumes, whatever the other run has saved since
    kept.rename(newest / "config.yaml")
    said = world(2).train(*start, "--train.max_steps", 12)
    assert f"resumed from {step_dir(out / 'checkpoints', 8)} at step 8" in said
    assert [event["started_from"] for event in events(out, "start")] == [str(step_dir(trunk / "checkpoints", 8)), None]
    origin = {"resume": None, "init_from": str(trunk)}
    assert reader.read_state(step_dir(out / "checkpoints", 12))["origin"] == origin


def test_a_run_whose_every_step_is_damaged_does_not_start_anew(world, config_file, tmp_path) -> None:
    out = tmp_path / "run"
    command = ["train", "--config", config_file, "--out_dir", out, *SHORT, "--checkpoint.keep_last", 1]
    world(2)(*command)
    step = step_dir(out / "checkpoints", 12)
    flip(step / "__0_0.distcp")
    rows = (out / "metrics.csv").read_bytes()
    damage = f"{step} is damaged (__0_0.distcp does not match its hash)"
    hint = f"no step before it is complete; move {out}/checkpoints away to start anew"
    assert [answer["problems"] for answer in world(2)(*command)] == [[f"{damage}: {hint}"]] * 2
    assert (out / "metrics.csv").read_bytes() == rows
    for flag in ("--train.resume", "--train.init_from"):
        other = ["train", "--config", config_file, "--out_dir", tmp_path / "other", *SHORT, flag, step]
        for answer in world(2)(*other):
            assert answer["problems"][0].startswith(f"{damage}: ")
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("put", "reason"),
    [
        (lambda path: path.symlink_to("unmounted"), "a link to nowhere"),
        (lambda path: path.write_text("mine"), "Not a directory"),
    ],
    ids=["link", "file"],
)
def test_what_is_in_the_place_of_checkpoints_is_not_taken_for_none(put, reason, world, config_file, tmp_path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.csv").write_text("step,tokens\n4,1024\n")
    put(out / "checkpoints")
    hint = "mount its disk, allow reading it, or move it away"
    for how in ("auto", "never"):
        (answer,) = world(1)("train", "--config", config_file, "--out_dir", out, "--train.resume", how)
        assert answer["problems"] == [f"cannot list the checkpoints in {out}/checkpoints ({reason}): {hint}"]
    assert (out / "metrics.csv").read_text() == "step,tokens\n4,1024\n"
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "metrics.csv"]


def test_checkpoints_that_may_not_be_listed_are_not_taken_for_none(config_file, tmp_path) -> None:
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "metrics.csv").write_text("step,tokens\n4,1024\n")
    command = [sys.executable, ROOT / "pretrain" / "train.py", "--config", config_file, "--out_dir", out, *SHORT]
    if os.geteuid() == 0:  # who may read everything, unless this capability is taken away
        if shutil.which("setpriv") is None:
            pytest.skip("as root, needs setpriv")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    (out / "checkpoints").chmod(0o300)
    process = Process(*command, cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    try:
        code, said, errors = process.end()
    finally:
        (out / "checkpoints").chmod(0o700)
    hint = "mount its disk, allow reading it, or move it away"
    problem = f"cannot list the checkpoints in {out}/checkpoints (Permission denied): {hint}"
    assert (code, said, errors) == (2, "", f"error: {problem}\n")
    assert (out / "metrics.csv").read_text() == "step,tokens\n4,1024\n"


def test_a_step_without_hashes_is_taken_and_that_is_said_once(world, config_file, tmp_path) -> None:
    out = tmp_path / "run"
    world(2).train("--config", config_file, "--out_dir", out, *SHORT, "--train.max_steps", 8)
    step = step_dir(out / "checkpoints", 8)
    (step / "state.json").write_text(json.dumps(reader.read_state(step)))
    world(2).train("--config", config_file, "--out_dir", out, *SHORT)
    said = "".join(process.errors() for process in world(2).processes)
    assert said.count(f"{step} is of a version that saved no hashes: its tensors are not verified\n") == 1
    assert reader.read_hashes(step_dir(out / "checkpoints", 12)) is not None


def test_a_run_stops_when_three_saves_in_a_row_have_failed(world, config_file, tmp_path) -> None:
    out = tmp_path / "run"
    flags = ["--config", config_file, "--out_dir", out, *SHORT, "--checkpoint.interval", 2, "--train.max_steps", 20]
    (answer,) = world(1)("train_without_room", "2,3,5,6,7", *flags)
    assert answer["result"] == 1
    steps = [path.name for path in sorted((out / "checkpoints").iterdir())]
    assert steps == ["step-00000002", "step-00000008", "step-00000015"]  # the last one when it stops, which succeeds
    errors = [event["error"] for event in events(out, "checkpoint_failed")]
    assert [error.partition("; ")[2] for error in errors][-2:] == ["", "3 saves in a row have failed"]


def test_a_run_whose_last_save_fails_too_says_how_it_ends(world, config_file, tmp_path) -> None:
    out = tmp_path / "run"
    flags = ["--config", config_file, "--out_dir", out, *SHORT, "--checkpoint.interval", 2, "--train.max_steps", 20]
    told = tmp_path / "told"
    flags += ["--log.on_event", f'echo "$TINYLLAMA_EVENT" >> {told}']
    (answer,) = world(1)("train_without_room", "2,3,4,5", *flags)
    assert answer["result"] == 1
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
    (stop,) = events(out, "stop")
    assert stop["by"] == "checkpoint.on_failure"
    assert told.read_text().split()[-1] == "failed"


def test_nothing_is_saved_amid_skipped_steps(world, config_file, tmp_path) -> None:
    out = tmp_path / "run"
    flags = ["--config", config_file, "--out_dir", out, *SHORT, "--train.on_nonfinite", "skip"]
    (answer,) = world(1)("train_poisoned", 0, "3,4,5", *flags)
    assert answer["result"] == 0
    steps = {path.name: reader.read_state(path) for path in sorted((out / "checkpoints").iterdir())}
    assert list(steps) == ["step-00000006", "step-00000008", "step-00000012"]
    assert {state["skipped_in_a_row"] for state in steps.values()} == {0}


@pytest.mark.parametrize("steps", [8, 9])
def test_a_run_that_ends_amid_skipped_steps_is_saved(steps: int, world, config_file, tmp_path) -> None:
    out = tmp_path / "run"
    flags = ["--config", config_file, "--out_dir", out, *SHORT, "--train.max_steps", steps]
    (answer,) = world(1)("train_poisoned", 0, "7,8,9", *flags, "--train.on_nonfinite", "skip")
    assert answer["result"] == 0
    assert [path.name for path in sorted((out / "checkpoints").iterdir())][-1] == f"step-{steps:08d}"
    assert reader.read_state(step_dir(out / "checkpoints", steps))["skipped_in_a_row"] == steps - 6
