import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from tinyllama import InputError
from tinyllama.prepare.encode import Mismatch
from tinyllama.prepare.inputs import Input, NotFetched
from tinyllama.prepare.workers import NotSetUp, WorkerDied, cores, over_workers


@pytest.fixture
def over(tmp_path, monkeypatch):
    """``over_workers`` of inputs that are given by their name and what their worker does, the largest first."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "helpers"))
    from worker_setups import setup

    def run(inputs: dict[str, str], workers: int = 1):
        todo = [Input(path, name, len(inputs) - number) for number, (name, path) in enumerate(inputs.items())]
        todo.sort(key=lambda one: one.name)
        return over_workers(todo, setup, tmp_path, workers)

    return run


def begun(folder: Path) -> list[str]:
    return (folder / "begun").read_text().split()


def test_the_largest_is_first_and_one_process_is_set_up_once(over, tmp_path):
    done = [(one.name, outcome) for one, outcome in over(dict.fromkeys("bdac", "pack"))]
    assert done == [(name, f"packed {name}") for name in "bdac"]
    assert begun(tmp_path) == list("bdac")
    assert len(list(tmp_path.glob("process-*"))) == 1


def test_as_many_processes_as_workers_and_no_more_than_inputs(over, tmp_path):
    running = []
    for _, outcome in over(dict.fromkeys("ab", "meet 2"), workers=5):
        assert outcome != "alone"
        running.append(len(multiprocessing.active_children()))
    assert running == [2, 2]
    assert multiprocessing.active_children() == []
    assert len(list(tmp_path.glob("process-*"))) == 2


def test_each_input_gives_what_became_of_it(over, tmp_path):
    did = {"a": "refuse", "b": "differ", "c": "die once", "d": "ctrl-c", "e": "die"}
    outcomes = {one.name: outcome for one, outcome in over(did)}
    assert outcomes.keys() == did.keys()
    assert (type(outcomes["a"]), str(outcomes["a"])) == (InputError, "no text")
    assert (type(outcomes["b"]), str(outcomes["b"])) == (Mismatch, "differ: other ids")  # it did not know its path
    assert (outcomes["c"], outcomes["d"]) == ("packed c", "packed d")  # replaced; Ctrl-C is for the parent to answer
    assert isinstance(outcomes["e"], WorkerDied)
    assert str(outcomes["e"]).startswith("die: its worker died twice (exit code 7; -9: killed, perhaps for want of mem")
    assert begun(tmp_path) == ["a", "b", "c", "c", "d", "e", "e"]


def test_three_inputs_lost_and_none_done_is_no_hope(over, tmp_path):
    outcomes = []
    with pytest.raises(WorkerDied, match="^die: its worker died twice"):
        outcomes.extend(over(dict.fromkeys("abcde", "die")))
    assert [one.name for one, _ in outcomes] == ["a", "b"]
    assert begun(tmp_path) == ["a", "a", "b", "b", "c", "c"]
    assert multiprocessing.active_children() == []


def test_a_network_that_is_down_is_no_hope_either(over, tmp_path):
    outcomes = []
    with pytest.raises(NotFetched, match="^no network$"):
        outcomes.extend(over(dict.fromkeys("abcde", "no network")))
    assert [(one.name, type(outcome)) for one, outcome in outcomes] == [("a", NotFetched), ("b", NotFetched)]
    assert begun(tmp_path) == ["a", "b", "c"]
    did = {"a": "pack"} | dict.fromkeys("bcd", "no network") | {"e": "pack"}
    assert [type(outcome) for _, outcome in over(did)] == [str, NotFetched, NotFetched, NotFetched, str]


def test_where_one_was_done_the_others_are_all_tried(over, tmp_path):
    outcomes = [outcome for _, outcome in over({"a": "pack"} | dict.fromkeys("bcd", "die") | {"e": "pack"})]
    assert [type(outcome) for outcome in outcomes] == [str, WorkerDied, WorkerDied, WorkerDied, str]


def test_the_first_error_of_the_disk_ends_it(over, tmp_path):
    outcomes = []
    with pytest.raises(OSError, match="No space left on device: 'the output'"):
        outcomes.extend(over({"a": "pack", "b": "full", "c": "pack"}))
    assert [one.name for one, _ in outcomes] == ["a"]
    assert begun(tmp_path) == ["a", "b"]
    assert multiprocessing.active_children() == []


def test_a_worker_that_cannot_be_set_up_ends_it_and_blames_no_input(over, tmp_path):
    outcomes = []
    with pytest.raises(NotSetUp, match="^the tokenizer is gone$"):
        outcomes.extend(over({"a": "pack", "b": "die with the tokenizer", "c": "pack"}))
    assert [(one.name, outcome) for one, outcome in outcomes] == [("a", "packed a")]
    assert begun(tmp_path) == ["a", "b"]
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(sys.platform != "linux", reason="the cores of a process are Linux's")
def test_cores_are_those_this_process_may_use():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert cores() == len(allowed)
