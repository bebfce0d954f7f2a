"""Average the weights of several steps of a run, which can stand in for part of a learning rate's decay.

See arXiv:2306.03241.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tinyllama import InputError
from tinyllama.checkpoint import reader
from tinyllama.convert.weights import Weights, open_weights


def open_average(path: str | Path, count: int) -> Weights:
    """Open the mean of the last ``count`` complete steps of a run, up to the one at ``path``.

    It is of float32, and its metadata are those of the last step and ``averaged_steps``. Reading a tensor holds that of
    one step beside the sum. Raises InputError for a ``path`` that is no step or run, fewer steps and steps of different
    models, and upon reading for a value that is not finite.
    """
    if count < 1:
        raise InputError(f"--average {count} is not a number of checkpoints: give 1 or more")
    if Path(path).is_file() or (Path(path) / "config.json").is_file():
        raise InputError(f"{path} is not a checkpoint of a run, and --average needs several: leave the flag out")
    steps = [open_weights(step_dir) for step_dir in _last_steps(reader.resolve(path), count)]
    last = steps[-1]
    for step in steps:
        if (step.config, step.metadata["tokenizer_sha256"]) != (last.config, last.metadata["tokenizer_sha256"]):
            raise InputError(f"{step.path} and {last.path} are of different models: average steps of one run")
    metadata = last.metadata | {"averaged_steps": [step.metadata["step"] for step in steps]}
    return replace(last, dtype=torch.float32, metadata=metadata, read=lambda name: _mean(steps, name))


def source(weights: Weights) -> str:
    """Say in a phrase where ``weights`` come from."""
    steps = weights.metadata.get("averaged_steps")
    return (
        str(weights.path) if steps is None else f"mean of steps {', '.join(map(str, steps))} in {weights.path.parent}"
    )


def _last_steps(last: Path, count: int) -> list[Path]:
    """Return the directories of ``count`` complete steps in their order, of which the last is given."""
    found = [last]
    while len(found) < count:
        before, passed_over = reader.newest(last.parent, before=found[0])
        reader.say_passed_over(passed_over, reader.to_stderr)
        if before is None:
            there = ", ".join(step_dir.name for step_dir in found)
            raise InputError(
                f"{last.parent} has {len(found)} complete steps up to {last.name}, not {count}: lower --average, or "
                f"give a later step (there is {there})"
            )
        found.insert(0, before)
    return found


def _mean(steps: Sequence[Weights], name: str) -> Tensor:
    """Return the mean of a tensor, summed in float64, which is exact for steps that are all the same."""
    total: Tensor | None = None
    for step in steps:
        tensor = step.read(name)
        if not tensor.isfinite().all():
            raise InputError(f"{step.path} has values in {name} that are not finite: average steps before it")
        total = tensor.double() if total is None else total.add_(tensor)
        del tensor  # before the next is read
    assert total is not None  # there is at least one step
    return total.div_(len(steps)).float()
