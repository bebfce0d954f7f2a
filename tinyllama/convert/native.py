"""Weights of others as a step directory of ours.

A step directory is what training, generation, evaluation and export read already, at any world size and a tensor at a
time; one of step 0 without an optimizer's state is what a model that others trained is to us.
"""

import json
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import WriteItem

from tinyllama import __version__
from tinyllama.checkpoint import names, reader
from tinyllama.config import cli
from tinyllama.convert import folder, layout
from tinyllama.convert.weights import Weights

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")


def write(output: Path, weights: Weights) -> Path:
    """Write ``weights`` as ``output``/step-00000000, with the tokenizer that lies beside them; gives that directory.

    It appears whole, or not at all; an earlier conversion is replaced. Raises InputError for an ``output`` that cannot
    be written or has files that no conversion wrote.
    """
    facts = {key: weights.facts[key] for key in ("tokenizer_sha256", "bos_id", "eos_id")}
    state = {"format_version": reader.FORMAT_VERSION, "step": 0, "samples": 0, "tokens": 0, **facts}
    state |= {"converted_from": str(weights.path), "versions": {"tinyllama": __version__, "torch": torch.__version__}}
    with folder.create(output, weights.path, {"from": str(weights.path)}) as unfinished:
        step_dir = names.step_dir(unfinished, 0)
        step_dir.mkdir()
        empty = {
            f"model.{name}": torch.empty(shape, dtype=weights.dtype, device="meta")
            for name, shape in layout.shapes(weights.config).items()
        }
        with warnings.catch_warnings():  # it warns that there is no process group, which is what we want
            warnings.simplefilter("ignore", UserWarning)
            try:
                dcp.save(empty, storage_writer=_Writer(step_dir), planner=_Planner(weights), no_dist=True)
            except CheckpointException as error:  # no Exception, and its text is a trace
                cause = error.failures[0][0]
                hidden = cause.__context__  # what torch.save makes a RuntimeError of
                raise hidden if isinstance(cause, RuntimeError) and isinstance(hidden, OSError) else cause from None
        (step_dir / "config.yaml").write_text(cli.dump({"model": asdict(weights.config)}), encoding="utf-8")
        (step_dir / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
        for name in TOKENIZER_FILES:
            if (weights.path / name).is_file():
                shutil.copyfile(weights.path / name, unfinished / name)
    return names.step_dir(output, 0)


class _Planner(DefaultSavePlanner):
    """Plans with tensors that have no memory, and reads each when it is its turn to be written."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._weights = weights

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._weights.read(write_item.index.fqn.removeprefix("model.")).contiguous()


class _Writer(dcp.FileSystemWriter):
    def __init__(self, path: Path) -> None:
        super().__init__(path, per_thread_copy_ahead=0)  # reads one tensor at a time, with a GPU too

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # the usual one names the path of the day, as a pickled Path
