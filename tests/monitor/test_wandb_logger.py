"""wandb's history of a run: offline files as wandb itself writes them."""

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tinyllama.checkpoint import reader
from tinyllama.checkpoint.state import TrainState
from tinyllama.config.args import DataArgs, LogArgs, OptimArgs, PretrainArgs, Source, TrainArgs
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import open_packed
from tinyllama.monitor import wandb_logger
from tinyllama.monitor.metrics import RunLog
from tinyllama.train.launch import World
from tinyllama.train.run import Run

BLOCK = 32768  # of LevelDB's log format, in which wandb keeps a run


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take longer than a run would wait."""
    monkeypatch.setattr(wandb_logger, "INIT_TIMEOUT", 300)
    monkeypatch.setattr(wandb_logger, "FINISH_TIMEOUT", 300)


def history(out_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of every record in the offline runs below ``out_dir``, in order, by run id."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(out_dir.glob("wandb/offline-run-*/*.wandb")):
        found.setdefault(run_id := file.stem.removeprefix("run-"), [])
        data, at, payload = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if BLOCK - at % BLOCK < 7:  # no header fits: padding
                at += BLOCK - at % BLOCK
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            payload += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind not in (1, 4):  # full, or the last of several
                continue
            record, payload = Record.FromString(payload), b""
            if record.WhichOneof("record_type") == "history":
                items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found[run_id].append((items["_step"], items["loss"]))
    return found


def settled(out_dir: Path, steps: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The history of the one run there is, when it is ``steps``, or what it is after a minute.

    wandb's finish() may return while its own process still writes.
    """
    deadline = time.monotonic() + 300
    while True:
        (found,) = history(out_dir).values()
        if found == steps or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


@pytest.fixture
def run(packed_folder: Any, tmp_path: Path) -> Run:
    folder = packed_folder([[list(range(100))]])
    args = PretrainArgs(
        out_dir=str(tmp_path / "out"),
        data=DataArgs(sources=[Source(str(folder))]),
        optim=OptimArgs(warmup_steps=0),
        train=TrainArgs(max_steps=9),
        log=LogArgs(wandb="offline"),
    )
    return Run(
        args,
        args.model.resolve(),
        World(1, 1, 1),
        [open_packed(folder)],
        [],
        Mixture([1], [1.0], 0, ["x"]),
        1,
        {},
        None,
    )


def log_steps(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.row({"step": step, "tokens": 8 * step, "loss": 10.0 - step})


def test_three_interruptions_leave_one_history(run: Run) -> None:
    pytest.importorskip("wandb")
    ids = set()
    # killed after step 5, 3 and 7; gone on from the checkpoints of steps 2, 2 and 6
    for after, last in ((None, 5), (2, 3), (2, 7), (6, 9)):
        with RunLog(run, after, is_rank_zero=True) as log:
            log_steps(log, (after or 0) + 1, last)
            ids.add(log.metadata()["wandb_id"])
    expected = [(step, 10.0 - step) for step in range(1, 9)]  # 9 may still get a value
    assert settled(run.out_dir, expected) == expected
    assert set(history(run.out_dir)) == ids
    with RunLog(run, 9, is_rank_zero=True) as log:
        log.row({"step": 10, "tokens": 80, "loss": 0.0})
    expected.append((9, 1.0))
    assert settled(run.out_dir, expected) == expected


def test_steps_that_are_done_again_with_other_settings_are_another_run(run: Run) -> None:
    pytest.importorskip("wandb")
    ids = []
    for lr, after, last in ((1e-4, None, 5), (1e-3, 2, 4)):
        optim = dataclasses.replace(run.args.optim, lr=lr)
        with RunLog(dataclasses.replace(run, args=dataclasses.replace(run.args, optim=optim)), after, True) as log:
            log_steps(log, (after or 0) + 1, last)
            ids.append(log.metadata()["wandb_id"])
    expected = {ids[0]: [(step, 10.0 - step) for step in (1, 2, 3, 4)], ids[1]: [(3, 7.0)]}
    deadline = time.monotonic() + 300
    while (found := history(run.out_dir)) != expected and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == expected


def test_what_was_logged_without_wandb_is_sent_later(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    with monkeypatch.context() as broken:
        broken.setitem(sys.modules, "wandb", None)
        log_steps(RunLog(run, None, is_rank_zero=True), 1, 4)
    with RunLog(run, 4, is_rank_zero=True) as log:
        log_steps(log, 5, 6)
    expected = [(step, 10.0 - step) for step in range(1, 6)]
    assert settled(run.out_dir, expected) == expected


def fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("the network is down\nand more lines")


@pytest.mark.parametrize(
    "wandb",
    [
        None,
        SimpleNamespace(),
        SimpleNamespace(init=fail, Settings=dict),
        SimpleNamespace(init=lambda **settings: SimpleNamespace(log=fail, finish=fail), Settings=dict),
    ],
)
def test_a_failing_wandb_stops_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wandb: Any
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with RunLog(run, None, is_rank_zero=True) as log:
        log_steps(log, 1, 5)
        said = capsys.readouterr().out
        log.end(TrainState(step=5, tokens=5), "SIGTERM")
    assert len((run.out_dir / "metrics.csv").read_text().splitlines()) == 6
    assert said.count("wandb is off from here, metrics.csv continues: ") == 1
    assert "problem  wandb is off from here, metrics.csv continues: " in capsys.readouterr().out


def test_a_missing_key_of_wandb_is_said_at_the_start_and_at_the_end(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def init(**settings: Any) -> None:
        raise ValueError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict))
    with RunLog(run, None, is_rank_zero=True) as log:
        start = capsys.readouterr().out
        log_steps(log, 1, 5)
        log.end(TrainState(step=5, tokens=5), None)
    end = " ".join(capsys.readouterr().out.split())
    assert start.startswith("wandb is off from here, metrics.csv continues: ValueError: No API key configured.")
    assert "(set WANDB_API_KEY, or give --log.wandb offline and `wandb sync` later" in start
    assert "problem wandb is off from here, metrics.csv continues: ValueError: No API key" in end
    assert "(set WANDB_API_KEY, or give --log.wandb offline and `wandb sync` later" in end


class Wandb:
    """Keeps what it is told, as a server would, and fails on demand."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self.broken = False

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802 (wandb's name)
        return settings

    def init(self, **settings: Any) -> "Wandb":
        self.started.append(settings)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self.broken:
            raise ConnectionError("the network is down")
        self.logged.append((step, numbers))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def remembered(run: Run) -> dict[str, Any]:
    return json.loads((run.out_dir / "wandb.json").read_text())


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_what_wandb_is_told_of_the_run(run: Run, wandb: Wandb, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = dataclasses.replace(run.args.log, wandb=mode, wandb_project="llamas", wandb_entity="herd")
    run = dataclasses.replace(run, args=dataclasses.replace(run.args, log=log))
    with RunLog(run, None, is_rank_zero=True) as told:
        run_id = told.metadata()["wandb_id"]
    (settings,) = wandb.started
    patience = settings.pop("settings")
    assert patience.pop("console") == "off"
    # a start may take long; the end has to fit into the grace that a cluster gives after its signal
    assert patience == {"init_timeout": 60, "finish_timeout": 15}
    assert settings == {
        **{"id": run_id, "resume": "allow", "mode": mode, "project": "llamas", "entity": "herd", "name": "out"},
        **{"dir": run.out_dir, "config": run.resolved(), "notes": None},
    }
    assert wandb.finished == 1
    assert remembered(run) == {"id": run_id, "step": -1, "since": -1, "settings": wandb_logger.settings_digest(run)}


def test_each_row_is_sent_once_as_numbers_when_nothing_is_added_any_more(run: Run, wandb: Wandb) -> None:
    with RunLog(run, None, is_rank_zero=True) as log:
        log.row({"step": 0, "tokens": 0, "val_loss": 7.5})
        assert wandb.logged == []
        log.row({"step": 1, "tokens": 2048, "loss": 7.0, "mfu": None})
        assert wandb.logged == [(0, {"step": 0.0, "tokens": 0.0, "val_loss": 7.5, "tokens_packed": 0.0})]
        assert remembered(run)["step"] == 0
        log.row({"step": 1, "tokens": 2048, "val_loss": 6.5})
        log.row({"step": 2, "tokens": 4096, "loss": 6.0})
        log.end(TrainState(step=2, tokens=4096), "SIGTERM")  # step 2 may still get a validation
    assert [step for step, _ in wandb.logged] == [0, 1]
    row = {"step": 1.0, "tokens": 2048.0, "loss": 7.0, "val_loss": 6.5, "tokens_packed": 2048.0}
    assert wandb.logged[1] == (1, row)
    with RunLog(run, 1, is_rank_zero=True) as log:  # gone on from step 1, which is in the history
        log.row({"step": 1, "tokens": 2048, "loss": 7.0})
        log.row({"step": 2, "tokens": 4096, "loss": 6.0})
        log.row({"step": 3, "tokens": 6144, "loss": 5.0})
        log.end(TrainState(step=3, tokens=6144), None)
    assert [(step, numbers.get("loss")) for step, numbers in wandb.logged] == [(0, None), (1, 7.0), (2, 6.0), (3, 5.0)]
    assert len({settings["id"] for settings in wandb.started}) == 1
    assert wandb.finished == 2


def test_what_was_not_sent_is_sent_by_the_next_start(run: Run, wandb: Wandb) -> None:
    with RunLog(run, None, is_rank_zero=True) as log:
        log_steps(log, 1, 2)
        wandb.broken = True
        log_steps(log, 3, 5)
    assert [step for step, _ in wandb.logged] == [1]
    assert remembered(run)["step"] == 1
    wandb.broken = False
    with RunLog(run, 5, is_rank_zero=True) as log:
        log_steps(log, 6, 6)
    assert [step for step, _ in wandb.logged] == [1, 2, 3, 4, 5]


DAMAGED = [b"", b'{"id": "of', b"[1]", b"3", b"null", b"\xff\xfe", b"[" * 100_000, b'{"id": 5}', b'{"id": null}', b"{}"]
DAMAGED += [b'{"id": "a/b"}', b'{"id": ""}', b'{"id": "\\n"}', b'{"id": "%s"}' % (b"x" * 65), b'{"id": "x", "more": 1}']
DAMAGED += [b'{"id": "x", "step": %s}' % step for step in (b'"3"', b"1.5", b"NaN", b"1e400", b"[]", b"9" * 5000)]
DAMAGED += [b'{"id": "x", "step": 1, "settings": 3}', b'{"id": "x", "step": 1, "continues": {}}']


def test_the_id_is_that_of_the_folder_or_of_its_checkpoint(
    run: Run, wandb: Wandb, step_dir: Path, tmp_path: Path
) -> None:
    saved = shutil.copytree(step_dir, run.out_dir / "checkpoints" / step_dir.name)
    (saved / "state.json").write_text(json.dumps(reader.read_state(saved) | {"wandb_id": "ofthestep"}))
    run = dataclasses.replace(run, resume=saved)
    assert RunLog(run, 12, is_rank_zero=True).metadata() == {"wandb_id": "ofthestep"}
    for damaged in DAMAGED:
        (run.out_dir / "wandb.json").write_bytes(damaged)
        assert RunLog(run, 12, is_rank_zero=True).metadata() == {"wandb_id": "ofthestep"}
    (run.out_dir / "wandb.json").write_text('{"id": "ofthefolder", "step": 12}')
    assert RunLog(run, 12, is_rank_zero=True).metadata() == {"wandb_id": "ofthefolder"}
    (run.out_dir / "wandb.json").unlink()
    for id_of_step in ("a/b", "x" * 65):
        (saved / "state.json").write_text(json.dumps(reader.read_state(saved) | {"wandb_id": id_of_step}))
        found = RunLog(run, 12, is_rank_zero=True).metadata()["wandb_id"]
        assert len(found) == 8
        (run.out_dir / "wandb.json").unlink()
    branch = dataclasses.replace(run, args=dataclasses.replace(run.args, out_dir=str(tmp_path / "branch")))
    found = RunLog(branch, 12, is_rank_zero=True).metadata()["wandb_id"]
    assert found not in ("ofthestep", "ofthefolder")
    assert len(found) == 8


def test_a_history_that_cannot_be_remembered_costs_wandb_and_not_the_run(
    run: Run, wandb: Wandb, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(run, None, is_rank_zero=True) as log:
        log_steps(log, 1, 2)
        (run.out_dir / "wandb.json").unlink()
        (run.out_dir / "wandb.json").mkdir()
        log_steps(log, 3, 5)
    assert len((run.out_dir / "metrics.csv").read_text().splitlines()) == 6
    assert capsys.readouterr().out.count("wandb is off from here, metrics.csv continues: FileExistsError: ") == 1


def changed(run: Run, group: str, **settings: Any) -> Run:
    args = dataclasses.replace(run.args, **{group: dataclasses.replace(getattr(run.args, group), **settings)})
    return dataclasses.replace(run, args=args)


def test_other_settings_leave_the_steps_that_are_given_up_to_the_run_before(
    run: Run, wandb: Wandb, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(run, None, is_rank_zero=True) as log:
        log_steps(log, 1, 6)
        first = log.metadata()["wandb_id"]
    other = changed(run, "optim", lr=1e-3)
    with RunLog(other, 3, is_rank_zero=True) as log:  # of the steps sent, 4 and 5 are done again
        log_steps(log, 4, 6)
        second = log.metadata()["wandb_id"]
    said = f"wandb: steps are done again with other settings: run {second} continues {first} from step 4\n"
    assert said in capsys.readouterr().out
    with RunLog(other, 3, is_rank_zero=True) as log:  # killed before it has saved: the same settings, the same steps
        log_steps(log, 4, 8)
        assert log.metadata()["wandb_id"] == second
    assert [step for step, _ in wandb.logged] == [1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert [settings["id"] for settings in wandb.started] == [first, second, second]
    notes = f"continues {first} from step 4"
    assert [settings["notes"] for settings in wandb.started] == [None, notes, notes]
    with RunLog(run, None, is_rank_zero=True) as log:  # and from nothing, with the first settings
        log_steps(log, 1, 2)
        assert log.metadata()["wandb_id"] not in (first, second)
    assert wandb.started[-1]["notes"] == f"continues {second} from step 0"


@pytest.mark.parametrize(
    ("group", "settings", "same"),
    [
        *[("optim", {"lr": 1e-3}, False), ("data", {"seed": 1}, False), ("train", {"global_batch_size": 8}, False)],
        *[
            ("train", {"max_steps": 12}, False),
            ("train", {"skip_spikes": 5.0}, False),
            ("model", {"n_layer": 1}, False),
        ],
        *[("train", {"micro_batch_size": 1}, True), ("train", {"max_time": 9.0}, True), ("log", {"interval": 3}, True)],
        *[("train", {"resume": "x"}, True), ("checkpoint", {"interval": 3}, True), ("eval", {"interval": 3}, True)],
    ],
)
def test_which_settings_begin_another_run(
    group: str, settings: dict[str, Any], same: bool, run: Run, wandb: Wandb
) -> None:
    with RunLog(run, None, is_rank_zero=True) as log:
        log_steps(log, 1, 6)
        first = log.metadata()["wandb_id"]
    other = changed(run, group, **settings)
    other = dataclasses.replace(other, config=other.args.model.resolve())
    at_the_end = RunLog(other, 5, is_rank_zero=True).metadata()["wandb_id"]  # nothing is given up
    assert at_the_end == first
    again = RunLog(other, 4, is_rank_zero=True).metadata()["wandb_id"]
    assert (again == first) is same


def test_a_run_is_the_same_without_its_initial_weights_and_with_its_data_in_another_folder(
    run: Run, wandb: Wandb, step_dir: Path, tmp_path: Path
) -> None:
    origin = {"resume": None, "init_from": str(tmp_path / "weights")}
    run = changed(run, "train", init_from=origin["init_from"])
    with RunLog(run, None, is_rank_zero=True) as log:
        log_steps(log, 1, 6)
        first = log.metadata()["wandb_id"]
    saved = shutil.copytree(step_dir, run.out_dir / "checkpoints" / step_dir.name)
    (saved / "state.json").write_text(json.dumps(reader.read_state(saved) | {"origin": origin}))
    resumed = dataclasses.replace(changed(run, "train", init_from=None), resume=saved)
    (source,) = run.args.data.sources
    resumed = changed(resumed, "data", sources=[dataclasses.replace(source, path=str(tmp_path / "moved"))])
    assert RunLog(resumed, 4, is_rank_zero=True).metadata()["wandb_id"] == first
    other_data = [dataclasses.replace(run.sources[0], fingerprint="other")]
    other = dataclasses.replace(resumed, sources=other_data)
    assert RunLog(other, 3, is_rank_zero=True).metadata()["wandb_id"] != first


def test_steps_stand_only_if_all_of_them_had_the_settings_of_now(run: Run, wandb: Wandb) -> None:
    other, ids = changed(run, "optim", lr=1e-3), []
    for settings, after, last in ((run, None, 5), (other, 4, 8), (other, 6, 9), (other, 4, 5), (other, 3, 4)):
        with RunLog(settings, after, is_rank_zero=True) as log:
            log_steps(log, (after or 0) + 1, last)
            ids.append(log.metadata()["wandb_id"])
    assert [ids.index(one) for one in ids] == [0, 0, 0, 0, 4]  # only the last gives up a step of the first settings
    steps = [step for step, _ in wandb.logged]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
