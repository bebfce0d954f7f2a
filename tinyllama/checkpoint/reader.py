"""Find, check and load checkpoints at any world size, without executing pickles.

``checkpoints/step-00005000/`` holds the model's and the optimizer's tensors as torch.distributed.checkpoint (DCP)
writes them, ``state.json`` (plain numbers and what the run was made of) and ``config.yaml``. There is no state of
random generators: the initial weights and the order of the data are functions of their seeds, and no pass draws
numbers. writer.py writes them.
"""

import dataclasses
import functools
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta, TensorStorageMetadata

from tinyllama import InputError
from tinyllama.checkpoint import names
from tinyllama.checkpoint.state import TrainState
from tinyllama.config.model import ModelConfig

FORMAT_VERSION = 1

# AdamW's state of one parameter
MOMENTS = ("step", "exp_avg", "exp_avg_sq")

# all that DCP's pickled .metadata of tensors is made of
METADATA_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


def load(step_dir: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Restore the tensors of ``model`` and ``optimizer`` in place, whatever world saved them; return its numbers."""
    materialize_optimizer_state(optimizer)
    hint = "move it out of its folder, and the run goes on from the step before"
    _load(tensors(model, optimizer), _Reader(step_dir), hint)
    saved = read_state(step_dir)
    fields = [field.name for field in dataclasses.fields(TrainState)]
    return TrainState(**{name: saved[name] for name in fields if name in saved})


def load_weights(step_dir: Path) -> dict[str, torch.Tensor]:
    """Return the model's full tensors by name, on the CPU, as saved (fp32); needs no process group."""
    entries, read = open_weights(step_dir)
    return {name: read(name) for name in entries}


def open_weights(step_dir: Path) -> tuple[dict[str, TensorStorageMetadata], Callable[[str], torch.Tensor]]:
    """Return the metadata of the model's tensors by name, and a reader of one in full; needs no process group."""
    reader = _Reader(step_dir)
    entries = {
        name.removeprefix("model."): entry
        for name, entry in reader.metadata.state_dict_metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }

    def read(name: str) -> torch.Tensor:
        entry = entries[name]
        full = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():  # DCP warns that there is no process group, which is intended
            warnings.simplefilter("ignore", UserWarning)
            _load({f"model.{name}": full}, reader, "give another step of its run", no_dist=True)
        return full

    return entries, read


def read_state(step_dir: Path) -> dict[str, Any]:
    """Read state.json."""
    return json.loads((step_dir / "state.json").read_text(encoding="utf-8"))


def read_settings(step_dir: Path) -> dict[str, Any]:
    """Read config.yaml."""
    return yaml.safe_load((step_dir / "config.yaml").read_text(encoding="utf-8"))


def read_model_config(step_dir: Path) -> ModelConfig:
    """Read the sizes of the model that was saved."""
    return ModelConfig(**read_settings(step_dir)["model"])


def newest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """Return the complete step directory of the largest step, and why each larger one was passed over."""
    passed_over: list[str] = []
    for _, path in reversed(names.step_dirs(checkpoints)):
        why = problem(path)
        if why is None:
            return path, passed_over
        passed_over.append(f"{path} is no complete checkpoint ({why})")
    return None, passed_over


def resolve(path: str | Path) -> Path:
    """Return the step directory at ``path``, or the newest complete one of the run there; raises InputError if none."""
    path = Path(path)
    if names.step_of(path) is None:
        step_dir, _ = newest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if step_dir is None:
            hint = "give a step directory (step-00005000) or a run's out_dir"
            raise InputError(f"{path} holds no complete checkpoint: {hint}")
        return step_dir
    if not path.is_dir():
        there = ", ".join(sorted(step.name for step in path.parent.glob("step-*"))) or "none"
        raise InputError(f"{path} is not there; the steps of its run that are: {there}")
    if why := problem(path):
        raise InputError(f"{path} is no complete checkpoint ({why}): give another step of its run")
    return path


def materialize_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the state that AdamW creates only at its first step: a checkpoint is loaded into it before."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint by name, the very ones in use; the optimizer must have its state.

    There are no other entries: DCP would pickle them.
    """
    named = {}
    optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for (name, parameter), owner in zip(model.named_parameters(), optimized, strict=True):
        assert parameter is owner, f"{name} is gathered: reshard the model before a checkpoint"
        named[f"model.{name}"] = parameter.detach()
        for moment in MOMENTS:
            named[f"optimizer.{moment}.{name}"] = optimizer.state[parameter][moment]
    return named


def problem(step_dir: Path) -> str | None:
    """Return why ``step_dir`` cannot be loaded; None when every file is there in full."""
    try:
        saved = read_state(step_dir)
        read_model_config(step_dir)
        if saved["step"] != names.step_of(step_dir):
            return f"its state.json is of step {saved['step']}"
        for field in dataclasses.fields(TrainState):
            number = saved.get(field.name, field.default)
            if field.name != "recent" and not (type(number) is int and -1 <= number < 2**62):
                return f"its state.json says {field.name} {number!r}"
        for entry in _Reader(step_dir).metadata.storage_data.values():
            file = step_dir / entry.relative_path
            if not file.is_file() or file.stat().st_size < entry.offset + entry.length:
                return f"{file.name} is missing or cut short"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or step_dir).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        return " ".join(str(error).split())
    return None


def _load(named: dict[str, torch.Tensor], reader: "_Reader", hint: str, no_dist: bool = False) -> None:
    try:
        dcp.load(named, storage_reader=reader, no_dist=no_dist)
    except CheckpointException as error:  # no Exception, and its text is a trace
        cause = str(next(iter(error.failures.values()))[0]).partition(". ")[0].partition("\n")[0]
        raise InputError(f"{reader.path} cannot be read ({cause}): {hint}") from error


class _Unpickler(pickle.Unpickler):
    """Reads DCP's own metadata and refuses everything else that a pickle could name."""

    def find_class(self, module: str, name: str) -> Any:
        if name in METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _memory_format(cls: Any, name: Any) -> _MEM_FORMAT_ENCODING:
    """Replace getattr: early releases of Python 3.11 pickle an enum member as getattr(its class, its name)."""
    if cls is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"it names getattr({cls}, {name!r})")
    return _MEM_FORMAT_ENCODING[name]


class _Reader(dcp.FileSystemReader):
    @functools.cached_property
    def metadata(self) -> Metadata:
        """What .metadata holds, read once."""
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                return _Unpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not the metadata of a checkpoint of ours: {error}") from error

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return dataclasses.replace(self.metadata, storage_meta=StorageMeta(load_id=self.load_id))
