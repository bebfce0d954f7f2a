import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tinyllama.checkpoint.state import TrainState
from tinyllama.config.args import TrainArgs
from tinyllama.train.anomaly import WINDOW, Guard, StepResult
from tinyllama.train.optim import clip

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def world_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def training(args: TrainArgs, state: TrainState) -> tuple[torch.nn.Parameter, torch.optim.Optimizer, Guard]:
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    return weight, optimizer, Guard(args, optimizer, state, replicas=1, device=CPU)


def test_the_norm_and_the_loss_are_what_they_are() -> None:
    _, optimizer, guard = training(TrainArgs(), TrainState())
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    norm = guard.check(1, torch.tensor(6.0), 4, gradients)
    assert norm == 5
    (verdict,) = guard.poll(late=0)
    assert (verdict.step, verdict.loss, verdict.grad_norm) == (1, 1.5, 5.0)
    assert (verdict.finite, verdict.skipped, verdict.ranks) == (True, False, [])
    clip(optimizer, gradients, norm, max_norm=10.0)
    assert gradients[1].item() == 4
    clip(optimizer, gradients, norm, max_norm=1.0)
    assert gradients[0].tolist() == pytest.approx([0.6, 0.0])
    assert gradients[1].item() == pytest.approx(0.8)


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (1.0, math.inf), (1.0, math.nan), (-math.inf, 1.0)])
def test_what_is_not_finite_never_reaches_the_weights(loss: float, gradient: float) -> None:
    state = TrainState()
    weight, optimizer, guard = training(TrainArgs(), state)
    weight.grad = torch.ones(3)
    for number, (one_loss, one) in enumerate(((1.0, 1.0), (loss, gradient), (1.0, 1.0)), 1):
        before = [weight.detach().clone(), *(t.clone() for t in optimizer.state[weight].values())]
        weight.grad = torch.tensor([1.0, one, 1.0])
        guard.check(number, torch.tensor(one_loss), 1, [weight.grad])
        optimizer.step()
        after = [weight.detach(), *optimizer.state[weight].values()]
        if number > 1:
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == (number == 2)
    # one step late, and the last only when asked to wait
    assert [verdict.skipped for verdict in guard.poll()] == [False, True]
    assert state.skipped_in_a_row == 1
    assert [verdict.finite for verdict in guard.poll(late=0)] == [True]
    assert (state.skipped, state.skipped_in_a_row) == (1, 0)
    assert optimizer.state[weight]["step"] == 2


def run(guard: Guard, losses: list[float], first: int = 0) -> list[bool]:
    for number, loss in enumerate(losses, first + 1):
        guard.check(number, torch.tensor(loss), 1, [torch.ones(1)])
    return [verdict.skipped for verdict in guard.poll(late=0)]


def test_a_spike_is_skipped_and_forgotten() -> None:
    usual = [3.0 + 0.01 * math.sin(i) for i in range(WINDOW)]
    _, _, guard = training(TrainArgs(skip_spikes=6.0), TrainState())
    assert run(guard, usual[:-1] + [9.0]) == [False] * WINDOW  # not enough seen yet
    _, _, guard = training(TrainArgs(skip_spikes=6.0), TrainState())
    assert run(guard, [*usual, 3.2, 2.0, 3.2, 3.01]) == [False] * WINDOW + [True, False, False, False]
    _, _, guard = training(TrainArgs(), TrainState())
    assert not any(run(guard, [*usual, 1e9]))


def test_a_restart_judges_as_the_straight_run() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = (3 + 0.1 * torch.randn(400, generator=generator)).tolist()
    args = TrainArgs(skip_spikes=2.0)
    straight = run(training(args, TrainState())[2], losses)
    state = TrainState()
    verdicts = run(training(args, state)[2], losses[:300])
    state = TrainState(recent=list(state.recent), skipped=state.skipped)
    verdicts += run(training(args, state)[2], losses[300:], first=300)
    assert verdicts == straight
    assert 1 <= sum(straight) < 40
    assert state.skipped == sum(straight)
    assert len(state.recent) == WINDOW


def test_what_was_usual_before_it_was_switched_off_says_nothing_when_it_is_on_again() -> None:
    state = TrainState()
    assert not any(run(training(TrainArgs(skip_spikes=2.0), state)[2], [9.0, 9.1] * 100))
    assert not any(run(training(TrainArgs(), state)[2], [0.9, 1.1] * 5))
    assert state.recent == []
    losses = [1.0, 1.1] * 64 + [2.0]
    assert run(training(TrainArgs(skip_spikes=2.0), state)[2], losses) == [False] * 128 + [True]


def test_the_norm_is_that_of_one_copy_of_the_gradients() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    guard = Guard(TrainArgs(), optimizer, TrainState(), replicas=4, device=CPU)
    # as of four ranks that each hold [3, 4] and report the sum of their squares: 100 in all, 25 of one copy
    assert guard.check(1, torch.tensor(1.0), 1, [torch.tensor([6.0, 8.0])]) == 5


@pytest.mark.parametrize(("loss", "gradient"), [(math.nan, 1.0), (1.0, math.inf)])
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_verdict_says_who_and_whether_the_run_must_stop(loss: float, gradient: float, on_nonfinite: str) -> None:
    state = TrainState()
    _, _, guard = training(TrainArgs(on_nonfinite=on_nonfinite, max_skips=2), state)
    for step in range(1, 6):
        bad = step != 2
        guard.check(step, torch.tensor(loss if bad else 1.0), 1, [torch.tensor([gradient if bad else 1.0])])
    verdicts = guard.poll(late=0)
    assert [verdict.step for verdict in verdicts] == [1, 2, 3, 4, 5]
    assert [verdict.finite for verdict in verdicts] == [False, True, False, False, False]
    assert [verdict.skipped for verdict in verdicts] == [True, False, True, True, True]
    assert [verdict.ranks for verdict in verdicts] == [[0], [], [0], [0], [0]]
    # with skip, two in a row are borne and the third is one too many
    expected = [True, False, True, True, True] if on_nonfinite == "stop" else [False, False, False, False, True]
    assert [verdict.fatal for verdict in verdicts] == expected
    assert (state.skipped, state.skipped_in_a_row) == (4, 3)


def test_a_verdict_read_late_names_the_samples_of_its_own_step() -> None:
    state = TrainState(step=100, samples=2000)  # more of them than steps x batch: an earlier start had other batches
    _, _, guard = training(TrainArgs(global_batch_size=8), state)
    found = []
    for step in range(101, 107):
        state.step, state.samples = step, state.samples + 8
        guard.check(step, torch.tensor(1.0), 1, [torch.ones(1)])
        found += guard.poll(late=3)
        assert len(found) == max(step - 103, 0)
    found += guard.poll(late=0)
    assert [(verdict.step, verdict.samples) for verdict in found] == [
        (101 + i, (2000 + 8 * i, 2007 + 8 * i)) for i in range(6)
    ]


def judged(guard: Guard, pairs: list[tuple[float, float]]) -> list[bool]:
    """Whether steps of these losses and gradient norms are skipped."""
    for number, (loss, norm) in enumerate(pairs, 1):
        guard.check(number, torch.tensor(loss), 1, [torch.tensor([norm])])
    return [verdict.skipped for verdict in guard.poll(late=0)]


@pytest.mark.parametrize("which", ["loss", "norm"])
def test_a_spike_is_so_many_deviations_above_the_mean_of_128_steps(which: str) -> None:
    usual = [2.0 + 0.1 * math.cos(3 * i) for i in range(130)]
    deviations = [value - sum(usual[2:]) / 128 for value in usual[2:]]
    limit = sum(usual[2:]) / 128 + 4 * math.sqrt(sum(d * d for d in deviations) / 127)

    def last(value: float, seen: list[float] = usual) -> bool:
        _, _, guard = training(TrainArgs(skip_spikes=4.0), TrainState())
        pairs = [(one, 5.0 + 0.1 * math.sin(i)) for i, one in enumerate([*seen, value])]
        *before, skipped = judged(guard, [pair if which == "loss" else pair[::-1] for pair in pairs])
        assert not any(before)
        return skipped

    assert [last(limit - 0.0005), last(limit + 0.0005)] == [False, True]
    assert not last(0.5)  # far below is no spike
    assert not last(9.0, usual[:127])
    assert last(9.0, usual[:128])


def test_what_was_skipped_does_not_count_as_usual() -> None:
    usual = [(3.0 + 0.01 * math.sin(i), 1.0 + 0.01 * math.cos(i)) for i in range(WINDOW)]
    state = TrainState()
    _, _, guard = training(TrainArgs(skip_spikes=6.0, on_nonfinite="skip"), state)
    odd = [(9.0, 1.0), (math.nan, 1.0), (3.0, math.inf), (3.2, 1.0), (3.0, 1.2), (3.0, 1.0)]
    assert judged(guard, usual + odd) == [False] * WINDOW + [True] * 5 + [False]
    assert len(state.recent) == 128
    expected = [*usual[1:], (3.0, 1.0)]
    assert [loss for loss, _ in state.recent] == pytest.approx([loss for loss, _ in expected])
    assert [norm for _, norm in state.recent] == pytest.approx([norm for _, norm in expected])


def test_a_restart_before_the_window_is_full_goes_on_filling_it() -> None:
    usual = [(3.0 + 0.01 * math.sin(i), 1.0) for i in range(WINDOW)]
    for before in (1, 100):
        state = TrainState()
        judged(training(TrainArgs(skip_spikes=6.0), state)[2], usual[:before])
        assert len(state.recent) == before
        guard = training(TrainArgs(skip_spikes=6.0), state)[2]
        assert not judged(guard, [*usual[before:-1], (9.0, 1.0)])[-1]
        state = TrainState(recent=[list(pair) for pair in usual[:before]])
        guard = training(TrainArgs(skip_spikes=6.0), state)[2]
        assert judged(guard, [*usual[before:], (9.0, 1.0)])[-1]


def test_the_cause_of_a_skip_names_the_ranks() -> None:
    def cause(finite: bool, ranks: list[int]) -> str:
        return StepResult(1, (0, 7), 2.5, 1.0, finite=finite, skipped=True, fatal=False, ranks=ranks).cause

    assert cause(True, []) == "a spike"
    assert cause(False, [3]) == "not finite on rank 3"
    assert cause(False, [0, 1]) == "not finite on ranks 0 and 1"
    assert cause(False, [0, 2, 5]) == "not finite on ranks 0, 2 and 5"
    assert cause(False, []) == "not finite in the sum over the ranks"  # of which each is large
