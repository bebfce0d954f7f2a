"""A run, resolved: what is done counts as it was done, and the rest as the settings are today."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tinyllama import InputError
from tinyllama.checkpoint.state import TrainState
from tinyllama.config.args import DataArgs, ModelArgs, OptimArgs, PretrainArgs, Source, TrainArgs
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import open_packed
from tinyllama.train.launch import World
from tinyllama.train.run import Run
from tinyllama.train.start import start_from

T = 8  # block_size
BLOCKS = 100


@pytest.fixture
def make_run(packed_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Run]:
    """A function that resolves a run on 100 blocks, from settings of train.* and what is done."""
    folder = packed_folder([[[3] * (T + 1)] * BLOCKS], eos=False)

    def make(
        done: TrainState | None = None, warmup_steps: int = 5, decay_steps: int | None = None, **train: Any
    ) -> Run:
        """With ``decay_steps``, on the schedule wsd."""
        args = PretrainArgs(
            model=ModelArgs(name="quickstart", block_size=T),
            data=DataArgs(sources=[Source(str(folder))]),
            optim=OptimArgs(
                lr=1.0,
                min_lr=0.1,
                warmup_steps=warmup_steps,
                schedule="wsd" if decay_steps else "cosine",
                decay_steps=decay_steps,
            ),
            train=TrainArgs(**{"global_batch_size": 8} | train),
        )
        mixture = Mixture([BLOCKS], [1.0], 0, ["x"])
        sources = [open_packed(folder)]
        config = args.model.resolve()
        return Run(args, config, World(1, 1, 1), sources, [], mixture, 1, {}, None, done or TrainState())

    return make


def after(run: Run, steps: int) -> TrainState:
    """What is done ``steps`` steps after the run's start."""
    step, batch, warmup = run.done.step + steps, run.args.train.global_batch_size, run.args.optim.warmup_steps
    samples = run.done.samples + steps * batch
    state = run.with_schedule(run.done)
    if run.done.step < warmup <= step:
        state.warmup_samples = samples - (step - warmup) * batch
    return replace(state, step=step, samples=samples, tokens=samples * T)


# 20 of 40 steps at a batch of 8 are done: 160 of 320 samples
LENGTHS = {
    "tokens, same batch": ({"max_tokens": 320 * T}, 40, 160),
    "tokens, twice the batch": ({"max_tokens": 320 * T, "global_batch_size": 16}, 30, 160),
    "tokens, half of it": ({"max_tokens": 320 * T, "global_batch_size": 4}, 60, 160),
    "tokens, rounded up to whole steps": ({"max_tokens": 320 * T + 1, "global_batch_size": 16}, 31, 176),
    "tokens, more of them": ({"max_tokens": 640 * T, "global_batch_size": 16}, 50, 480),
    "tokens, all done": ({"max_tokens": 160 * T, "global_batch_size": 16}, 20, 0),
    "tokens, done and a part of a step": ({"max_tokens": 160 * T - 7, "global_batch_size": 16}, 20, 0),
    "epochs, same batch": ({"max_epochs": 3.2}, 40, 160),
    "epochs, twice the batch": ({"max_epochs": 3.2, "global_batch_size": 16}, 30, 160),
    "epochs, half of it": ({"max_epochs": 3.2, "global_batch_size": 4}, 60, 160),
    "epochs, rounded down to whole steps": ({"max_epochs": 3.31, "global_batch_size": 16}, 30, 160),
    "epochs, all done": ({"max_epochs": 1.6, "global_batch_size": 16}, 20, 0),
    "steps, same batch": ({"max_steps": 40}, 40, 160),
    "steps, twice the batch": ({"max_steps": 40, "global_batch_size": 16}, 40, 320),
    "steps, half of it": ({"max_steps": 40, "global_batch_size": 4}, 40, 80),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_what_is_done_counts_as_it_was_done(make_run, case: str) -> None:
    train, steps, samples_left = LENGTHS[case]
    run = make_run(after(make_run(max_steps=40), 20), **train)
    assert (run.max_steps, run.steps_left, run.samples_left) == (steps, steps - 20, samples_left)
    # and so at every later checkpoint
    for later in range(0, run.steps_left + 1, 5):
        assert replace(run, done=after(run, later)).max_steps == steps


def test_an_epoch_is_the_decimal_that_was_written(make_run) -> None:
    # 0.29 x 100 is 28.999999999999996 as a float
    assert make_run(max_epochs=0.29, global_batch_size=1, warmup_steps=0).max_steps == 29


@pytest.mark.parametrize("batch", [1, 4, 8, 16, 64])
def test_a_warm_up_that_is_over_is_no_longer_asked_about(make_run, batch: int) -> None:
    start = make_run(max_tokens=320 * T, warmup_steps=30)
    run = make_run(after(start, 38), warmup_steps=30, max_tokens=320 * T, global_batch_size=batch)
    assert run.max_steps == 38 + 16 // batch + (batch == 64)
    # one that still goes on must end
    with pytest.raises(InputError, match="warmup_steps 30 does not end within the run's 25 steps: lower it"):
        assert make_run(after(start, 20), warmup_steps=30, max_tokens=320 * T, global_batch_size=32).max_steps


BUDGETS = [{"max_tokens": 320 * T}, {"max_epochs": 3.2}, {"max_steps": 40}]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("batch", [2, 4, 16, 32])
def test_the_learning_rate_stays_on_its_curve_when_the_batch_changes(make_run, budget, batch: int) -> None:
    straight = make_run(**budget)
    done = after(straight, 21)  # 16 steps after the warm-up: at any of the batches whole steps
    run = make_run(done, **budget, global_batch_size=batch)
    slope = (straight.lr_at(20) - straight.lr_at(22)) / 2 * max(batch / 8, 1)
    assert run.lr_at(21) == pytest.approx(straight.lr_at(21), abs=slope)  # off by less than a step
    assert run.lr_at(run.max_steps - 1) == 0.1
    rates = [run.lr_at(step) for step in range(21, run.max_steps)]
    assert rates == sorted(rates, reverse=True)
    # any later checkpoint is on the same curve
    for later in range(run.steps_left + 1):
        resumed = replace(run, done=after(run, later))
        assert [resumed.lr_at(step) for step in range(21, run.max_steps)] == rates


def curve(run: Run) -> dict[int, float]:
    """The learning rate by the samples seen before a step, of the steps that are left."""
    batch, done = run.args.train.global_batch_size, run.done
    return {done.samples + i * batch: run.lr_at(done.step + i) for i in range(run.steps_left)}


# of 40 steps of 8 samples, the last 16 are wsd's decay, from step 23, which 184 samples precede; it ends after 312
DECAY_START, DECAY_END = 184, 312
ON_THE_LINE = {
    "tokens": {"max_tokens": 320 * T},
    "epochs": {"max_epochs": 3.2},
}


@pytest.mark.parametrize("budget", ON_THE_LINE)
@pytest.mark.parametrize("batch", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("at", [24, 28, 32, 36])
def test_a_decay_that_is_under_way_stays_on_its_line_when_the_batch_changes(make_run, budget, batch, at: int) -> None:
    straight = make_run(**ON_THE_LINE[budget], decay_steps=16)
    line = curve(straight)
    assert line[DECAY_START] == 1.0
    assert line[DECAY_END] == 0.1
    run = make_run(after(straight, at), **ON_THE_LINE[budget], decay_steps=16, global_batch_size=batch)
    # the last step is a larger or a smaller one, where the line ends
    rates = curve(run)
    assert len(rates) == (320 - at * 8) // batch
    assert rates[320 - batch] == 0.1
    steps = [one - other for one, other in itertools.pairwise(rates.values())]
    assert steps == pytest.approx([0.9 * batch / 128] * len(steps))  # the slope in samples is what it was
    assert rates[at * 8] == pytest.approx(line[at * 8], abs=0.9 * abs(batch - 8) / 128 + 1e-9)
    for later in range(run.steps_left + 1):
        resumed = replace(run, done=after(run, later))
        assert [resumed.lr_at(step) for step in range(at, run.max_steps)] == list(rates.values())
        # and of another change there
        again = make_run(after(run, later), **ON_THE_LINE[budget], decay_steps=16, global_batch_size=8)
        expected = {samples: 1 - 0.9 * (samples - DECAY_START) / 128 for samples in curve(again)}
        assert curve(again) == pytest.approx(expected, abs=0.9 * 8 / 128)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_decay_that_has_not_begun_has_its_steps_at_todays_batch(make_run, batch: int) -> None:
    straight = make_run(max_tokens=320 * T, decay_steps=16)
    rates = list(
        curve(make_run(after(straight, 20), max_tokens=320 * T, decay_steps=16, global_batch_size=batch)).values()
    )
    assert rates[-17:] == pytest.approx([1 - 0.9 * i / 16 for i in range(17)])
    assert set(rates[:-17]) == {1.0}


@pytest.mark.parametrize("batch", [16, 20])
def test_a_decay_that_would_have_begun_at_todays_batch_begins_now(make_run, batch: int) -> None:
    straight = make_run(max_tokens=320 * T, decay_steps=16, warmup_steps=1)
    done = after(straight, 20)  # 160 samples are left, and 16 steps would be more
    run = make_run(done, max_tokens=320 * T, decay_steps=16, global_batch_size=batch, warmup_steps=1)
    rates = list(curve(run).values())
    assert rates == pytest.approx([1 - 0.9 * i / (len(rates) - 1) for i in range(160 // batch)])
    for later in range(run.steps_left + 1):
        resumed = replace(run, done=after(run, later))
        assert [resumed.lr_at(step) for step in range(20, run.max_steps)] == rates


def test_a_schedule_without_a_decay_leaves_none_under_way(make_run) -> None:
    trunk = make_run(max_tokens=320 * T)
    assert after(trunk, 20).decay_batch == -1
    # 160 samples are left, which are fewer than 30 steps of the trunk's batch, and more than 30 of today's
    run = make_run(after(trunk, 20), max_tokens=320 * T, decay_steps=30, global_batch_size=4)
    assert list(curve(run).values()) == pytest.approx([1.0] * 9 + [1 - 0.9 * i / 30 for i in range(31)])


def test_no_decay_is_under_way_before_the_warm_up_ends(make_run) -> None:
    trunk = make_run(max_tokens=320 * T, decay_steps=9)
    # 144 samples are left, which are fewer than 24 steps of the trunk's batch, and more than 24 of today's
    run = make_run(after(trunk, 2), max_tokens=160 * T, decay_steps=24, global_batch_size=4)
    assert [run.lr_at(step) for step in range(2, 5)] == pytest.approx([0.6, 0.8, 1.0])
    rates = [run.lr_at(step) for step in range(5, 38)]
    assert rates == pytest.approx([1.0] * 8 + [1 - 0.9 * i / 24 for i in range(25)])
    for later in range(3, run.steps_left + 1):
        resumed = replace(run, done=after(run, later))
        assert [resumed.lr_at(step) for step in range(5, resumed.max_steps)] == rates


def test_a_decay_of_a_budget_in_steps_is_in_steps(make_run) -> None:
    straight = make_run(max_steps=40, decay_steps=16)
    run = make_run(after(straight, 30), max_steps=40, decay_steps=16, global_batch_size=32)
    assert [run.lr_at(step) for step in range(40)] == [straight.lr_at(step) for step in range(40)]


def test_a_decay_longer_than_the_run_is_refused_and_one_under_way_is_not(make_run) -> None:
    straight = make_run(max_tokens=320 * T, decay_steps=34)
    assert straight.lr_at(5) == 1.0
    run = make_run(after(straight, 20), max_tokens=320 * T, decay_steps=34, global_batch_size=32)
    assert run.max_steps == 25  # of which 34 are none
    assert run.lr_at(20) == pytest.approx(straight.lr_at(20), abs=0.9 * 24 / 272)
    for steps in (0, 4, 10):
        done = after(make_run(max_tokens=320 * T), steps)
        with pytest.raises(InputError, match=r"decay_steps 35 is more than the 34 steps between the run's warm-up and"):
            assert make_run(done, max_tokens=320 * T, decay_steps=35).max_steps


def test_an_older_checkpoint_in_a_decay_keeps_its_curve(make_run) -> None:
    straight = make_run(max_tokens=320 * T, decay_steps=16)
    done = replace(after(straight, 30), decay_batch=-1)
    run = make_run(done, max_tokens=320 * T, decay_steps=16)
    assert [run.lr_at(step) for step in range(41)] == [straight.lr_at(step) for step in range(41)]


def test_a_longer_budget_moves_the_decay_to_its_end(make_run) -> None:
    straight = make_run(max_tokens=320 * T, decay_steps=16)
    run = make_run(after(straight, 30), max_tokens=640 * T, decay_steps=16, global_batch_size=16)
    rates = list(curve(run).values())
    assert rates == pytest.approx([1.0] * (25 - 17) + [1 - 0.9 * i / 16 for i in range(17)])


def test_a_warm_up_is_in_steps_whatever_their_batch(make_run) -> None:
    straight = make_run(max_tokens=320 * T, warmup_steps=10)
    run = make_run(after(straight, 4), warmup_steps=10, max_tokens=320 * T, global_batch_size=16)
    assert [run.lr_at(step) for step in range(4, 10)] == [straight.lr_at(step) for step in range(4, 10)]
    assert run.max_steps == 4 + 18
    assert (run.lr_at(10), run.lr_at(21)) == (1.0, 0.1)
    resumed = replace(run, done=after(run, 8))
    assert [resumed.lr_at(step) for step in range(22)] == [run.lr_at(step) for step in range(22)]


@pytest.mark.parametrize("decay_steps", [None, 5, 12])
@pytest.mark.parametrize("budget", BUDGETS)
def test_an_interruption_never_changes_a_learning_rate(make_run, budget, decay_steps: int | None) -> None:
    """Whichever warm-up and batch a run has gone on with, at whichever step."""
    interrupted = 0
    for start, batch, before, warmup in itertools.product((3, 10), (8, 4, 12), (0, 2, 5, 10), (0, 2, 5, 10)):
        done = after(make_run(**budget, warmup_steps=before, decay_steps=decay_steps), start)
        settings = {**budget, "global_batch_size": batch, "warmup_steps": warmup, "decay_steps": decay_steps}
        run = make_run(done, **settings)
        rates = curve(run)
        for later in range(run.steps_left + 1):
            resumed = replace(run, done=after(run, later))
            again = replace(run, done=after(resumed, min(1, resumed.steps_left)))  # at the next step once more
            for at in (resumed, again):
                left = {samples: lr for samples, lr in rates.items() if samples >= at.done.samples}
                assert curve(at) == left, (settings, start, at.done)
            interrupted += 1
    assert interrupted > 2000


def test_a_warm_up_ends_where_todays_does(make_run) -> None:
    tokens = {"max_tokens": 320 * T}
    done = after(make_run(**tokens, warmup_steps=2), 10)
    assert done.warmup_samples == 16
    for warmup, ended in {5: 16, 10: 80, 12: 96, 20: -1}.items():
        assert after(make_run(done, **tokens, warmup_steps=warmup), 5).warmup_samples == ended
    # the decay then begins there
    assert make_run(done, **tokens, warmup_steps=10).lr_at(10) == 1.0
    # one that has been shortened to less than what is done has none: 3 steps of 8 samples, and then of 4
    done = after(make_run(**tokens, warmup_steps=10), 3)
    run = make_run(done, **tokens, warmup_steps=2, global_batch_size=4)
    assert [after(run, later).warmup_samples for later in (0, 1, 20)] == [16, 16, 16]


def test_a_decay_that_does_not_fit_after_a_longer_warm_up_is_refused_at_once(make_run) -> None:
    start = {"max_tokens": 325 * T - 3, "decay_steps": 12, "global_batch_size": 16}
    done = after(make_run(**start), 10)
    run = make_run(done, **start | {"global_batch_size": 4}, warmup_steps=10)
    with pytest.raises(InputError, match=r"decay_steps 12 is more than the 10 steps between the run's warm-up and"):
        assert run.max_steps


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_older_checkpoint_with_the_same_batch_keeps_its_curve(make_run, budget) -> None:
    straight = make_run(**budget)
    done = replace(after(straight, 20), warmup_samples=-1)  # which did not record the end of the warm-up
    assert [make_run(done, **budget).lr_at(step) for step in range(41)] == [straight.lr_at(step) for step in range(41)]


def test_more_tokens_than_can_be_counted_are_refused(make_run) -> None:
    assert make_run(max_steps=10**15).samples_left == 8 * 10**15
    with pytest.raises(
        InputError, match="steps make 8,000,000,000,000,000,000 tokens: lower train.global_batch_size or"
    ):
        start_from(None, make_run(max_steps=10**15, global_batch_size=1000))
