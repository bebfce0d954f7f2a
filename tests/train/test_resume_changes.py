"""A run that resumes with another world, batch, context or budget: what it sees, counts and says, for real."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from runs import branch, column, metrics

from tinyllama.checkpoint import reader
from tinyllama.checkpoint.names import step_dir
from tinyllama.throughput import duration

# the first 20 steps have 8 samples of 32 tokens each: 160 samples, 5,120 tokens
BATCH_16, BATCH_4, BATCH_12 = (["--train.global_batch_size", size] for size in (16, 4, 12))
TOKENS = ["--train.max_steps", "null", "--train.max_tokens", 10240]
EPOCHS = ["--train.max_steps", "null", "--train.max_epochs", 1.2]  # of 183 and 87 blocks: 324 samples

# ranks and flags of the second start; steps, samples and tokens at its end
CASES: dict[str, tuple[int, list[Any], int, int, int]] = {
    "tokens, as it was": (1, TOKENS, 40, 320, 10240),
    "tokens, two ranks": (2, TOKENS, 40, 320, 10240),
    "tokens, twice the batch": (1, [*TOKENS, *BATCH_16], 30, 320, 10240),
    "tokens, twice the batch on two ranks": (2, [*TOKENS, *BATCH_16], 30, 320, 10240),
    "tokens, half of it": (1, [*TOKENS, *BATCH_4], 60, 320, 10240),
    "tokens, half of it on two ranks": (2, [*TOKENS, *BATCH_4], 60, 320, 10240),
    "tokens, a batch for three ranks": (3, [*TOKENS, *BATCH_12], 34, 328, 10496),  # rounded up to whole steps
    "tokens, another micro-batch": (2, [*TOKENS, "--train.micro_batch_size", 4], 40, 320, 10240),
    "tokens, more of them": (1, ["--train.max_steps", "null", "--train.max_tokens", 10241, *BATCH_16], 31, 336, 10752),
    "tokens, a micro-batch of all": (1, [*TOKENS, *BATCH_16, "--train.micro_batch_size", 16], 30, 320, 10240),
    "epochs, as it was": (1, EPOCHS, 40, 320, 10240),  # rounded down to whole steps
    "epochs, twice the batch": (1, [*EPOCHS, *BATCH_16], 30, 320, 10240),
    "epochs, half of it on two ranks": (2, [*EPOCHS, *BATCH_4], 61, 324, 10368),
    "epochs, a batch for three ranks": (3, [*EPOCHS, *BATCH_12], 33, 316, 10112),
    "steps, twice the batch": (1, BATCH_16, 40, 480, 15360),
    "steps, half of it on two ranks": (2, BATCH_4, 40, 240, 7680),
    "steps, a batch for three ranks": (3, BATCH_12, 40, 400, 12800),
    "steps, fewer of them": (2, [*BATCH_16, "--train.max_steps", 25], 25, 240, 7680),
}


@pytest.fixture(scope="module")
def begun() -> dict[str, Path]:
    return {}


@pytest.fixture
def first(world, begun: dict[str, Path], config: dict[str, Any], config_file: Path, tmp_path_factory) -> Path:
    """The folder of a run that has done 20 of 40 steps on two ranks, begun once for all tests."""
    if not begun:
        out = tmp_path_factory.mktemp("first") / "run"
        kept = out.with_name("data")
        shutil.copytree(config_file.parent, kept)
        text = config_file.read_text().replace(str(config_file.parent), str(kept))
        (kept / "run.yaml").write_text(text)
        world(2)("train_signalled", "20", 1, "--config", kept / "run.yaml", "--out_dir", out)
        begun["run"] = out
    return begun["run"]


@pytest.fixture
def resumed(first: Path, tmp_path: Path) -> list[Any]:
    """Flags of a start that goes on from step 20, in a copy of the run."""
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
    assert re.search(r"^done     20 steps, 160 samples, 5,120 tokens, ", said, re.M)
    assert re.search(rf"^left     {steps - 20} steps, {samples - 160} samples, {tokens - 5120:,} tokens, ", said, re.M)
    assert said.splitlines()[-1].startswith(f"done: {steps} steps, {tokens:,} tokens, in ")
    # one row a step; the tokens go on from what was done, and are those of the sources together
    batch = (tokens - 5120) // (steps - 20)
    trained = [row for row in metrics(out) if row["loss"]]
    assert [int(row["step"]) for row in trained] == list(range(1, steps + 1))
    assert [int(row["tokens"]) for row in trained] == [
        *range(256, 5121, 256), *range(5120 + batch, tokens + 1, batch)
    ]  # fmt: skip
    assert all(int(row["tokens_up"]) + int(row["tokens_down"]) == int(row["tokens"]) for row in trained)
    assert float(trained[-1]["lr"]) == 1e-3  # min_lr, at the last step
    assert column(out, "lr") == sorted(column(out, "lr")[:5]) + sorted(column(out, "lr")[5:], reverse=True)
    # the time left is that of the steps that are left, at today's batch
    for row in trained[20:]:
        seconds = (steps - int(row["step"])) * batch / float(row["tokens_per_second"])
        (line,) = [line for line in said.splitlines() if line.startswith(f"step {row['step']}/{steps}  loss ")]
        assert line.endswith(f"  {duration(seconds)} left")
    # the same command again has nothing to do
    again = world(ranks).train(*resumed, *flags)
    assert f"step-{steps:08d} at step {steps}" in again
    assert re.search(r"^left     0 steps, 0 samples, 0 tokens, 0.00 epochs", again, re.M)


def test_an_interruption_after_the_change_changes_nothing(world, resumed, tmp_path: Path) -> None:
    out, flags = tmp_path / "run", [*TOKENS, *BATCH_16, "--checkpoint.interval", 5]
    world(2).train(*resumed, *flags)
    again = branch(out, 25)
    world(1).train(*resumed[:2], "--out_dir", again, *flags)
    for name in ("step", "tokens", "lr"):
        assert column(again, name) == column(out, name), name
    assert column(again, "loss") == pytest.approx(column(out, "loss"), rel=1e-5)


REFUSED = {
    "another context": (
        ["--model.block_size", 16],
        "model.block_size was 32 and is 16; put it back, or start a new run",
    ),
    "fewer steps than are done": (["--train.max_steps", 19], "is beyond the run's 19 steps: raise train.max_steps"),
    "fewer tokens": (
        ["--train.max_steps", "null", "--train.max_tokens", 4864],
        "is beyond the run's 4864 tokens: raise train.max_tokens",
    ),
    "fewer epochs": (
        ["--train.max_steps", "null", "--train.max_epochs", 0.5],
        "is beyond the run's 0.5 epochs: raise train.max_epochs",
    ),
    "no whole micro-batches": (BATCH_12, "12 is not a multiple of 2 ranks x train.micro_batch_size 4; nearest"),
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
    world(2)("train_signalled", "20", 1, *flags, "--out_dir", resumed)
    world(2).train(*flags, "--out_dir", resumed)
    for name in ("step", "tokens", "loss", "lr", "grad_norm"):
        assert column(resumed, name) == column(straight, name), name
    events = [json.loads(line) for line in (resumed / "events.jsonl").read_text().splitlines()]
    assert [event["changed"] for event in events if event["event"] == "start"] == [{}, {}]


@pytest.mark.parametrize(("ranks", "batch"), [(1, 16), (2, 4)])
def test_a_decay_under_way_goes_on_by_the_sample(world, resumed, tmp_path: Path, ranks: int, batch: int) -> None:
    """Of 320 samples the last 30 steps of 8 are wsd's decay, to its end at the last step of today's batch."""
    wsd = ["--optim.schedule", "wsd", "--optim.decay_steps", 30]
    world(ranks).train(*resumed, *TOKENS, *wsd, "--train.global_batch_size", batch, "--checkpoint.interval", 5)
    seen = range(160, 320, batch)  # before each step
    expected = [1e-3 + 9e-3 * (320 - batch - samples) / 240 for samples in seen]
    out = tmp_path / "run"
    assert column(out, "lr")[20:] == pytest.approx(expected)
    assert reader.read_state(step_dir(out / "checkpoints", 20 + len(seen)))["decay_batch"] == 8
    again = branch(out, 20 + len(seen) - 5)
    world(1).train(*resumed[:2], "--out_dir", again, *TOKENS, *wsd, "--train.global_batch_size", batch)
    assert column(again, "lr") == column(out, "lr")
