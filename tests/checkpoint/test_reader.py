"""What is taken for a checkpoint, among whatever lies beside it, and what is refused."""

import enum
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from checkpoint_rank import CONFIG, Run, make
from checkpoints import load_weights
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from tinyllama import InputError
from tinyllama.checkpoint import reader, resume
from tinyllama.checkpoint.names import run_dir, step_dir
from tinyllama.checkpoint.state import TrainState


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of step 7."""
    folder = tmp_path_factory.mktemp("saved")
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    try:
        step_dir = Run.build(sharded=False).save(make(folder), 7)
    finally:
        dist.destroy_process_group()
    assert step_dir is not None
    return step_dir


def copy(saved: Path, path: Path, step: int) -> Path:
    shutil.copytree(saved, path)
    (path / "state.json").write_text(json.dumps(reader.read_state(saved) | {"step": step}))
    return path


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


# what lies beside step 7: how it is made of a complete step 9, and why it is passed over; None: it is not looked at
JUNK: dict[str, tuple[str, Callable[[Path], object], str | None]] = {
    "an empty folder": ("step-9000", lambda path: (shutil.rmtree(path), path.mkdir()), "state.json is missing"),
    "a file": ("step-10000", lambda path: (shutil.rmtree(path), path.touch()), "state.json: Not a directory"),
    "a link to nowhere": (
        "step-00000009",
        lambda path: (shutil.rmtree(path), path.symlink_to("nowhere")),
        "state.json is missing",
    ),
    "a copy under another number": ("step-00000010", lambda path: None, "its state.json is of step 9"),
    "no tensors": ("step-00000009", lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing or cut"),
    "tensors cut short": ("step-00000009", lambda path: cut(path / "__0_0.distcp"), "__0_0.distcp is missing or cut"),
    "no metadata": ("step-00000009", lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "metadata cut short": ("step-00000009", lambda path: cut(path / ".metadata"), "not the metadata of a checkpoint"),
    "no settings": ("step-00000009", lambda path: (path / "config.yaml").unlink(), "config.yaml is missing"),
    "empty settings": ("step-00000009", lambda path: (path / "config.yaml").write_text(""), ""),
    "state.json is a list": ("step-00000009", lambda path: (path / "state.json").write_text("[9]"), ""),
    "state.json is empty": ("step-00000009", lambda path: (path / "state.json").write_text(""), ""),
    "a position that is none": (
        "step-00000009",
        lambda path: (path / "state.json").write_text(json.dumps(reader.read_state(path) | {"samples": 1.5})),
        "its state.json says samples 1.5",
    ),
    "a position before the beginning": (
        "step-00000009",
        lambda path: (path / "state.json").write_text(json.dumps(reader.read_state(path) | {"samples": -5})),
        "its state.json says samples -5",
    ),
    "nested without an end": ("step-00000009", lambda path: (path / "state.json").write_text("[" * 100_000), ""),
    "a backup": ("step-00000009.backup", lambda path: None, None),
    "a hidden one": (".step-00000009", lambda path: None, None),
    "not finished": ("step-00000009.tmp", lambda path: None, None),
    "no number": ("step-000x.tmp", lambda path: None, None),
    "set aside": ("step-00000009.broken-12345678", lambda path: None, None),
    "a folder": ("partial", lambda path: None, None),
}


@pytest.mark.parametrize("case", JUNK)
def test_the_newest_survives_what_lies_beside_it(case: str, saved: Path, tmp_path: Path) -> None:
    name, spoil, why = JUNK[case]
    seven = copy(saved, tmp_path / "step-00000007", 7)
    copy(saved, tmp_path / "step-00000006", 6)
    spoil(copy(saved, tmp_path / name, 9))
    found, passed_over = reader.newest(tmp_path)
    assert found == seven
    if why is None:
        assert passed_over == []
    else:
        (said,) = passed_over
        assert said.startswith(f"{tmp_path / name} is not a complete checkpoint (")
        assert why in said
    assert reader.resolve(tmp_path) == seven


def test_a_run_says_which_newer_steps_are_passed_over(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seven, eight, nine = (copy(saved, step_dir(tmp_path / "checkpoints", step), step) for step in (7, 8, 9))
    cut(eight / "__0_0.distcp")
    (nine / "config.yaml").unlink()
    reasons = [f"{nine} is not a complete checkpoint (config.yaml is missing)"]
    reasons += [f"{eight} is not a complete checkpoint (__0_0.distcp is missing or cut short)"]
    said: list[str] = []
    for path in (tmp_path, tmp_path / "checkpoints"):
        assert reader.resolve(path) == seven
        assert tuple(capsys.readouterr()) == ("", "".join(f"passed over: {why}\n" for why in reasons))
        assert reader.resolve(path, said.append) == seven
    assert said == [f"passed over: {why}" for why in reasons] * 2
    assert reader.resolve(seven) == seven  # nothing is passed over for a step that is named
    shutil.rmtree(seven)
    with pytest.raises(InputError) as error:
        reader.resolve(tmp_path)
    hint = "give a step directory (step-00005000) or a run's out_dir"
    assert str(error.value) == f"{tmp_path} holds no complete checkpoint ({reasons[0]}): {hint}"
    assert tuple(capsys.readouterr()) == ("", "")


def test_a_step_that_is_not_there_names_those_that_are(saved: Path, tmp_path: Path) -> None:
    for step in (20, 30):
        copy(saved, step_dir(tmp_path, step), step)
    there = "does not exist; the steps of its run are: step-00000020, step-00000030"
    with pytest.raises(InputError, match=f"step-00000010 {there}"):
        reader.resolve(tmp_path / "step-00000010")


@pytest.mark.parametrize("kind", ["file", "pipe", "link"])
def test_what_is_no_folder_holds_no_checkpoint_and_takes_no_run(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    {"file": Path.touch, "pipe": os.mkfifo, "link": lambda path: path.symlink_to("nothing")}[kind](path)
    hint = "give a step directory (step-00005000) or a run's out_dir"
    with pytest.raises(InputError) as error:
        reader.resolve(path)
    assert str(error.value) == f"{path} is not a folder: {hint}"
    for how in ("auto", "never", str(tmp_path)):
        with pytest.raises(InputError) as error:
            resume.to_resume(path, how)
        assert str(error.value) == f"out_dir {path} is not a folder: give another"


def test_damaged_tensors_are_one_line(saved: Path, tmp_path: Path) -> None:
    step_dir = copy(saved, tmp_path / "step-00000007", 7)
    file = step_dir / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))  # what a crash can leave: whole, and zeros
    assert reader.problem(step_dir) is None
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        run = Run.build(sharded=False)
        with pytest.raises(InputError, match="step-00000007 cannot be read .*: move it out of its folder, and the run"):
            reader.load(step_dir, run.model, run.optimizer)
    finally:
        dist.destroy_process_group()


def test_steps_are_ordered_by_number(saved: Path, tmp_path: Path) -> None:
    for step in (9000, 10000, 99):
        copy(saved, tmp_path / f"step-{step}", step)
    assert reader.newest(tmp_path) == (tmp_path / "step-10000", [])
    assert reader.newest(tmp_path / "nothing") == (None, [])
    (tmp_path / "link").symlink_to(tmp_path)
    assert reader.newest(tmp_path / "link") == (tmp_path / "link" / "step-10000", [])


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_does_something_is_refused_and_does_not(saved: Path, tmp_path: Path) -> None:
    step_dir = copy(saved, tmp_path / "step-00000007", 7)
    attack = pickle.dumps(Attack(tmp_path / "done"))
    (step_dir / ".metadata").write_bytes(attack)
    for load in (reader.resolve, load_weights):
        with pytest.raises(InputError, match="it names posix.mkdir"):
            load(step_dir)
    assert not (tmp_path / "done").exists()
    pickle.loads(attack)  # the pickle is a real one
    assert (tmp_path / "done").exists()


class AsGetattr(pickle.Pickler):
    """Pickles the members of enums as Python 3.11.2 does, which is Debian 12's, and dtypes and classes as ever."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_metadata_that_an_older_python_pickled_is_read(saved: Path, tmp_path: Path) -> None:
    step_dir = copy(saved, tmp_path / "step-00000007", 7)
    ours = reader._Reader(step_dir).read_metadata()
    with (step_dir / ".metadata").open("wb") as file:
        AsGetattr(file).dump(ours)
    assert b"getattr" in (step_dir / ".metadata").read_bytes()
    assert reader._Reader(step_dir).read_metadata().state_dict_metadata == ours.state_dict_metadata
    assert reader.problem(step_dir) is None


class Attribute:
    def __init__(self, owner: object, name: object) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch.Size, "__subclasses__"),
        (_MEM_FORMAT_ENCODING, "__class__"),
        (_MEM_FORMAT_ENCODING, "mro"),
        (Metadata, "__init__"),
    ],
)
def test_getattr_reaches_nothing_else(saved: Path, tmp_path: Path, owner: object, name: object) -> None:
    step_dir = copy(saved, tmp_path / "step-00000007", 7)
    (step_dir / ".metadata").write_bytes(pickle.dumps(Attribute(owner, name)))
    assert "it names getattr(" in (reader.problem(step_dir) or "")


def test_changes_are_named(tmp_path: Path) -> None:
    then = {"model": {"n_layer": 2}, "data": {"sources": [{"weight": 0.7}, {"weight": 0.3}]}}
    resume.refuse_changes(tmp_path, then, {**then})
    now = {"model": {"n_layer": CONFIG.n_layer + 1}, "data": {"sources": [{"weight": 0.7}]}}
    with pytest.raises(InputError) as error:
        resume.refuse_changes(tmp_path, then, now)
    what = "model.n_layer was 2 and is 3; data.sources[1].weight was 0.3 and is absent"
    assert str(error.value).startswith(f"cannot resume from {tmp_path}: {what}; put it back")
    with pytest.raises(InputError) as error:
        resume.refuse_changes(tmp_path, {"sources": [{"fingerprint": "a"}]}, {"sources": [{"fingerprint": "b"}]})
    other_data = "sources[0].fingerprint was a and is b (other packed data than the run's)"
    assert str(error.value) == (
        f"cannot resume from {tmp_path}: {other_data}; put it back, or start a new run in another --out_dir"
    )
    # and what there was not
    with pytest.raises(InputError, match="data.final was 1 and is absent; data.ramp_tokens was absent and is 9; put"):
        resume.refuse_changes(tmp_path, {"data": {"final": 1}}, {"data": {"ramp_tokens": 9}})
    with pytest.raises(InputError, match="holds weights and no run to resume: give it as train.init_from"):
        resume.refuse_changes(tmp_path, {"model": None, "data": None}, now)


def test_settings_that_are_others_now_are_told_but_for_where_the_run_is(tmp_path: Path) -> None:
    then = {"out_dir": "a", "train": {"resume": "auto", "seed": 1}, "optim": {"lr": 1.0}, "gone": 5}
    then["data"] = {"sources": [{"path": "x"}, {"path": "y"}]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(then))
    now = {"out_dir": "b", "train": {"resume": "never", "seed": 2}, "optim": {"lr": 1.0}, "new": 6}
    now["data"] = {"sources": [{"path": "x"}]}
    sources = [[{"path": "x"}, {"path": "y"}], [{"path": "x"}]]
    assert resume.changed(tmp_path, now) == {"train.seed": [1, 2], "data.sources": sources}
    assert resume.changed(tmp_path, then) == {}


def test_numbers_that_an_older_checkpoint_lacks_are_those_of_a_start(saved: Path, tmp_path: Path) -> None:
    step_dir = copy(saved, tmp_path / "step-00000007", 7)
    state = reader.read_state(step_dir)
    for name in ("validated", "skipped", "skipped_in_a_row", "recent"):
        del state[name]
    (step_dir / "state.json").write_text(json.dumps(state))
    assert reader.problem(step_dir) is None
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        run = Run.build(sharded=False)
        loaded = reader.load(step_dir, run.model, run.optimizer)
    finally:
        dist.destroy_process_group()
    assert loaded == TrainState(7, 21, 168, validated=-1, skipped=0, skipped_in_a_row=0, recent=[])


@pytest.mark.parametrize("name", ["step", "samples", "tokens", "validated", "skipped", "skipped_in_a_row"])
def test_each_number_of_a_checkpoint_must_be_one(name: str, saved: Path, tmp_path: Path) -> None:
    step_dir = copy(saved, tmp_path / "step-00000007", 7)
    state = reader.read_state(step_dir)
    for number in (True, "7", None, -2, 2**62, 7.0):
        (step_dir / "state.json").write_text(json.dumps(state | {name: number}))
        assert reader.problem(step_dir) is not None, number
    for number in (-1, 0, 2**62 - 1):
        (step_dir / "state.json").write_text(json.dumps(state | {name: number}))
        holds = name == "validated" or (name != "step" and number >= 0)
        assert (reader.problem(step_dir) is None) == holds, number


def test_what_a_start_resumes(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for how in ("auto", "never"):
        assert resume.to_resume(run, how) is None
    older, newest = (copy(saved, step_dir(run / "checkpoints", step), step) for step in (7, 20))
    shutil.copytree(run / "checkpoints/step-00000020", run / "checkpoints/step-00000030")
    for how in ("auto", str(run), str(newest), f"{run}/../run/checkpoints/step-00000020"):
        assert resume.to_resume(run, how).resolve() == newest
    assert resume.to_resume(other, str(older)) == older
    assert resume.to_resume(other, str(run)) == newest
    step = f"{run}/checkpoints/step-00000030 is not a complete checkpoint (its state.json is of step 20)"
    assert capsys.readouterr().out == f"passed over: {step}\n" * 3  # wherever a run is named, not a step
    with pytest.raises(InputError, match="step-00000030 is not a complete checkpoint .*: give another step of its run"):
        resume.to_resume(other, f"{run}/checkpoints/step-00000030")
    with pytest.raises(InputError, match="step-00000020 exists and train.resume is never: give another out_dir"):
        resume.to_resume(run, "never")
    with pytest.raises(InputError, match=f"step-00000020 is newer than train.resume {older}: give another out_dir"):
        resume.to_resume(run, str(older))
    (run / "STOPPED").write_text('{"step": 21}\n')
    for how in ("auto", "never", str(newest)):
        with pytest.raises(InputError, match='STOPPED says why this run ended: {"step": 21}; to go on, delete'):
            resume.to_resume(run, how)


def test_a_run_whose_every_step_is_broken_does_not_start_anew(saved: Path, tmp_path: Path) -> None:
    for step in (7, 20):
        (copy(saved, step_dir(tmp_path / "checkpoints", step), step) / "config.yaml").unlink()
    step = tmp_path / "checkpoints" / "step-00000020"
    with pytest.raises(InputError) as error:
        resume.to_resume(tmp_path, "auto")
    hint = f"move {tmp_path}/checkpoints away to start anew"
    why = "config.yaml is missing"
    assert str(error.value) == f"{step} is not a complete checkpoint ({why}), and no step before it is complete: {hint}"
    assert resume.to_resume(tmp_path, "never") is None


@pytest.mark.parametrize("what", [torch.load, torch.save, eval, print])
def test_a_pickle_may_name_nothing_but_metadata(what: Callable[..., object], saved: Path, tmp_path: Path) -> None:
    step_dir = copy(saved, tmp_path / "step-00000007", 7)
    (step_dir / ".metadata").write_bytes(pickle.dumps(what))
    said = f"it names {what.__module__}.{what.__qualname__}"
    with pytest.raises(InputError, match=said):
        load_weights(step_dir)
    assert said in (reader.problem(step_dir) or "")


def test_the_run_of_a_step_directory_is_above_its_checkpoints() -> None:
    assert run_dir(Path("out/mine/checkpoints/step-00000005")) == Path("out/mine")
    assert run_dir(Path("kept/step-00000005")) == Path("kept")  # a copy of it
