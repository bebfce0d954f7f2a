"""The watch over a run: real processes that sleep, are stopped or hold the interpreter's lock."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from processes import Process

from tinyllama import InputError
from tinyllama.monitor import watchdog
from tinyllama.monitor.watchdog import Watchdog

# the ranks of a world are forked, so that torch is imported once
PREAMBLE = """
import ctypes, os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from tinyllama.monitor.watchdog import Watchdog
from tinyllama.train.collectives import set_timeout

world_size, folder = int(sys.argv[1]), Path(sys.argv[2])
pids = []
for rank in range(world_size):
    pids.append(os.fork())
    if pids[-1] == 0:
        break
else:
    print(*pids, flush=True)
    codes = {}
    while len(codes) < world_size:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        print("gone", pids.index(pid), flush=True)
    print(*[codes[pid] for pid in pids])
    sys.exit()

def watch(timeout):
    return Watchdog(folder, rank=rank, world_size=world_size, first_timeout=60, timeout=timeout)

def connect():
    store = f"file://{folder / 'store'}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=100)
    )

def lost_in_thought():
    time.sleep(1000)

def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(1000)
"""
HOST = os.uname().nodename


class World:
    """Ranks that run the same code in a process each."""

    def __init__(self, script: Path, code: str, size: int) -> None:
        script.write_text(PREAMBLE + code)
        self.process = Process(sys.executable, script, size, script.parent, warm=0)
        self.pids = [int(word) for word in self.line().split()]

    def line(self) -> str:
        """The next line of any rank's stdout."""
        return self.process.line()

    def end(self) -> tuple[list[int], str]:
        """Exit codes, and what was said on stderr, once all ranks are gone."""
        _, said, errors = self.process.end()
        return [int(word) for word in said.splitlines()[-1].split()], errors


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str, int], World]]:
    worlds: list[World] = []

    def run(code: str, size: int) -> World:
        worlds.append(World(tmp_path / "loop.py", code, size))
        return worlds[-1]

    yield run
    for world in worlds:
        world.process.kill()


def heartbeat(out_dir: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((out_dir / "heartbeat" / f"rank-{rank:05d}.json").read_text())


def diagnoses(said: str) -> list[str]:
    """The lines that name somebody."""
    return [line for line in said.splitlines() if line.startswith("watchdog: ") and "no progress" not in line]


def test_a_sleeping_rank_is_named_while_the_other_waits_in_a_collective(start, tmp_path: Path) -> None:
    code = """
connect()
with watch(timeout=5) as watchdog:
    for step in range(5):
        watchdog.beat(step, "step")
        if step == 3 and rank == 1:
            print(time.monotonic(), flush=True)
            lost_in_thought()
        dist.all_reduce(torch.ones(1))
"""
    world = start(code, 2)
    since = float(world.line())
    codes, said = world.end()
    assert time.monotonic() - since > 5
    assert codes == [1, 1]
    (line,) = diagnoses(said)
    assert line.startswith(f"watchdog: did not arrive: rank 1 ({HOST}, pid {world.pids[1]}; step after step 3, in ")
    assert f"{tmp_path.name}/loop.py:" in line
    assert line.endswith(" lost_in_thought)")
    assert "watchdog: rank 0: no progress for 5 s, step after step 3" in said
    for rank, place, waiting in ((0, "in all_reduce", True), (1, "in lost_in_thought", False)):
        assert place in said
        assert place in (tmp_path / "heartbeat" / f"rank-0000{rank}.stacks.txt").read_text()
        assert heartbeat(tmp_path, rank)["waiting"] is waiting


def test_ranks_that_cannot_speak_are_named_by_one_that_can(start, tmp_path: Path) -> None:
    code = """
with watch(timeout=2) as watchdog:
    for step in range(3):
        watchdog.beat(step, "step")
        time.sleep(0.4)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        lost_in_thought()  # else, woken up, it could leave the loop before its watch looks at the clock
    elif rank == 1:
        hold_the_interpreter()
    else:
        lost_in_thought()
"""
    world = start(code, 3)
    stopped, held, _ = world.pids
    assert {world.line(), world.line()} == {"gone 1\n", "gone 2\n"}
    os.kill(stopped, signal.SIGCONT)  # a rank that wakes up when the others are gone goes too
    (woken, *codes), said = world.end()
    assert codes == [1, 1]
    # its timer in C, long over, prints the stacks at once, of threads that run again: Python 3.11 may crash at that
    assert woken in (1, -signal.SIGSEGV)
    (line,) = diagnoses(said)
    assert line.startswith(f"watchdog: dead, stopped or stuck in C code: rank 0 ({HOST}, pid {stopped}; step after")
    assert f", rank 1 ({HOST}, pid {held}; step after step 2), silent for " in line
    assert "rank 2" not in line
    assert (tmp_path / "heartbeat" / "verdict.txt").read_text() == f"{line.removeprefix('watchdog: ')}\n"
    assert "in hold_the_interpreter" in said[said.index("Timeout (") :]


def test_alarm_only_for_a_pause_in_a_later_step_and_every_heartbeat_is_whole(start, tmp_path: Path) -> None:
    code = """
with watch(timeout=2) as watchdog:
    watchdog.beat(7, "step")
    time.sleep(2.5)  # the first step compiles
    for i in range(13):
        watchdog.beat(8, "step")
        time.sleep(0.2)
    for phase in ("validation", "checkpoint"):
        watchdog.beat(8, phase)
        time.sleep(2.5)
    watchdog.beat(9, "step")
    time.sleep(60)
"""
    world = start(code, 1)
    phases = []
    while world.process.popen.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # before the first one
            phases.append(heartbeat(tmp_path)["phase"])
    codes, said = world.end()
    assert codes == [1]
    assert [phase for phase in dict.fromkeys(phases) if phase != "start"] == ["step", "validation", "checkpoint"]
    (line,) = diagnoses(said)
    assert line.startswith(f"watchdog: did not arrive: rank 0 ({HOST}, pid {world.pids[0]}; step after step 9, in ")
    last = heartbeat(tmp_path)
    assert (last["step"], last["beats"], last["pid"]) == (9, 17, world.pids[0])
    assert last["seconds_since_beat"] > 2


def test_set_timeout_reaches_every_group_but_those_kept(start) -> None:
    code = """
connect()
short, kept = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
for group in (None, short, kept):
    dist.all_reduce(torch.ones(1), group=group)
set_timeout(1, keep=[kept])
if rank == 1:
    time.sleep(2)
    dist.all_reduce(torch.ones(1), group=kept)
    lost_in_thought()
for group in (kept, short, None):
    begin = time.monotonic()
    try:
        dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        print(f"{time.monotonic() - begin:.1f} {error}", flush=True)
    else:
        print("arrived", flush=True)
"""
    world = start(code, 2)
    kept, *failed = [world.line() for _ in range(3)]
    assert kept == "arrived\n"
    for line in failed:
        assert 0.9 < float(line.split()[0]) < 3
        assert "Timed out" in line


def test_files_of_an_earlier_world_go_and_a_failed_loop_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeat"
    folder.mkdir()
    old = [
        "verdict.txt",
        "rank-00000.stacks.txt",
        "nccl_rank_0",
        "rank-00001.json",
        "rank-00002.json",
        "nccl_rank_12",
        "notes.txt",
    ]
    for name in old:
        (folder / name).touch()

    def loop() -> None:
        with Watchdog(tmp_path, rank=0, world_size=2, first_timeout=60, timeout=60) as watch:
            watch.beat(4, "step")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        loop()
    assert {path.name for path in folder.iterdir()} == {"rank-00000.json", "rank-00001.json", "notes.txt"}
    assert (heartbeat(tmp_path)["phase"], heartbeat(tmp_path)["step"]) == ("failed", 4)


@pytest.mark.parametrize("name", ["heartbeat", "heartbeat/rank-00000.json"])
def test_what_is_in_the_way_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "heartbeat":
        path.touch()
    else:
        path.mkdir(parents=True)
    with pytest.raises(InputError, match=rf"^cannot write or remove {path} \(.*\): move it away$"):
        Watchdog(tmp_path, rank=0, world_size=1, first_timeout=60, timeout=60).__enter__()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({1: {"beats": 8}, 2: {"waiting": False}}, "did not arrive: rank 1 (node, pid 101; step after step 5, in x)"),
        ({2: {"waiting": False}}, "did not arrive: rank 2 (node, pid 102; step after step 5, in x)"),
        ({}, "all 3 ranks arrived at the same place: rank 0 (node, pid 100; step after step 5, in x)"),
        (
            {0: {"beats": 8}, 2: {"time": -40, "stalled_at": None}},
            "dead, stopped or stuck in C code: rank 2 (node, pid 102; step after step 5), silent for 40 s",
        ),
        (
            {1: {"phase": "failed"}, 2: None},
            "dead, stopped or stuck in C code: rank 2 (never started), "
            "rank 1 (node, pid 101; failed after step 5, in x), silent for 2 s",
        ),
        ({1: {"beats": 8}, 2: {"time": -25}}, "did not arrive: rank 1 (node, pid 101; step after step 5, in x)"),
        (
            {0: {"waiting": False}, 2: {"waiting": False}},
            "did not arrive: rank 0 (node, pid 100; step after step 5, in x), rank 2 (node, pid 102; step after",
        ),
        (
            {0: {"time": -35}, 1: {"time": -100, "beats": 8}, 2: {"beats": 7}},
            "dead, stopped or stuck in C code: rank 0 (node, pid 100; step after step 5, in x), silent for 35 s, "
            "rank 1 (node, pid 101; step after step 5, in x), silent for 100 s",
        ),
        ({2: {"phase": "end", "time": -40, "beats": 12}, 1: {"beats": 8}}, "did not arrive: rank 1 (node, pid 101; "),
    ],
)
def test_diagnosis(changes: dict[int, dict[str, Any] | None], said: str, tmp_path: Path) -> None:
    for rank in range(3):
        change = changes.get(rank, {})
        if change is None:
            continue
        facts = {"rank": rank, "host": "node", "pid": 100 + rank, "step": 5, "phase": "step", "beats": 9}
        facts |= {"seconds_since_beat": 60.0, "time": -2, "stalled_at": "x", "waiting": True, **change}
        facts["time"] = (datetime.now(UTC) + timedelta(seconds=facts["time"])).isoformat()
        (tmp_path / f"rank-{rank:05d}.json").write_text(json.dumps(facts))
    assert watchdog.diagnosis(tmp_path, 3, limit=60).startswith(said)


@pytest.mark.parametrize(
    ("beats", "limit", "where"),
    [
        ([], "first", "start after step 0"),
        ([(0, "start"), (0, "step")], "first", "step after step 0"),
        ([(7, "step")], "first", "step after step 7"),
        ([(7, "step"), (7, "step")], "first", "step after step 7"),
        ([(7, "step"), (8, "step")], "later", "step after step 8"),
        ([(0, "validation"), (1, "step")], "first", "step after step 1"),
        ([(7, "step"), (9, "validation")], "first", "validation after step 9"),
        ([(7, "step"), (9, "checkpoint")], "first", "checkpoint after step 9"),
        ([(7, "step"), (9, "checkpoint"), (9, "step")], "later", "step after step 9"),
    ],
)
def test_each_phase_has_its_limit(
    beats: list[tuple[int, Any]], limit: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up: list[tuple[float, str]] = []

    def give_up(watch: Watchdog, seconds: float, place: str) -> None:
        given_up.append((seconds, place))
        watch._ended.set()  # as the process would

    monkeypatch.setattr(Watchdog, "_give_up", give_up)
    times = {"first_timeout": 0.1, "timeout": 900.0} if limit == "first" else {"first_timeout": 900.0, "timeout": 0.1}
    watch = Watchdog(tmp_path, rank=0, world_size=1, **times)
    watch._interval, watch._grace = 0.01, 900.0
    with monkeypatch.context() as clock:
        now = time.monotonic()
        clock.setattr(watchdog.time, "monotonic", lambda: now)  # until all beats are given
        watch.__enter__()
        for step, phase in beats:
            watch.beat(step, phase)
    watch._watcher.join(60)
    watch.__exit__(None, None, None)
    assert given_up == [(0.1, where)]


def test_a_loop_that_has_ended_is_watched_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = []
    cancel = watchdog.faulthandler.cancel_dump_traceback_later
    monkeypatch.setattr(
        watchdog.faulthandler, "cancel_dump_traceback_later", lambda: cancelled.append(not watch._watcher.is_alive())
    )
    try:
        with Watchdog(tmp_path, rank=0, world_size=1, first_timeout=600, timeout=600) as watch:
            watch.beat(3, "step")
            watch.beat(4, "step")
            assert watch._watcher.is_alive()
    finally:
        cancel()
    assert cancelled == [True]  # once nothing starts it again
    assert not watch._writer.is_alive()
    said = watchdog.read(tmp_path / "heartbeat", 2)
    (last,) = said  # of rank 1 there is none
    assert (last.rank, last.host, last.pid) == (0, HOST, os.getpid())
    assert (last.step, last.phase, last.beats, last.stalled_at, last.waiting) == (4, "end", 2, None, False)
    assert 0 <= last.age() < 600


def test_of_many_ranks_to_look_at_the_first_eight_are_named(tmp_path: Path) -> None:
    never = ", ".join(f"rank {rank} (never started)" for rank in range(8))
    assert watchdog.diagnosis(tmp_path, 8, limit=60) == f"dead, stopped or stuck in C code: {never}"
    assert watchdog.diagnosis(tmp_path, 11, limit=60) == f"dead, stopped or stuck in C code: {never} and 3 more"


# a rank that watches until its folder is gone
ALONE = """
import sys, time
from pathlib import Path
from tinyllama.monitor.watchdog import Watchdog
with Watchdog(Path(sys.argv[1]), rank=3, world_size=4, first_timeout=600, timeout=0.5):
    print("watches", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("replaced", [False, True])
def test_every_rank_notices_that_its_folder_is_gone(replaced: bool, tmp_path: Path) -> None:
    out_dir = tmp_path / "run"
    process = Process(sys.executable, "-c", ALONE, out_dir, warm=0)
    assert process.line() == "watches\n"
    (tmp_path / "new").mkdir()
    out_dir.rename(tmp_path / "moved")
    if replaced:
        (tmp_path / "new").rename(out_dir)
    code, _, said = process.end()
    assert (code, said) == (1, f"error: {out_dir} was unmounted or replaced: mount it, and start this run again\n")
    assert out_dir.exists() is replaced
    assert not replaced or list(out_dir.iterdir()) == []


def test_a_damaged_heartbeat_is_none(tmp_path: Path) -> None:
    for rank, content in enumerate((b"", b"{", b"[1]", b"3", b"\xff", b'{"rank": 5, "more": 1}')):
        (tmp_path / f"rank-{rank:05d}.json").write_bytes(content)
    (tmp_path / "rank-00006.json").mkdir()
    assert watchdog.read(tmp_path, 8) == []
    assert watchdog.diagnosis(tmp_path, 1, limit=60) == "dead, stopped or stuck in C code: rank 0 (never started)"


def test_a_stall_is_told_before_the_process_ends(start, tmp_path: Path) -> None:
    code = """
told = Path(folder) / "told"
with watch(timeout=1) as watchdog:
    watchdog.on_stall = told.write_text
    for step in range(2):
        watchdog.beat(step, "step")
    lost_in_thought()
"""
    codes, said = start(code, 1).end()
    assert codes == [1]
    (diagnosis,) = diagnoses(said)
    assert f"watchdog: {(tmp_path / 'told').read_text()}" == diagnosis
