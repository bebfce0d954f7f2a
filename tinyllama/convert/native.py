"""Write foreign weights as one of our step directories.

Training, generation, evaluation and export already read step directories, at any world size. A model that others
trained becomes a step 0 without optimizer state.
"""

import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from tinyllama import __version__
from tinyllama.checkpoint import hashes, names, reader
from tinyllama.checkpoint.writer import HashingWriter
from tinyllama.config import cli
from tinyllama.convert import folder
from tinyllama.convert.weights import Weights

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")


def write(output: Path, weights: Weights, check: Callable[[Path], None] | None = None) -> Path:
    """Write ``weights`` as ``output``/step-00000000, with the tokenizer beside them, and return that directory.

    It appears completely or not at all, and replaces an earlier conversion. ``check`` is called with the step directory
    before that gets its name, which it does not if ``check`` raises. Raises InputError for an ``output`` that
    cannot be written or has files that no conversion wrote.
    """
    metadata = {key: weights.metadata[key] for key in ("tokenizer_sha256", "bos_id", "eos_id", "eos_ids", "bos")}
    state = {"format_version": reader.FORMAT_VERSION, "step": 0, "samples": 0, "tokens": 0, **metadata}
    state |= {"converted_from": str(weights.path), "versions": {"tinyllama": __version__, "torch": torch.__version__}}
    with folder.create(output, weights.path, {"from": str(weights.path)}) as partial:
        step_dir = names.step_dir(partial, 0)
        step_dir.mkdir()
        tensors = {f"model.{name}": tensor for name, tensor in weights.load().items()}
        writer = HashingWriter(step_dir)
        with warnings.catch_warnings():  # DCP warns that there is no process group, which is intended
            warnings.simplefilter("ignore", UserWarning)
            try:
                dcp.save(tensors, storage_writer=writer, no_dist=True)
            except CheckpointException as error:  # a BaseException, whose text is a traceback
                cause = error.failures[0][0]
                hidden = cause.__context__  # torch.save hides an OSError behind a RuntimeError
                raise hidden if isinstance(hidden, OSError) else cause from None
        config = cli.dump({"model": asdict(weights.config)})
        for name, payload in hashes.last_files(state, config, writer.hashes).items():
            (step_dir / name).write_bytes(payload)
        for name in TOKENIZER_FILES:
            if (weights.path / name).is_file():
                shutil.copyfile(weights.path / name, partial / name)
        if check is not None:
            check(step_dir)
    return names.step_dir(output, 0)
