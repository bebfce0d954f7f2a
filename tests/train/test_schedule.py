import math

import pytest

from tinyllama.train.schedule import lr_at

RUN = {"lr": 4e-4, "min_lr": 4e-5, "warmup_steps": 2000, "max_steps": 1_430_512}


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
    assert lr_at(step, **RUN) == pytest.approx(expected, rel=1e-6)


def test_it_is_the_cosine_between_the_landmarks() -> None:
    quarter = lr_at(2000 + 250, lr=1.0, min_lr=0.0, warmup_steps=2000, max_steps=3001)
    assert quarter == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_without_warmup_it_starts_at_the_top() -> None:
    assert [lr_at(s, lr=1.0, min_lr=0.5, warmup_steps=0, max_steps=3) for s in range(3)] == [1.0, 0.75, 0.5]


def test_the_shortest_run_ends_at_min_lr() -> None:
    assert [lr_at(s, lr=1.0, min_lr=0.1, warmup_steps=1, max_steps=2) for s in range(2)] == [1.0, 0.1]


def test_a_warm_up_is_linear() -> None:
    rates = [lr_at(step, lr=1.0, min_lr=0.9, warmup_steps=4, max_steps=6) for step in range(7)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.9, 0.9])
