import json
import math
from pathlib import Path
from typing import Any

import pytest
from runs import column

from tinyllama.config.args import OptimArgs
from tinyllama.train.schedule import lr_at

UPSTREAM = OptimArgs()
STEPS = 1_430_512


def rates(max_steps: int, **optim: Any) -> list[float]:
    """The learning rate of every step of a run and of the step after its last."""
    args = OptimArgs(**{"lr": 1.0, "min_lr": 0.0, "warmup_steps": 0} | optim)
    return [lr_at(step, max_steps, args) for step in range(max_steps + 1)]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 2e-7),
        (999, 2e-4),
        (1999, 4e-4),
        (2000, 4e-4),
        (2000 + (1_430_511 - 2000) // 2, 2.2e-4),
        (1_430_511, 4e-5),
        (1_430_512, 4e-5),
        (10**9, 4e-5),
    ],
)
def test_landmarks(step: int, expected: float) -> None:
    assert lr_at(step, STEPS, UPSTREAM) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("step", [2000, 2001, 77_777, 715_255, 1_000_003, 1_430_510])
def test_the_default_is_bit_for_bit_the_cosine_it_always_was(step: int) -> None:
    progress = (step - 2000) / (STEPS - 1 - 2000)
    assert lr_at(step, STEPS, UPSTREAM) == 4e-5 + 0.5 * (1 + math.cos(math.pi * progress)) * (4e-4 - 4e-5)


def test_it_is_the_cosine_between_the_landmarks() -> None:
    quarter = rates(3001, warmup_steps=2000)[2250]
    assert quarter == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_without_warmup_it_starts_at_the_top() -> None:
    assert rates(3, min_lr=0.5) == [1.0, 0.75, 0.5, 0.5]


def test_the_shortest_run_ends_at_min_lr() -> None:
    assert rates(2, min_lr=0.1, warmup_steps=1) == [1.0, 0.1, 0.1]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_a_warm_up_is_linear(schedule: str) -> None:
    decay_steps = 1 if schedule == "wsd" else None
    found = rates(6, min_lr=0.9, warmup_steps=4, schedule=schedule, decay_steps=decay_steps)
    last = 1.0 if schedule == "constant" else 0.9
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, last, last])


def test_linear_reaches_zero_at_the_last_step() -> None:
    assert rates(6, warmup_steps=1, schedule="linear") == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    assert rates(3, min_lr=0.2, schedule="linear") == pytest.approx([1.0, 0.6, 0.2, 0.2])


@pytest.mark.parametrize(
    ("shape", "decay"),
    [("linear", [1.0, 0.75, 0.5, 0.25, 0.0]), ("sqrt", [1 - math.sqrt(part / 4) for part in range(5)])],
)
def test_wsd_stays_and_then_decays_over_its_last_steps(shape: str, decay: list[float]) -> None:
    found = rates(12, warmup_steps=2, schedule="wsd", decay_steps=4, decay_shape=shape)
    assert found == pytest.approx([0.5, *[1.0] * 6, *decay, 0.0])


def test_wsd_that_decays_from_its_warm_up_on_is_linear() -> None:
    wsd = rates(50, min_lr=0.1, warmup_steps=7, schedule="wsd", decay_steps=42)
    assert wsd == rates(50, min_lr=0.1, warmup_steps=7, schedule="linear")


def test_a_longer_run_of_wsd_or_constant_begins_as_a_shorter_one() -> None:
    """So that a cooldown may branch off any checkpoint."""
    short, long = (rates(steps, warmup_steps=3, schedule="wsd", decay_steps=10) for steps in (40, 90))
    assert short[:29] == long[:29] == rates(90, warmup_steps=3, schedule="constant")[:29]


def test_constant_stays() -> None:
    assert rates(4, warmup_steps=2, min_lr=0.3, schedule="constant") == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_a_cooldown_branches_off_a_checkpoint_by_flags(world, config_file: Path, tmp_path: Path, script: Any) -> None:
    trunk, cooldown = tmp_path / "trunk", tmp_path / "cooldown"
    settings = ["--config", config_file, "--optim.min_lr", 0]
    world(1).train(*settings, "--out_dir", trunk, "--optim.schedule", "constant")
    assert column(trunk, "lr")[5:] == [1e-2] * 35
    start = trunk / "checkpoints" / "step-00000020"
    flags = ["--train.resume", start, "--train.max_steps", 31, "--optim.schedule", "wsd", "--optim.decay_steps", 8]
    said = world(1).train(*settings, "--out_dir", cooldown, *flags)
    assert f"resumed from {start} at step 20" in said
    assert "optim.schedule constant -> wsd" in said
    assert column(cooldown, "lr") == pytest.approx([1e-2 * min(1.0, (30 - step) / 8) for step in range(20, 31)])
    assert column(cooldown, "loss")[0] == column(trunk, "loss")[20]  # the same data go on

    # and is compared with it from the first step of both, which the trunk has done
    code, out, err = script("compare_runs", trunk, cooldown, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    losses = column(trunk, "val_loss")
    assert [run["tokens"] for run in found["runs"]] == [40 * 8 * 32, 31 * 8 * 32]
    assert [run["branched_from"] for run in found["runs"]] == [None, str(start)]
    assert [row["tokens"] for row in found["losses"]] == [0, 20 * 8 * 32, 31 * 8 * 32]
    assert [row["losses"] for row in found["losses"]][:2] == [[losses[0]] * 2, [losses[1]] * 2]
    assert found["losses"][2]["losses"][1] == found["runs"][1]["loss"] == column(cooldown, "val_loss")[-1]
    assert found["settings"]["optim.schedule"] == ["constant", "wsd"]
    assert found["settings"]["train.max_steps"] == [40, 31]
