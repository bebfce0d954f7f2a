"""Load the initial weights of a run that starts from another model (train.init_from)."""

from dataclasses import fields
from pathlib import Path

from tinyllama import InputError
from tinyllama.checkpoint import reader
from tinyllama.config.model import ModelConfig
from tinyllama.convert.weights import Weights, open_weights
from tinyllama.train.run import Run

# what a run may change of the model it starts from, if it says so itself
CHANGEABLE = ("block_size", "rope_base", "rope_condense_ratio")


def initial_weights(run: Run) -> Weights | None:
    """Those of train.init_from; None for a run that draws them, or goes on from its own checkpoint.

    A requeued job gives the same train.init_from again and must go on, so a checkpoint in its out_dir wins if it says
    that its run started from there; that of any other run is refused, as are weights that are not of the run's sizes
    or were trained with another tokenizer: InputError.
    """
    start = run.args.train.init_from
    if start is None:
        return None
    if run.resume is not None:
        saved = reader.read_settings(run.resume).get("train", {}).get("init_from")
        if saved is None or Path(saved).resolve() != Path(start).resolve():
            raise InputError(
                f"{run.resume} is of a run that started from {saved or 'weights it drew'}, and train.init_from is "
                f"{start}: give another out_dir to start anew, or leave train.init_from out to go on"
            )
        return None
    weights = open_weights(start, run.config)
    ours, theirs = run.config, weights.config
    errors = []
    for name in (field.name for field in fields(ModelConfig)):
        if name in ("name", "vocab_size", "padding_multiple") or getattr(ours, name) == getattr(theirs, name):
            continue
        if name not in CHANGEABLE or getattr(run.args.model, name) is None:
            errors.append(
                f"model.{name} is {getattr(ours, name)} and in {start} {getattr(theirs, name)}: {_hint(name)}"
            )
    if ours.padded_vocab_size != theirs.padded_vocab_size:
        errors.append(
            f"model.vocab_size {ours.vocab_size} makes {ours.padded_vocab_size} rows and {start} has "
            f"{theirs.padded_vocab_size}: set model.vocab_size and model.padding_multiple to fit"
        )
    trained_with, prepared_with = weights.facts["tokenizer_sha256"], run.sources[0].tokenizer_sha256
    if trained_with and prepared_with and trained_with != prepared_with:
        errors.append(f"{start} was trained with another tokenizer than {run.sources[0].path} was prepared with")
    if errors:
        raise InputError(*errors)
    return weights


def _hint(name: str) -> str:
    return f"give model.{name} yourself to change it" if name in CHANGEABLE else f"set model.{name} to that"
