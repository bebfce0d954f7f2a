import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tinyllama.checkpoint.state import TrainState
from tinyllama.config.args import TrainArgs
from tinyllama.train.anomaly import WINDOW, Guard
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
    return weight, optimizer, Guard(args, optimizer, state, copies=1, device=CPU)


def test_the_norm_and_the_loss_are_what_they_are() -> None:
    _, _, guard = training(TrainArgs(), TrainState())
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    norm = guard.check(1, torch.tensor(6.0), 4, gradients)
    assert norm == 5
    (verdict,) = guard.poll(late=0)
    assert (verdict.step, verdict.loss, verdict.grad_norm) == (1, 1.5, 5.0)
    assert (verdict.finite, verdict.skipped, verdict.ranks) == (True, False, [])
    clip(gradients, norm, max_norm=10.0)
    assert gradients[1].item() == 4
    clip(gradients, norm, max_norm=1.0)
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
