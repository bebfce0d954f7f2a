"""Saving: on two ranks that share one group, in processes that are killed, and alone."""

import errno
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from checkpoint_rank import CONFIG, Run, holds, make, values
from checkpoints import load_weights
from needs import a_gpu
from processes import Group, Process
from safetensors import safe_open

import tinyllama
from tinyllama import atomic
from tinyllama.checkpoint import reader
from tinyllama.checkpoint.names import step_dir
from tinyllama.checkpoint.state import TrainState
from tinyllama.checkpoint.writer import CheckpointError, prune
from tinyllama.convert import tensor_file
from tinyllama.convert.weights import open_weights


class Ranks(Group):
    """Processes that wait for commands; see checkpoint_rank.py."""

    def __init__(self, store: Path, count: int, world_size: int, *, warm: bool = True) -> None:
        script = Path(__file__).parents[1] / "helpers" / "checkpoint_rank.py"
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        super().__init__(
            [
                Process(sys.executable, script, rank, world_size, store, warm=rank if warm else None, env=env)
                for rank in range(count)
            ]
        )

    def __call__(self, command: str, path: Path, *args: object) -> list[Any]:
        """Run ``command`` on every rank; gives their answers."""
        return [answer["result"] for answer in self.ask([command, str(path), *args])]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks") / "store", count=2, world_size=2)
    yield started
    started.end()


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("parent") / "store", count=1, world_size=0)
    yield started
    started.end()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A tiny run in this process, the only one of its group."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("alone") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Run.build(sharded=False)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def steps(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks saved asynchronously: steps 5 and 6."""
    folder = tmp_path_factory.mktemp("steps")
    published = [str(folder / "step-00000005"), str(folder / "step-00000006")]
    # the first is in flight when its save returns, and complete when the second's does; then there is one to wait for
    expected = [["None", "None", published[1], "None"], [False, False, True]]
    assert ranks("asynchronously", folder) == [expected, expected]
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_asynchronous_save_has_the_values_of_its_step(steps: Path) -> None:
    assert names(steps) == ["step-00000005", "step-00000006"]
    assert holds(steps / "step-00000005", 5)
    assert holds(steps / "step-00000006", 6)
    files = [".metadata", "__0_0.distcp", "__1_0.distcp", "config.yaml", "state.json"]
    assert names(steps / "step-00000006") == files
    state = reader.read_state(steps / "step-00000005")
    assert (state["format_version"], state["world_size"], state["data"]) == (1, 2, {"seed": 1})
    assert reader.read_model_config(steps / "step-00000005") == CONFIG


def test_other_world_sizes_load_it(steps: Path, ranks: Ranks, alone: Run, tmp_path: Path) -> None:
    from checkpoint_rank import load

    state = {"step": 6, "samples": 18, "tokens": 144}
    for found, equal in [*ranks("load", steps / "step-00000006"), load(alone, steps / "step-00000006")]:
        assert found.items() >= state.items()
        assert equal
    alone.save(make(tmp_path), 9)  # on one, for two
    for found, equal in ranks("load", tmp_path / "step-00000009"):
        assert found["step"] == 9
        assert equal


def flip(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    payload = bytearray(file.read_bytes())
    payload[len(payload) // 2] ^= 16
    file.write_bytes(payload)


def test_ranks_share_the_files_that_they_verify(steps: Path, ranks: Ranks, tmp_path: Path) -> None:
    step = Path(shutil.copytree(steps / "step-00000006", tmp_path / "step-00000006"))
    shares = [[".metadata", "__0_0.distcp"], ["__1_0.distcp", "config.yaml"]]
    assert ranks("verified", step) == [[None, share] for share in shares]
    for files in (["__1_0.distcp"], ["__0_0.distcp", "__1_0.distcp"]):
        for file in files:
            flip(step / file)
        what = ", ".join(f"{file} does not match its hash" for file in files)
        said = (
            f"{step} is damaged ({what}): move it out of its folder, and the run resumes from the checkpoint before it"
        )
        assert ranks("verified", step) == [[said, share] for share in shares]
        for file in files:
            flip(step / file)


def test_the_weights_can_be_had_in_one_piece(steps: Path, tmp_path: Path) -> None:
    weights = load_weights(steps / "step-00000006")
    assert list(weights) == [name for name, _ in Run.build(sharded=False).model.named_parameters()]
    assert all(torch.equal(weights[name], values(f"model.{name}", weights[name].shape, 6)) for name in weights)
    file = tmp_path / "new" / "model.safetensors"
    tensor_file.export(open_weights(steps / "step-00000005"), file)
    script = Path(__file__).parents[2] / "scripts" / "export_checkpoint.py"
    done = subprocess.run([sys.executable, script, steps, file], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{steps}/step-00000006 -> {file}: 54.6 kB\n"
    assert names(file.parent) == ["model.safetensors"]
    with safe_open(file, "pt") as exported:
        assert sorted(exported.keys()) == sorted(weights)
        for name, tensor in weights.items():
            found = exported.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
        facts = exported.metadata()
    assert facts | {"step": "6", "tokens": "144", "format": "pt"} == facts
    assert json.loads(facts["model"])["n_layer"] == CONFIG.n_layer


def test_an_export_that_fails_leaves_what_was_there(steps: Path, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "model.safetensors"
    tensor_file.export(open_weights(steps / "step-00000005"), file)
    before = file.read_bytes()
    monkeypatch.setattr(atomic, "sync", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tensor_file.export(open_weights(steps / "step-00000006"), file)
    assert names(tmp_path) == ["model.safetensors"]
    assert file.read_bytes() == before


FAILURES = {
    "full": " is not saved: it takes 0.001 GB and 0.000 GB are free",
    "limit": " is not saved: rank 1: OSError: [Errno 27] File too large",
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_save_that_fails_on_one_rank_fails_on_all_and_the_next_is_good(how: str, ranks: Ranks, tmp_path: Path):
    said = f"{tmp_path / 'step-00000002'}{FAILURES[how]}"
    assert ranks("failing", tmp_path, how) == [[said, ["step-00000001"]]] * 2
    assert names(tmp_path) == ["step-00000001", "step-00000003"]
    assert holds(tmp_path / "step-00000001", 1)
    assert holds(tmp_path / "step-00000003", 3)


def test_a_disk_that_fills_up_while_it_saves(ranks: Ranks, small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    (said, there), other = ranks("failing", folder, "ballast")
    assert other == [said, there]
    assert there == ["ballast", "step-00000001"]
    assert said.startswith(f"{folder / 'step-00000002'} is not saved: rank ")
    assert said.endswith(("No space left on device", "(is the disk full?)"))
    assert names(folder) == ["step-00000001", "step-00000003"]
    assert holds(folder / "step-00000001", 1)
    assert holds(folder / "step-00000003", 3)


# rank 0's fsyncs: the tensors, .metadata, config.yaml and its folder, state.json and its folder; the rename; the parent
@pytest.mark.parametrize(("when", "step"), [*((when, 1) for when in range(1, 7)), (7, 2), (8, 2)])
def test_a_kill_leaves_the_step_before_or_this_one(when: int, step: int, parent: Ranks, alone: Run, tmp_path: Path):
    folder = tmp_path / "checkpoints"
    assert parent("killed", folder, when) == [signal.SIGKILL]
    assert reader.newest(folder) == (step_dir(folder, step), [])
    assert holds(step_dir(folder, step), step)
    left = {1: "step-00000002.tmp", 2: "step-00000001"}[step] if when < 8 else "step-00000001.tmp"
    assert names(folder) == sorted([f"step-{step:08d}", left])
    alone.save(make(folder, keep_last=1), 2)  # the next start; a complete step 2 is set aside, not overwritten
    assert holds(folder / "step-00000002", 2)
    assert [name for name in names(folder) if "broken" not in name] == ["step-00000002"]


def test_nothing_more_is_synced_or_removed_than_was_killed(parent: Ranks, tmp_path: Path) -> None:
    assert parent("killed", tmp_path / "checkpoints", 9) == [0]
    assert names(tmp_path / "checkpoints") == ["step-00000002"]


def test_a_start_removes_only_what_a_save_left_unfinished(alone: Run, tmp_path: Path) -> None:
    others = ["step-000x.tmp", "step-5.tmp", "step-00000001.tmp.tmp", "step-00000003", "partial", "a.tmp"]
    for name in [*others, "step-00000001.tmp", "step-123456789.tmp"]:
        (tmp_path / name / "inside").mkdir(parents=True)
    make(tmp_path)
    assert names(tmp_path) == sorted(others)


def test_a_broken_step_is_set_aside(alone: Run, tmp_path: Path) -> None:
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "step-00000004" / "mine").touch()
    assert alone.save(make(tmp_path, keep_last=1), 4) == tmp_path / "step-00000004"
    assert holds(tmp_path / "step-00000004", 4)
    (aside,) = tmp_path.glob("step-00000004.broken-*")
    assert names(aside) == ["mine"]


def test_one_broken_step_is_kept_and_its_size_said(alone: Run, tmp_path: Path) -> None:
    said: list[str] = []
    saver = make(tmp_path, keep_last=2)
    saver.say = said.append
    for step, size in ((4, 3_000_000), (5, 7_000_000)):
        broken = tmp_path / f"step-{step:08d}" / "inside"
        broken.mkdir(parents=True)
        (broken / "file").write_bytes(bytes(size))
        alone.save(saver, step)
        (aside,) = tmp_path.glob("*.broken-*")
        assert (aside / "inside" / "file").stat().st_size == size
        start = f"set aside: {aside} was not a complete checkpoint; it takes {size / 1e9:.3f} GB"
        assert said.pop().startswith(start)
    assert said == []
    (tmp_path / "step-00000006").symlink_to("nowhere")
    alone.save(saver, 6)
    assert names(tmp_path)[:2] == ["step-00000005", "step-00000006"]
    assert [name.partition("-0000000")[2][:8] for name in names(tmp_path)[2:]] == ["6.broken"]
    (tmp_path / "step-00000007.broken-00c0ffee").mkdir()  # of an earlier version, which kept all
    (tmp_path / "step-00000007.broken-mine").mkdir()
    make(tmp_path)
    aside = [name for name in names(tmp_path) if "broken" in name]
    assert aside == ["step-00000007.broken-00c0ffee", "step-00000007.broken-mine"]


def test_what_cannot_be_removed_does_not_make_a_saved_step_a_failure(
    one_step: Path, alone: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def busy(path: Path, **how: Any) -> None:
        if "broken" in path.name:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))  # as NFS, of a file that is open elsewhere
        remove(path, **how)

    monkeypatch.setattr(shutil, "rmtree", busy)
    copy(one_step, step_dir(tmp_path, 1), 1)
    (tmp_path / "step-00000002.broken-00c0ffee").mkdir()
    (tmp_path / "step-00000002").mkdir()
    assert alone.save(make(tmp_path, keep_last=1), 2) == tmp_path / "step-00000002"
    assert holds(tmp_path / "step-00000002", 2)
    assert [name.partition(".broken")[0] for name in names(tmp_path)] == ["step-00000002"] * 3


def test_what_was_passed_over_as_damaged_costs_no_good_step(one_step: Path, alone: Run, tmp_path: Path) -> None:
    for step in (5, 10, 20):
        copy(one_step, step_dir(tmp_path, step), step)
    saver = make(tmp_path, keep_last=1)
    alone.save(saver, 15)  # of a run that has resumed from step 10: it was told that step 20 is damaged
    assert names(tmp_path) == ["step-00000015", "step-00000020"]
    alone.save(saver, 20)
    assert [name.partition(".broken")[0] for name in names(tmp_path)] == ["step-00000020"] * 2
    assert holds(tmp_path / "step-00000020", 20)


def test_saves_that_fail_in_a_row_are_fatal(alone: Run, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    saver, failures = make(folder), []
    for step, fails in enumerate((True, True, False, True, True, True, True), 1):
        if fails:
            shutil.rmtree(folder, ignore_errors=True)
            folder.touch()
            with pytest.raises(CheckpointError, match="is not saved: .*File exists") as error:
                alone.save(saver, step)
            failures.append((error.value.fatal, str(error.value).partition("; ")[2]))
        else:
            folder.unlink()
            alone.save(saver, step)
    in_a_row = [(True, f"{count} saves in a row have failed") for count in (3, 4)]
    assert failures == [*[(False, "")] * 4, *in_a_row]


def test_a_read_only_disk_is_fatal(alone: Run, read_only_disk: Path) -> None:
    with pytest.raises(CheckpointError, match="Read-only file system") as error:
        alone.save(make(read_only_disk / "checkpoints"), 1)
    assert error.value.fatal


def test_a_folder_that_cannot_be_made_is_said(alone: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="step-00000001 is not saved: .*File exists: '.*/file'") as error:
        alone.save(make(tmp_path / "file"), 1)
    assert not error.value.fatal


def test_a_failure_nobody_waited_for_is_raised_by_the_next_save(alone: Run, tmp_path: Path, monkeypatch) -> None:
    saver = make(tmp_path, asynchronous=True)
    with monkeypatch.context() as context:
        context.setattr(saver, "_publish", lambda *args: 1 / 0)
        assert alone.save(saver, 1) is None
    with pytest.raises(CheckpointError, match="step-00000001 is not saved: rank 0: ZeroDivisionError"):
        alone.save(saver, 2)
    assert saver.wait() == tmp_path / "step-00000002"
    assert names(tmp_path) == ["step-00000002"]
    assert holds(tmp_path / "step-00000002", 2)


PRUNING: dict[str, tuple[list[int], int, int | None, list[int]]] = {
    "the newest": ([5, 10, 15], 1, None, [15]),
    "fewer than asked for": ([5, 10], 3, None, [5, 10]),
    "by number, not by name": ([99999999, 100000000], 1, None, [100000000]),
    "every tenth for ever": ([5, 10, 15, 20, 25], 2, 10, [10, 20, 25]),
    "the newest is permanent too": ([10, 15, 20], 1, 10, [10, 20]),
    "the only one": ([5], 1, None, [5]),
    "the newest, even of none": ([5, 10], 0, None, [10]),
    "two of many": ([5, 10, 15, 20], 2, None, [15, 20]),
}


@pytest.fixture(scope="module")
def one_step(alone: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    alone.save(make(folder), 7)
    return folder / "step-00000007"


def copy(step_dir: Path, path: Path, step: int) -> Path:
    """A complete checkpoint of ``step`` at ``path``."""
    shutil.copytree(step_dir, path)
    (path / "state.json").write_text(json.dumps(reader.read_state(step_dir) | {"step": step}))
    return path


@pytest.mark.parametrize("case", PRUNING)
def test_pruning(case: str, one_step: Path, tmp_path: Path) -> None:
    there, keep_last, keep_every, kept = PRUNING[case]
    for step in there:
        copy(one_step, step_dir(tmp_path, step), step)
    # neither complete steps of ours, nor counted as such
    copy(one_step, tmp_path / "step-3", 3)
    copy(one_step, tmp_path / "step-00000002.backup", 2)
    (copy(one_step, tmp_path / "step-00000001", 1) / "__0_0.distcp").unlink()
    (copy(one_step, tmp_path / "step-00000101", 101) / "state.json").unlink()
    (tmp_path / "step-00000102").symlink_to(copy(one_step, tmp_path / "elsewhere", 102))
    (tmp_path / "step-00000103").touch()
    others = {"step-3", "step-00000002.backup", "step-00000001", "step-00000101", "elsewhere", "step-00000102"}
    prune(tmp_path, keep_last, keep_every)
    assert set(names(tmp_path)) == others | {"step-00000103"} | {f"step-{step:08d}" for step in kept}


def test_what_cannot_be_removed_is_left_and_no_error(one_step: Path, tmp_path: Path) -> None:
    for step in (5, 10, 15):
        copy(one_step, step_dir(tmp_path, step), step)
    (tmp_path / "step-00000010.tmp" / "inside").mkdir(parents=True)  # in the way of the first that is to go
    prune(tmp_path, 1, None)
    assert names(tmp_path) == ["step-00000010", "step-00000010.tmp", "step-00000015"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [
        (None, None, [1, 2, 3, 4]),
        (None, 2, [1, 2, 3, 4]),
        (0, None, [4]),
        (1, None, [4]),
        (1, 3, [3, 4]),
        (2, 2, [2, 3, 4]),
    ],
)
def test_each_save_keeps_what_was_asked_for(
    keep_last: int | None, keep_every: int | None, kept: list[int], alone: Run, tmp_path: Path
) -> None:
    saver = make(tmp_path, keep_last=keep_last, keep_every=keep_every)
    for step in (1, 2, 3, 4):
        alone.save(saver, step)
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]


def test_every_number_of_a_run_is_saved_and_loaded(alone: Run, tmp_path: Path) -> None:
    recent = [[3.25, 1.0], [2.0, math.pi]]
    numbers = {"validated": 4, "skipped": 7, "skipped_in_a_row": 2, "recent": recent, "float8_exponents": [6, -9, 17]}
    state = TrainState(5, 40, 1280, **numbers)
    saver = make(tmp_path, asynchronous=True)
    saver.save(state, alone.model, alone.optimizer)
    state.step, state.skipped = 6, 8  # training goes on
    assert saver.wait() == tmp_path / "step-00000005"
    versions = {"tinyllama": tinyllama.__version__, "torch": torch.__version__, "python": platform.python_version()}
    content = json.loads((tmp_path / "step-00000005" / "state.json").read_text())
    hashes = {path.name: xxhash.xxh3_128(path.read_bytes()).hexdigest() for path in saver.folder.glob("*/*")}
    assert sorted(hashes) == [".metadata", "__0_0.distcp", "config.yaml", "state.json"]
    assert content.pop("hashes") | {"state.json": hashes["state.json"]} == hashes
    assert content.pop("hash_algorithm") == "XXH3-128"
    assert content == reader.read_state(tmp_path / "step-00000005")
    assert content == {
        "format_version": 1,
        **{"step": 5, "samples": 40, "tokens": 1280, "warmup_samples": -1, "decay_batch": -1, **numbers},
        **{"data": {"seed": 1}, "world_size": 1, "versions": versions},
    }
    loaded = reader.load(tmp_path / "step-00000005", alone.model, alone.optimizer)
    assert loaded == TrainState(5, 40, 1280, **numbers)


def test_a_save_needs_room_for_all_its_tensors(alone: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [parameter.numel() for parameter in alone.model.parameters()]
    of_tensors = sum(3 * 4 * size + 4 for size in sizes)  # fp32, two moments and a count of steps
    of_files = 4 * len(sizes) * 4096  # of each rank
    usage = shutil.disk_usage(tmp_path)
    for world_size, free, fits in (
        (1, of_tensors + of_files - 1, False),
        (2, of_tensors + 2 * of_files - 1, False),
        (1, of_tensors + of_files, True),
    ):
        monkeypatch.setattr(dist, "get_world_size", lambda *group, world_size=world_size: world_size)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        if fits:
            assert alone.save(make(tmp_path), 1) == tmp_path / "step-00000001"
        else:
            with pytest.raises(CheckpointError, match="step-00000001 is not saved: it takes 0.00. GB and 0.00. GB are"):
                alone.save(make(tmp_path), 1)
            assert names(tmp_path) == []


def test_an_asynchronous_save_that_is_waited_for_is_complete(alone: Run, tmp_path: Path) -> None:
    saver = make(tmp_path, asynchronous=True)
    assert alone.save(saver, 1, wait=True) == tmp_path / "step-00000001"
    assert not saver.done()
    assert saver.wait() is None
    assert holds(tmp_path / "step-00000001", 1)


@pytest.mark.gpu
@a_gpu
def test_a_gpu_is_saved_through_pinned_memory(tmp_path: Path) -> None:
    # where CUDA is, an import may start a thread, and a process with threads must not fork
    ranks = Ranks(tmp_path / "store", count=1, world_size=1, warm=False)
    try:
        assert ranks("pinned", tmp_path / "checkpoints") == [True]
    finally:
        ranks.kill()
    assert holds(tmp_path / "checkpoints" / "step-00000003", 3)
    assert holds(tmp_path / "checkpoints" / "step-00000004", 4)
