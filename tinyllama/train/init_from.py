"""Load the initial weights of a run that starts from another model (train.init_from)."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tinyllama import InputError
from tinyllama.checkpoint import metadata, reader
from tinyllama.checkpoint.resume import origin_of
from tinyllama.config.args import PretrainArgs
from tinyllama.config.model import NAMED_CONFIGS
from tinyllama.convert.weights import Weights, copy_into, locate, open_weights, read_config
from tinyllama.model import GPT
from tinyllama.train.collectives import from_rank_zero
from tinyllama.train.run import Run

# what a run may change of the model it starts from, if it says so itself
CHANGEABLE = ("block_size", "rope_base", "rope_condense_ratio")


def with_sizes(args: PretrainArgs, step_dir: Path | None) -> PretrainArgs:
    """Return ``args`` with the sizes of the model of train.init_from, if given, but for those that ``args`` give.

    A run that resumes, or branches off, from ``step_dir`` has them there, and needs neither the other model nor the
    setting any more.
    """
    start = args.train.init_from or (step_dir and origin_of(step_dir)["init_from"])
    if start is None:
        return args
    config = read_config(locate(start, say=_silent)) if step_dir is None else reader.read_model_config(step_dir)
    if config is None:
        return args
    name = config.name if args.model.name in NAMED_CONFIGS else args.model.name
    missing = {key: value for key, value in asdict(config).items() if getattr(args.model, key) is None}
    return replace(args, model=replace(args.model, **missing | {"name": name}))


def initial_weights(run: Run) -> Weights | None:
    """Open the weights of train.init_from; returns None for a run that draws them, or resumes its own checkpoint.

    A requeued job gives the same train.init_from again and must resume, so a checkpoint in its out_dir wins if it says
    that the first start of its run was from there. Raises InputError for a checkpoint of any other run, and for weights
    that are not of the run's sizes or were trained with another tokenizer.
    """
    start = run.args.train.init_from
    if start is None:
        return None
    if run.resume is not None:
        saved = origin_of(run.resume)["init_from"]
        if saved != str(Path(start).resolve()):
            raise InputError(
                f"{run.resume} is of a run that started from {saved or 'weights it drew'}, and train.init_from is "
                f"{start}: give another out_dir to start anew, or leave train.init_from out to go on"
            )
        return None
    weights = open_weights(run.start or locate(start, say=_silent), run.config)
    ours, theirs = run.config, weights.config
    errors = []
    for name, there in asdict(theirs).items():
        here = getattr(ours, name)
        if here == there or name in ("name", "vocab_size", "padding_multiple"):
            continue
        if name not in CHANGEABLE:
            errors.append(f"model.{name} is {here} and in {start} {there}: set model.{name} to that")
        elif getattr(run.args.model, name) is None:
            errors.append(f"model.{name} is {here} and in {start} {there}: give model.{name} yourself to change it")
    if ours.padded_vocab_size != theirs.padded_vocab_size:
        errors.append(
            f"model.vocab_size {ours.vocab_size} makes {ours.padded_vocab_size} rows and {start} has "
            f"{theirs.padded_vocab_size}: set model.vocab_size and model.padding_multiple to fit"
        )
    trained_with = weights.metadata["tokenizer_sha256"]
    others = [source.path for source in run.sources if source.tokenizer_sha256 not in (None, trained_with)]
    if trained_with and others:
        errors.append(f"{start} was trained with another tokenizer than {others[0]} was prepared with")
    if errors:
        raise InputError(*errors)
    return weights


def load_initial_weights(run: Run, model: GPT) -> Run:
    """Collective. Fill ``model`` with the weights of train.init_from, and return the run with where they are.

    ``model`` is left as it is where ``initial_weights`` returns None. Raises its InputError.
    """
    if run.args.train.init_from is not None and run.resume is None:
        # on one rank, as the run there may be saving: the ranks must not read different steps
        run = replace(run, start=from_rank_zero(partial(locate, run.args.train.init_from, print)))
    if (weights := initial_weights(run)) is not None:
        copy_into(model, weights)
        metadata.forget()
    return run


def _silent(line: str) -> None:
    """Say nothing, before the ranks have started: each would say it."""
