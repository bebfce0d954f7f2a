"""Find, check and load checkpoints at any world size, without executing pickles.

``checkpoints/step-00005000/`` holds the model's and the optimizer's tensors as torch.distributed.checkpoint (DCP)
writes them, ``config.yaml``, and ``state.json``: plain numbers, what the run was made of, and the hashes of the files.
There is no state of random generators: the initial weights and the order of the data are functions of their seeds, and
no pass draws numbers. writer.py writes them.

Nothing in a checkpoint is trusted: not that it is complete, nor what its names, sizes and numbers say.
"""

import dataclasses
import functools
import os
import stat
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from tinyllama import InputError, printable
from tinyllama.checkpoint import hashes, metadata, names, state
from tinyllama.checkpoint.state import TrainState
from tinyllama.checkpoint.tensors import materialize_optimizer_state, named_tensors
from tinyllama.config.args import PretrainArgs
from tinyllama.config.model import ModelConfig

FORMAT_VERSION = 1

MOST_BYTES = {"state.json": 2**24, "config.yaml": 2**24, ".metadata": 2**30}
"""Largest size, in bytes, of a file that is read; the first two take kilobytes, .metadata 0.2 MB per rank."""

GROUPS = [field.name for field in dataclasses.fields(PretrainArgs) if dataclasses.is_dataclass(field.type)]
"""groups of settings in a run's config.yaml"""

TO_RESUME = "move it out of its folder, and the run resumes from the checkpoint before it"
"""what to do about a damaged checkpoint that a run resumes from"""


class DamagedError(InputError):
    """A checkpoint's files are not what was saved. With a process group, every rank raises it."""

    def __init__(self, problem: str, hint: str) -> None:
        super().__init__(f"{problem}: {hint}")
        self.problem = problem


def load(step_dir: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Restore the tensors of ``model`` and ``optimizer`` in place, whatever world saved them; return its numbers.

    Collective. Raises DamagedError.
    """
    verify(step_dir, TO_RESUME)
    materialize_optimizer_state(optimizer)
    _load(named_tensors(model, optimizer), _Reader(step_dir), TO_RESUME)
    metadata.forget()
    return state.from_json(read_state(step_dir))


def open_weights(step_dir: Path) -> tuple[dict[str, TensorStorageMetadata], Callable[[str], torch.Tensor]]:
    """Return the metadata of the model's tensors by name, and a reader of one in full.

    The first call of it verifies the step: if there is a process group, every rank must make it.
    """
    hint = "give another step of its run"
    reader, verify_once = _Reader(step_dir), functools.cache(verify)
    entries = {
        name.removeprefix("model."): entry
        for name, entry in reader.metadata.state_dict_metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }

    def read(name: str) -> torch.Tensor:
        verify_once(step_dir, hint)
        entry = entries[name]
        full = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():  # DCP warns that there is no process group, which is intended
            warnings.simplefilter("ignore", UserWarning)
            _load({f"model.{name}": full}, reader, hint, no_dist=True)
        return full

    return entries, read


def read_state(step_dir: Path) -> dict[str, Any]:
    """Read state.json, without the hashes in it."""
    content, _ = hashes.unseal(_read(step_dir / "state.json"))
    state.check_json(content)
    return content


def read_hashes(step_dir: Path) -> dict[str, str] | None:
    """Read the hashes of all files but state.json; None for a step of a version that saved none."""
    return hashes.unseal(_read(step_dir / "state.json"))[1]


def read_settings(step_dir: Path) -> dict[str, Any]:
    """Read config.yaml."""
    try:
        settings = yaml.load(_read(step_dir / "config.yaml"), _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"its config.yaml is no YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError("its config.yaml does not hold settings")
    for group in GROUPS:
        if not isinstance(settings.get(group, {}), dict):
            raise ValueError(f"its config.yaml does not hold settings of {group}")
    return settings


def read_model_config(step_dir: Path) -> ModelConfig:
    """Read the sizes of the model that was saved."""
    try:
        return ModelConfig(**read_settings(step_dir)["model"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"its config.yaml does not hold a model's sizes: {error}") from error


def newest(checkpoints: Path, before: Path | None = None) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint in ``checkpoints``, and why each newer one was passed over.

    With ``before``, only the checkpoints that come before this directory are considered.
    """
    passed_over: list[str] = []
    found = names.step_dirs(checkpoints)
    if before is not None:
        found = [(step, path) for step, path in found if (step, path) < (names.step_of(before), before)]
    for _, path in reversed(found):
        why = problem(path)
        if why is None:
            return path, passed_over
        passed_over.append(f"{path} is not a complete checkpoint ({why})")
    return None, passed_over


def to_stderr(line: str) -> None:
    """Print ``line`` where it is not taken for a result."""
    print(line, file=sys.stderr, flush=True)


def say_passed_over(problems: Sequence[str], say: Callable[[str], None]) -> None:
    """Say in a line each why checkpoints were passed over."""
    for why in problems:
        say(f"passed over: {printable(why)}")


def resolve(path: str | Path, say: Callable[[str], None] = to_stderr) -> Path:
    """Return the step directory at ``path``, or the newest complete one of the run there; raises InputError if none.

    ``say`` gets a line for each newer one that is passed over.
    """
    path = Path(path)
    if names.step_of(path) is None:
        hint = "give a step directory (step-00005000) or a run's out_dir"
        if os.path.lexists(path) and not path.is_dir():
            raise InputError(f"{path} is not a folder: {hint}")
        step_dir, passed_over = newest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if step_dir is None:
            reason = f" ({passed_over[0]})" if passed_over else ""
            raise InputError(f"{path} holds no complete checkpoint{reason}: {hint}")
        say_passed_over(passed_over, say)
        return step_dir
    if not path.is_dir():
        there = ", ".join(sorted(step.name for step in path.parent.glob("step-*"))) or "none"
        raise InputError(f"{path} does not exist; the steps of its run are: {there}")
    if why := problem(path):
        raise InputError(f"{path} is not a complete checkpoint ({why}): give another step of its run")
    return path


def problem(step_dir: Path) -> str | None:
    """Return why ``step_dir`` cannot be loaded; None when every file is there in full. ``verify`` does the rest."""
    try:
        step = read_state(step_dir)["step"]
        if step != names.step_of(step_dir):
            return f"its state.json is of step {step}"
        hashed = read_hashes(step_dir)
        for name in ("config.yaml", ".metadata"):
            if hashed is not None and hashed.get(name) != hashes.of_bytes(_read(step_dir / name)):
                return f"{name} does not match its hash"
        read_model_config(step_dir)
        files = _check_files(step_dir, _read(step_dir / ".metadata"))
        if hashed is not None and (others := (files | {"config.yaml", ".metadata"}) ^ hashed.keys()):
            return f"its state.json does not have the hashes of its files: {min(others)!r:.100}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or step_dir).name}: {error.strerror}"
    except Exception as error:  # whatever a damaged file makes its parser raise, MemoryError among it
        return _one_line(error)
    return None


def verify(step_dir: Path, hint: str) -> None:
    """Compare the files of ``step_dir`` with their hashes. Raises DamagedError, with ``hint``.

    Collective if there is a process group, whose ranks share the files.
    """
    hashed = read_hashes(step_dir)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if hashed is None:
        if rank == 0:
            to_stderr(f"{step_dir} is of a version that saved no hashes: its tensors are not verified")
        return
    mine = sorted(hashed, key=lambda name: (len(name), name))[rank::world_size]

    def damage(name: str) -> str | None:
        try:
            _size(step_dir / name)
            return None if hashes.of_file(step_dir / name) == hashed[name] else f"{name} does not match its hash"
        except OSError as error:
            return f"{name}: {error.strerror}"
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        found = list(filter(None, pool.map(damage, mine)))
    if world_size > 1:
        of_ranks: list[list[str]] = [[]] * world_size
        dist.all_gather_object(of_ranks, found)
        found = sum(of_ranks, [])
    if found:
        raise DamagedError(f"{step_dir} is damaged ({', '.join(found)})", hint)


def _load(named: dict[str, torch.Tensor], reader: "_Reader", hint: str, no_dist: bool = False) -> None:
    try:
        dcp.load(named, storage_reader=reader, no_dist=no_dist)
    except CheckpointException as error:  # a BaseException, whose text is a traceback
        cause = str(next(iter(error.failures.values()))[0]).partition(". ")[0].partition("\n")[0]
        raise DamagedError(f"{reader.path} cannot be read ({cause})", hint) from error


class _Reader(dcp.FileSystemReader):
    @functools.cached_property
    def metadata(self) -> Metadata:
        """Return what .metadata holds, once it is checked."""
        payload = _read(Path(self.path) / ".metadata")
        _check_files(Path(self.path), payload)
        return metadata.read(payload)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return dataclasses.replace(self.metadata, planner_data=None, storage_meta=StorageMeta(load_id=self.load_id))


def _check_files(step_dir: Path, payload: bytes) -> set[str]:
    """Return the names of the files that ``payload``, a .metadata, names; raises InputError if one is not whole."""
    try:
        sizes = metadata.file_sizes(payload)
    except ValueError as error:
        raise InputError(_one_line(error)) from error
    except Exception as error:  # of the wrong types in it
        raise InputError(f"its metadata is damaged: {_one_line(error)}") from error
    for name, size in sizes.items():
        try:
            found = _size(step_dir / name)
        except (FileNotFoundError, ValueError) as error:
            problem = f"{name} is missing or cut short" if isinstance(error, FileNotFoundError) else str(error)
            raise InputError(problem) from error
        if found != size:
            raise InputError(f"{name} is {'missing or cut short' if found < size else 'longer than its tensors'}")
    return set(sizes)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for a tree of any size
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


def _size(path: Path) -> int:
    """Return the size of a regular file: what else there may be, links too, is not a step's, and may have no end."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is not a regular file")
    return status.st_size


def _read(path: Path) -> bytes:
    if _size(path) > MOST_BYTES[path.name]:
        raise ValueError(f"{path.name} has more than {MOST_BYTES[path.name]:,} bytes")
    return path.read_bytes()


def _one_line(error: Exception) -> str:
    """Return what ``error`` says, cut and escaped: it may quote a damaged file."""
    return printable(" ".join(str(error).split()) or type(error).__name__, 300)
