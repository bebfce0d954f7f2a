"""The stop that ranks agree on: every signal, a clock that runs out, and the other reasons; alone, in this process."""

import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.accelerators.mps import MPSAccelerator

from tinyllama.config.args import ParallelArgs, TrainArgs
from tinyllama.train import preemption
from tinyllama.train.launch import World
from tinyllama.train.parallel import build_fabric
from tinyllama.train.preemption import Preemption

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")


@pytest.fixture(autouse=True)
def world_of_one(tmp_path: Path) -> Iterator[None]:
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


class Clock:
    """Stands in for time.monotonic in preemption.py."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(preemption.time, "monotonic", lambda: self.now)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_requests_a_stop_by_its_name(name: str) -> None:
    preemption = Preemption()
    assert preemption.agreed_reason() is None
    os.kill(os.getpid(), getattr(signal, name))
    assert preemption.agreed_reason() == name
    assert preemption.agreed_reason() == name


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_while_the_ranks_agree_is_not_lost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    preemption, reduce = Preemption(), dist.all_reduce

    def interrupted(*args: Any, **how: Any) -> None:
        reduce(*args, **how)
        os.kill(os.getpid(), getattr(signal, name))

    with monkeypatch.context() as patch:
        patch.setattr(dist, "all_reduce", interrupted)
        assert preemption.agreed_reason() is None
    assert preemption.agreed_reason() == name


def test_one_press_of_ctrl_c_may_come_twice_and_a_second_press_stops_at_once(monkeypatch, capfd) -> None:
    preemption, clock = Preemption(), Clock(monkeypatch)
    for clock.now in (1000.0, 1000.001, 1001.9):  # the terminal's to every process, and what a launcher hands on
        os.kill(os.getpid(), signal.SIGINT)
    assert preemption.agreed_reason() == "SIGINT"
    clock.now = 1002.1
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    said = "interrupted: the run saves after this step and stops; Ctrl-C again stops it at once\n"
    assert capfd.readouterr().err == said  # once


def test_only_the_first_rank_tells_of_ctrl_c(monkeypatch, capfd) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    preemption = Preemption()
    os.kill(os.getpid(), signal.SIGINT)
    assert preemption.agreed_reason() == "SIGINT"
    assert capfd.readouterr().err == ""


def test_time_runs_out_after_max_time(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    preemption, without = Preemption(max_time=50), Preemption()
    clock.now = 1049.0
    assert preemption.agreed_reason() is None
    clock.now = 1051.0
    assert preemption.agreed_reason() == "train.max_time"
    clock.now = 1e12
    assert without.agreed_reason() is None


def test_a_reason_does_not_hide_the_signal_before_it(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    preemption = Preemption(max_time=50)
    preemption.request(Preemption.FAILED_SAVE)
    clock.now = 2000.0
    assert preemption.agreed_reason() == "checkpoint.on_failure"
    preemption = Preemption(max_time=50)
    os.kill(os.getpid(), signal.SIGUSR2)
    preemption.request(Preemption.FAILED_SAVE)
    clock.now = 3000.0
    assert preemption.agreed_reason() == "SIGUSR2"


def test_a_run_computes_on_the_cpu_where_lightning_would_take_apples_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    fabric = build_fabric(World(nodes=1, local_ranks=1, shard=1), ParallelArgs(devices=1), TrainArgs())
    assert fabric.device == torch.device("cpu")


def test_until_the_run_is_steady_collectives_may_take_as_long_as_a_start() -> None:
    train = TrainArgs(start_timeout=77, timeout=5)
    fabric = build_fabric(World(nodes=1, local_ranks=1, shard=1), ParallelArgs(devices=1), train)
    assert fabric.strategy._timeout == timedelta(seconds=77)


@pytest.mark.parametrize(
    ("inherited", "by"), [(signal.default_int_handler, "SIGINT"), (signal.SIG_IGN, None)], ids=["answered", "ignored"]
)
def test_ctrl_c_that_a_script_has_turned_off_stays_off(inherited: Any, by: str | None) -> None:
    signal.signal(signal.SIGINT, inherited)
    preemption = Preemption()
    os.kill(os.getpid(), signal.SIGINT)
    assert preemption.agreed_reason() == by
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.agreed_reason() == "SIGTERM"
