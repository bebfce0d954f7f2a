"""A run that resumes with another world, batch, context or budget: what it sees, counts and says, for real."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import branch, column, metrics

from tinyllama.checkpoint import reader
from tinyllama.checkpoint.names import step_dir
from tinyllama.throughput import duration

# the first 10 of 20 steps have 8 samples of 32 tokens each: 80 samples, 2,560 tokens
BATCH_16, BATCH_4, BATCH_12 = (["--train.global_batch_size", size] for size in (16, 4, 12))
TOKENS = ["--train.max_steps", "null", "--train.max_tokens", 5120]
EPOCHS = ["--train.max_steps", "null", "--train.max_epochs", 0.61]  # of 183 and 87 blocks: 164.7 samples

# ranks and flags of the second start; steps, samples and tokens at its end
CASES: dict[str, tuple[int, list[Any], int, int, int]] = {
    "tokens, as it was": (1, TOKENS, 20, 160, 5120),
    "tokens, two ranks": (2, TOKENS, 20, 160, 5120),
    "tokens, twice the batch": (1, [*TOKENS, *BATCH_16], 15, 160, 5120),
    "tokens, twice the batch on two ranks": (2, [*TOKENS, *BATCH_16], 15, 160, 5120),
    "tokens, half of it": (1, [*TOKENS, *BATCH_4], 30, 160, 5120),
    "tokens, half of it on two ranks": (2, [*TOKENS, *BATCH_4], 30, 160, 5120),
    "tokens, a batch for three ranks": (3, [*TOKENS, *BATCH_12], 17, 164, 5248),  # rounded up to whole steps
    "tokens, another micro-batch": (2, [*TOKENS, "--train.micro_batch_size", 4], 20, 160, 5120),
    "tokens, more of them": (1, ["--train.max_steps", "null", "--train.max_tokens", 5121, *BATCH_16], 16, 176, 5632),
    "tokens, a micro-batch of all": (1, [*TOKENS, *BATCH_16, "--train.micro_batch_size", 16], 15, 160, 5120),
    "epochs, as it was": (1, EPOCHS, 20, 160, 5120),  # rounded down to whole steps
    "epochs, twice the batch": (1, [*EPOCHS, *BATCH_16], 15, 160, 5120),
    "epochs, half of it on two ranks": (2, [*EPOCHS, *BATCH_4], 31, 164, 5248),
    "epochs, a batch for three ranks": (3, [*EPOCHS, *BATCH_12], 17, 164, 5248),
    "steps, twice the batch": (1, BATCH_16, 20, 240, 7680),
    "steps, half of it on two ranks": (2, BATCH_4, 20, 120, 3840),
    "steps, a batch for three ranks": (3, BATCH_12, 20, 200, 6400),
    "steps, fewer of them": (2, [*BATCH_16, "--train.max_steps", 13], 13, 128, 4096),
}

# tokens that are more than asked for, epochs that are fewer, and steps: cases that are started once more at their end
DONE = ("tokens, a batch for three ranks", "epochs, half of it on two ranks", "steps, fewer of them")


@pytest.fixture(scope="module")
def begun() -> dict[str, Path]:
    return {}


@pytest.fixture
def first(world, begun: dict[str, Path], config: dict[str, Any], config_file: Path, tmp_path_factory) -> Path:
    """The folder of a run that has done 10 of 20 steps on two ranks, begun once for all tests."""
    if not begun:
        out = tmp_path_factory.mktemp("first") / "run"
        kept = out.with_name("data")
        shutil.copytree(config_file.parent, kept)
        config["train"]["max_steps"] = 20
        text = yaml.safe_dump(config).replace(str(config_file.parent), str(kept))
        (kept / "run.yaml").write_text(text)
        world(2)("train_signalled", "10", 1, "--config", kept / "run.yaml", "--out_dir", out)
        begun["run"] = out
    return begun["run"]


@pytest.fixture
def resumed(first: Path, tmp_path: Path) -> list[Any]:
    """Flags of a start that goes on from step 10, in a copy of the run."""
    out = tmp_path / "run"
    shutil.copytree(first, out)
    return ["--config", first.with_name("data") / "run.yaml", "--out_dir", out]


@pytest.mark.parametrize("case", CASES)
def test_samples_and_tokens_are_those_of_the_budget(world, resumed, tmp_path: Path, case: str) -> None:
    ranks, flags, steps, samples, tokens = CASES[case]
    out = tmp_path / "run"
    said = world(ranks).train(*resumed, *flags)
    state = reader.read_state(step_dir(out / "checkpoints", steps))
    assert (state["step"], state["samples"], state["tokens"], state["world_size"]) == (steps, samples, tokens, ranks)
    epochs = samples / 270
    assert re.search(rf"^length   {steps} steps, {samples} samples, {tokens:,} tokens, {epochs:.2f} epochs", said, re.M)
    assert re.search(r"^done     10 steps, 80 samples, 2,560 tokens, ", said, re.M)
    assert re.search(rf"^left     {steps - 10} steps, {samples - 80} samples, {tokens - 2560:,} tokens, ", said, re.M)
    assert said.splitlines()[-1].startswith(f"done: {steps} steps, {tokens:,} tokens, in ")
    # one row a step; the tokens go on from what was done, and are those of the sources together
    batch = (tokens - 2560) // (steps - 10)
    trained = [row for row in metrics(out) if row["loss"]]
    assert [int(row["step"]) for row in trained] == list(range(1, steps + 1))
    assert [int(row["tokens"]) for row in trained] == [
        *range(256, 2561, 256), *range(2560 + batch, tokens + 1, batch)
    ]  # fmt: skip
    assert all(int(row["tokens_up"]) + int(row["tokens_down"]) == int(row["tokens"]) for row in trained)
    assert float(trained[-1]["lr"]) == 1e-3  # min_lr, at the last step
    assert column(out, "lr") == sorted(column(out, "lr")[:5]) + sorted(column(out, "lr")[5:], reverse=True)
    # the time left is that of the steps that are left, at today's batch; the first step does not say
    for row in trained[10:]:
        seconds = (steps - int(row["step"])) * batch / float(row["tokens_per_second"])
        (line,) = [line for line in said.splitlines() if line.startswith(f"step {row['step']}/{steps}  loss ")]
        if row is trained[10]:
            assert " left" not in line
        else:
            assert line.endswith(f"  {duration(seconds)} left")
    if case in DONE:  # the same command again has nothing to do
        again = world(ranks).train(*resumed, *flags)
        assert f"step-{steps:08d} at step {steps}" in again
        assert re.search(r"^left     0 steps, 0 samples, 0 tokens, 0.00 epochs", again, re.M)


def test_an_interruption_after_the_change_changes_nothing(world, resumed, tmp_path: Path) -> None:
    out, flags = tmp_path / "run", [*TOKENS, *BATCH_16, "--checkpoint.interval", 2]
    world(2).train(*resumed, *flags)
    again = branch(out, 12)
    world(1).train(*resumed[:2], "--out_dir", again, *flags)
    for name in ("step", "tokens", "lr"):
        assert column(again, name) == column(out, name), name
    assert column(again, "loss") == pytest.approx(column(out, "loss"), rel=1e-5)


REFUSED = {
    "another context": (
        ["--model.block_size", 16],
        "model.block_size was 32 and is 16; put it back, or start a new run",
    ),
    "fewer steps than are done": (["--train.max_steps", 9], "is beyond the run's 9 steps: raise train.max_steps"),
    "fewer tokens": (
        ["--train.max_steps", "null", "--train.max_tokens", 2304],
        "is beyond the run's 2304 tokens: raise train.max_tokens",
    ),
    "fewer epochs": (
        ["--train.max_steps", "null", "--train.max_epochs", 0.25],
        "is beyond the run's 0.25 epochs: raise train.max_epochs",
    ),
    "no whole micro-batches": (
        BATCH_12,
        "not a multiple of 2 ranks x train.micro_batch_size 4: start 1 or 3 ranks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_resumed_is_refused_and_nothing_is_lost(world, resumed, tmp_path: Path, case: str) -> None:
    flags, expected = REFUSED[case]
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    micro_batch = ["--train.micro_batch_size", 4] if case == "no whole micro-batches" else []
    for answer in world(2)("train", *resumed, *flags, *micro_batch):
        (problem,) = answer["problems"]
        assert expected in problem
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_of_the_budget_alone_is_the_one_it_was(world, first: Path, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    flags = ["--config", first.with_name("data") / "run.yaml", *TOKENS]
    world(2).train(*flags, "--out_dir", straight)
    world(2)("train_signalled", "10", 1, *flags, "--out_dir", resumed)
    world(2).train(*flags, "--out_dir", resumed)
    for name in ("step", "tokens", "loss", "lr", "grad_norm"):
        assert column(resumed, name) == column(straight, name), name
    events = [json.loads(line) for line in (resumed / "events.jsonl").read_text().splitlines()]
    assert [event["changed"] for event in events if event["event"] == "start"] == [{}, {}]


@pytest.mark.parametrize(("ranks", "batch"), [(1, 16), (2, 4)])
def test_a_decay_under_way_goes_on_by_the_sample(world, first: Path, tmp_path: Path, ranks: int, batch: int) -> None:
    """Of 160 samples the last 14 steps of 8 are wsd's decay, to its end at the last step of today's batch."""
    out = tmp_path / "run"
    resumed = ["--config", first.with_name("data") / "run.yaml", "--out_dir", out]
    wsd = ["--optim.schedule", "wsd", "--optim.decay_steps", 14]
    world(1)("train_signalled", "10", 0, *resumed, *TOKENS, *wsd)
    world(ranks).train(*resumed, *TOKENS, *wsd, "--train.global_batch_size", batch, "--checkpoint.interval", 3)
    seen = range(80, 160, batch)  # before each step
    expected = [1e-3 + 9e-3 * (160 - batch - samples) / 112 for samples in seen]
    assert column(out, "lr")[10:] == pytest.approx(expected)
    assert reader.read_state(step_dir(out / "checkpoints", 10 + len(seen)))["decay_batch"] == 8
    again = branch(out, 10 + len(seen) - 3)
    world(1).train(*resumed[:2], "--out_dir", again, *TOKENS, *wsd, "--train.global_batch_size", batch)
    assert column(again, "lr") == column(out, "lr")


# of the second start, at step 10: a warm-up that ends there, and one of less than what is done, at another batch
WARM_UPS = {
    "ends at once": ([], ["--optim.warmup_steps", 10], 80),
    "has never ended": (["--optim.warmup_steps", 15], [*BATCH_4, "--optim.warmup_steps", 5], 40),
}


@pytest.mark.parametrize("case", WARM_UPS)
def test_another_warm_up_is_the_same_after_an_interruption(world, first: Path, tmp_path: Path, case: str) -> None:
    before, after, ended = WARM_UPS[case]
    begun, straight = tmp_path / "begun", tmp_path / "straight"
    flags = ["--config", first.with_name("data") / "run.yaml", *TOKENS]
    world(1)("train_signalled", "10", 0, *flags, "--out_dir", begun, *before)
    shutil.copytree(begun, straight)
    world(1).train(*flags, "--out_dir", straight, *after, "--checkpoint.interval", 5, "--checkpoint.keep_last", "null")
    again = branch(straight, 15)
    world(1).train(*flags, "--out_dir", again, *after)
    assert reader.read_state(step_dir(straight / "checkpoints", 15))["warmup_samples"] == ended
    assert len(column(again, "lr")) == len(column(straight, "lr"))
    for name in ("lr", "loss"):
        assert column(again, name) == column(straight, name)
