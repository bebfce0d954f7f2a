"""Start a run: from nothing, or from the checkpoint that it resumes."""

from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tinyllama import InputError
from tinyllama.checkpoint import reader
from tinyllama.checkpoint.resume import is_in_run, refuse_changes, to_resume
from tinyllama.checkpoint.state import TrainState, from_json
from tinyllama.data.metadata import MANIFEST
from tinyllama.model import GPT
from tinyllama.train.budget import total_steps
from tinyllama.train.collectives import from_rank_zero
from tinyllama.train.run import Run

FIRST_ORDER = {"version": 1, "window": 1024}
"""Order of the samples of a checkpoint from before its version and window were recorded."""


def start_from(step_dir: Path | None, run: Run) -> Run:
    """Return the run as it starts from the checkpoint ``step_dir``, or from nothing.

    Raises InputError for an out_dir of packed data, a checkpoint that the run cannot continue, and a wrong length.
    """
    if (run.out_dir / MANIFEST).exists() or any(run.out_dir.glob("*.bin")):
        move = f"move its {MANIFEST} and its shards (.bin, .idx.npy and .json) to another"
        hint = "give the run a folder of its own" if step_dir is None else move
        raise InputError(f"out_dir {run.out_dir} holds packed data: {hint}")
    saved = {} if step_dir is None else reader.read_state(step_dir)
    run = replace(run, resume=step_dir, done=from_json(saved))
    if step_dir is not None:
        _check_resume(step_dir, saved, run)
    total_steps(run.args, run.config.block_size, run.num_blocks, run.done)
    if run.args.log.profile and run.args.log.profile[-1] > run.max_steps:
        raise InputError(f"log.profile {run.args.log.profile} ends after the run's {run.max_steps} steps: lower it")
    return run


def _check_resume(step_dir: Path, saved: dict[str, Any], run: Run) -> None:
    """Raise InputError for a checkpoint of other data, of another model, or beyond the run's budget."""
    now = run.fixed_metadata()
    then = {key: saved.get(key) for key in now}
    if isinstance(then["data"], dict):
        then["data"] = {"order": FIRST_ORDER} | then["data"]
    refuse_changes(step_dir, then, now)
    optimizer = reader.read_settings(step_dir).get("optim", {}).get("name", "adamw")
    if optimizer != run.args.optim.name:
        raise InputError(
            f"{step_dir} holds the state of optim.name {optimizer}, and this run's is {run.args.optim.name}: put it "
            "back, or give its weights as train.init_from in another out_dir"
        )
    # the last step may end beyond the budget, but not begin there
    before = run.done.samples - run.args.train.global_batch_size
    spent = {
        "steps": run.done.step - 1,
        "tokens": before * run.config.block_size,
        "epochs": Fraction(before, run.num_blocks),
    }
    for unit, amount in spent.items():
        budget = getattr(run.args.train, f"max_{unit}")
        if budget is not None and amount >= budget:
            raise InputError(f"{step_dir} is beyond the run's {budget} {unit}: raise train.max_{unit}")


def load_checkpoint(run: Run, model: GPT, optimizer: torch.optim.Optimizer) -> tuple[Run, TrainState]:
    """Collective. Load the step that the run resumes from; return the run as it resumes, and where it stands.

    It is looked for again, as another run may have saved since: call it with the run lock held. A damaged step of
    out_dir that train.resume does not name is passed over for the one before it. Raises InputError if there is none.
    """
    # on one rank, as a file system may show ranks different newest ones
    step_dir = from_rank_zero(lambda: to_resume(run.out_dir, run.args.train.resume))
    while True:
        run = start_from(step_dir, run)
        if run.resume is None:
            return run, run.with_schedule(TrainState())
        try:
            state = run.with_schedule(reader.load(run.resume, model, optimizer))
            if model.scaling is not None:
                model.scaling.resume(state.float8_exponents, run.resume)
            return run, state
        except reader.DamagedError as error:
            how = run.args.train.resume
            if how != "auto" and (is_in_run(run.out_dir, Path(how)) or not is_in_run(run.out_dir, run.resume)):
                raise
            folder = run.resume.parent
            step_dir, passed_over = from_rank_zero(partial(reader.newest, folder, before=run.resume))
            if step_dir is None:
                hint = f"no step before it is complete; move {folder} away to start anew"
                raise InputError(f"{error.problem}: {hint}") from None
            if dist.get_rank() == 0:
                reader.say_passed_over([error.problem, *passed_over], print)
