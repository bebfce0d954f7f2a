"""Pretrain a model: the recipe, to be read from top to bottom.

    python pretrain/train.py --config configs/pretrain/tinyllama_1.1b.yaml --train.max_steps 20
    srun --nodes 2 --ntasks-per-node 8 python pretrain/train.py --config configs/pretrain/tinyllama_1.1b.yaml

Exit codes: 0 done; 2 bad input or config; 75 stopped by a signal or by train.max_time with a checkpoint: the same
command resumes; 1 anything else.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricOptimizer

from tinyllama.checkpoint import resume
from tinyllama.checkpoint.state import TrainState
from tinyllama.checkpoint.writer import Checkpointer, CheckpointError
from tinyllama.config import cli
from tinyllama.config.args import PretrainArgs, check
from tinyllama.data.loader import Loader, on_device, validation_batches
from tinyllama.data.packed import check_datasets, open_all, tokenizer_of
from tinyllama.model import GPT
from tinyllama.monitor.console import show_summary, start_summary
from tinyllama.monitor.metrics import RunLog, max_memory_gb
from tinyllama.monitor.rows import Row
from tinyllama.monitor.watchdog import Watchdog
from tinyllama.train import evaluate, lock
from tinyllama.train.anomaly import Guard
from tinyllama.train.as_rank import as_rank
from tinyllama.train.budget import gradient_accumulation
from tinyllama.train.collectives import rank_map, refuse_differences, set_timeout
from tinyllama.train.garbage import collect_gc, freeze_gc
from tinyllama.train.init_from import initial_weights, load_initial_weights, with_sizes
from tinyllama.train.launch import find_world, start_ranks
from tinyllama.train.optim import build_optimizer, check_optimizer
from tinyllama.train.parallel import build_fabric, check_dtypes, reshard
from tinyllama.train.preemption import Preemption, is_planned
from tinyllama.train.run import Run, choose_ops, mix
from tinyllama.train.sample_texts import open_sample_texts
from tinyllama.train.start import load_checkpoint, start_from
from tinyllama.train.step import TrainStep, loss_function
from tinyllama.train.step_clock import StepClock

DONE, FAILED, RESUMABLE = 0, 1, 75  # exit codes


def setup(args: PretrainArgs) -> Run:
    """Find every error of the input before anything is started or written."""
    step_dir = resume.to_resume(Path(args.out_dir), args.train.resume, say=lambda line: None)  # rank 0 says it later
    config = check(args := with_sizes(args, step_dir))
    check_optimizer(args.optim)
    world = find_world(args.parallel)
    accumulation = gradient_accumulation(args.train, world.size)
    folders = [[source.path for source in group] for group in (args.data.sources, args.data.validation)]
    sources, validation = open_all(*folders)
    check_datasets([*sources, *validation], vocab_size=config.vocab_size, block_size=config.block_size)
    mixture = mix(args, sources, config.block_size, accumulation)
    ops = choose_ops(args, config, [*sources, *validation])
    sample_texts = open_sample_texts(args.eval, config, tokenizer_of(sources)["tokenizer_sha256"])
    run = Run(args, config, world, sources, validation, mixture, accumulation, ops, sample_texts=sample_texts)
    run = start_from(step_dir, run)
    initial_weights(run)  # only for its errors; main() reads the weights, once every rank has started
    return run


def main(run: Run) -> int:
    """Start every rank, build the model, resume if there is something to resume from, and train."""
    args = run.args
    fabric = build_fabric(run.world, args.parallel, args.train)
    start_ranks(fabric, args.train.start_timeout)
    refuse_differences(run.shared_settings())
    preemption = Preemption(args.train.max_time)
    gpt, model, optimizer = build(run, fabric)
    dtypes = check_dtypes(gpt, args.train)
    job_id = os.environ.get("SLURM_JOB_ID")
    with contextlib.nullcontext() if args.dry_run else lock.run_lock(run.out_dir, job_id):
        run, state = load_checkpoint(run, gpt, optimizer.optimizer)
        run = load_initial_weights(run, gpt)
        hosts = rank_map()
        if fabric.is_global_zero:
            show_summary("pretrain", start_summary(run, dtypes, hosts))
        if args.dry_run:
            return DONE
        rank, timeouts = fabric.global_rank, {"first_timeout": args.train.start_timeout, "timeout": args.train.timeout}
        with (
            Watchdog(run.out_dir, rank=rank, world_size=fabric.world_size, **timeouts) as watchdog,
            RunLog(run, state.step if run.resume else None, is_rank_zero=rank == 0) as log,
        ):
            code = fit(Training(run, fabric, gpt, model, optimizer, state, preemption, watchdog, log))
    fabric.barrier()  # Fabric's launcher kills the ranks that are still alive 5 s after another has ended
    return code


def build(run: Run, fabric: Fabric) -> tuple[GPT, torch.nn.Module, _FabricOptimizer]:
    """Return the model, sharded and initialized, Fabric's wrapper of it, and Fabric's wrapper of its optimizer."""
    with torch.device("meta"):
        gpt = GPT(run.config, run.ops)
    model = fabric.setup_module(gpt)
    optimizer = fabric.setup_optimizers(build_optimizer(gpt, run.args.optim, run.args.train.precision))
    assert isinstance(optimizer, _FabricOptimizer)  # not a list: one optimizer was given
    return gpt, model, optimizer


def fit(training: "Training") -> int:
    """Train to the last step, a signal or a failure; returns the exit code."""
    training.log.start(training.state.step)
    while not training.failed:
        if training.validation_is_due():
            training.validate()
        training.finish_save()  # logs a background save, or its failure, once it has ended
        training.agree_on_stop()
        if training.save_is_due():
            training.save()
        if training.is_done or training.stop_reason or training.failed:
            break
        training.step()
        training.log_step()
    return training.end()


class Training:
    """A run in training on this rank: the events that ``fit`` puts in order."""

    def __init__(
        self,
        run: Run,
        fabric: Fabric,
        gpt: GPT,
        model: torch.nn.Module,
        optimizer: _FabricOptimizer,
        state: TrainState,
        preemption: Preemption,
        watchdog: Watchdog,
        log: RunLog,
    ) -> None:
        args, settings = run.args, cli.dump(run.resolved())
        self.run, self.fabric, self.gpt, self.state = run, fabric, gpt, state
        self.preemption, self.watchdog, self.log = preemption, watchdog, log
        watchdog.on_stall = log.failed
        self.optimizer = optimizer.optimizer
        self.first_step = self.saved_step = state.step
        self.stop_reason: str | None = None
        self.failed = False  # whether skipped steps have ended the run for good
        self.save_owed = False  # whether a due save waits for an accepted step, as skipped ones may yet end the run
        origin = resume.origin(run.out_dir, run.resume, asdict(args.train))
        self.checkpointer = Checkpointer(
            run.out_dir / "checkpoints",
            config=settings,
            metadata=run.fixed_metadata() | run.tokenizer_metadata() | log.metadata() | {"origin": origin},
            keep_last=args.checkpoint.keep_last,
            keep_every=args.checkpoint.keep_every,
            asynchronous=args.checkpoint.asynchronous,
            say=lambda text: log.event("set_aside", text),
        )
        self.guard = Guard(args.train, self.optimizer, state, run.world.replicas, fabric.device)
        self.loss_function = loss_function(model, args.data, run.sources[0].eos_id)
        log.watch_memory(gpt, self.optimizer)
        sizes = run.accumulation, run.tokens_per_step
        self.train_step = TrainStep(args, fabric, gpt, self.loss_function, optimizer, self.guard, *sizes)
        self.batch_layout = {  # shape of a micro-batch, and this rank's place; the same in training and validation
            "block_size": run.config.block_size,
            "vocab_size": run.config.vocab_size,
            "micro_batch_size": args.train.micro_batch_size,
            "rank": fabric.global_rank,
            "world_size": fabric.world_size,
        }
        self.loader = Loader(
            run.sources,
            run.mixture,
            **self.batch_layout,
            global_batch_size=args.train.global_batch_size,
            start_sample=state.samples,
        )
        self.clock = StepClock(run, gpt, fabric.device)
        self.batches = self.clock.timed(on_device(self.loader, fabric.device))

    @property
    def is_done(self) -> bool:
        """Return whether every step of the run is done."""
        return self.state.step == self.run.max_steps

    def step(self) -> None:
        """Do one optimizer step. Nothing in it waits for the device, except in the first step in float8."""
        self.watchdog.beat(self.state.step, "step")
        collect_gc(self.state.step)
        self.clock.resume()
        self.lr = self.run.lr_at(self.state.step)
        self.train_step(self.state, self.batches, self.lr)
        self.clock.step(self.run.tokens_per_step)
        if self.state.step == self.first_step + 1:  # everything is compiled now, and the ranks run evenly
            freeze_gc()
            set_timeout(self.run.args.train.timeout + 60, keep=[self.checkpointer.group])

    def log_step(self) -> None:
        """Log skipped steps and, every log.interval steps and at the end, a row.

        In steps without a row, results are read one step late, so that nothing waits for the device.
        """
        run, state = self.run, self.state
        due = state.step % run.args.log.interval == 0 or self.is_done
        results = self.guard.poll(late=0 if due else 1)
        self.failed = self.log.record_skips(results)
        if due and not self.failed:
            speed = self.clock.end_interval()
            row: Row = {"step": state.step, "tokens": state.tokens, "loss": results[-1].loss, "lr": self.lr}
            row |= {"grad_norm": results[-1].grad_norm, "skipped": state.skipped}
            row |= {"max_memory_gb": max_memory_gb(self.fabric.device)} | self.clock.times(speed) | self.log.waits()
            self.log.row(row, seconds_left=(run.max_steps - state.step) * run.tokens_per_step / speed)
        self.clock.pause()
        self.log.trace.after(state.step)

    def agree_on_stop(self) -> None:
        """Agree with every rank on whether to stop: for a signal, the end of the time or a failed save."""
        self.stop_reason = self.preemption.agreed_reason()

    def validation_is_due(self) -> bool:
        """Return whether a validation is due: at the start, every eval.interval steps and at the end, once a step."""
        due = self.state.step % self.run.args.eval.interval == 0 or self.is_done
        return bool(self.run.validation) and due and self.state.validated < self.state.step

    def validate(self) -> None:
        """Log the mean losses on all validation tokens, and sample texts, unless a stop is requested meanwhile."""
        run, step = self.run, self.state.step

        def stop() -> bool:
            self.watchdog.beat(step, "validation")
            return self.preemption.agreed_reason() is not None

        with self.log.time_spent("validation", step):
            batches = validation_batches(run.validation, **self.batch_layout, max_samples=run.args.eval.max_samples)
            found = evaluate.held_out_losses(self.loss_function, batches, run.validation, self.fabric.device, stop)
            texts = run.sample_texts.texts(self.gpt, self.fabric.device, stop) if run.sample_texts else []
            reshard(self.gpt)
        if found is not None and texts is not None:
            self.state.validated = step
            self.log.row({"step": step, "tokens": self.state.tokens} | found)
            self.log.sample_texts(step, self.state.tokens, texts)

    def save_is_due(self) -> bool:
        """Return whether a save is due: every checkpoint.interval steps, before a stop and at the end."""
        due = self.state.step % self.run.args.checkpoint.interval == 0 or self.save_owed
        return self.saved_step < self.state.step and bool(due or self.is_done or self.stop_reason)

    def save(self) -> None:
        """Save a checkpoint, in the background if training continues; not while skipped steps may yet end the run."""
        self.failed = self.log.record_skips(self.guard.poll(late=0))
        self.save_owed = self.state.skipped_in_a_row > 0 and not (self.is_done or self.stop_reason)
        if self.failed or self.save_owed:
            return
        self.watchdog.beat(self.state.step, "checkpoint")
        wait = bool(self.is_done or self.stop_reason) or not self.run.args.checkpoint.asynchronous
        with self.failures_recorded(), self.log.time_spent("checkpoints", self.state.step, is_background=not wait):
            self.finish_save(wait=True)
            self.state.float8_exponents = self.gpt.scaling.exponents() if self.gpt.scaling else []
            self.checkpointer.save(self.state, self.gpt, self.optimizer, wait=wait)
            self.saved_step = self.state.step

    def finish_save(self, wait: bool = False) -> None:
        """Log the background save, or its failure, if it has ended; with ``wait``, wait for it to end."""
        if wait or self.checkpointer.done():
            with self.failures_recorded():
                self.log.published(self.checkpointer.wait())

    @contextlib.contextmanager
    def failures_recorded(self) -> Iterator[None]:
        """Log a failed save; stop the run if the next one would fail, too, or if checkpoint.on_failure is stop."""
        try:
            yield
        except CheckpointError as error:
            self.log.event("checkpoint_failed", f"error: {error}", step=self.state.step, error=str(error))
            if error.fatal or self.run.args.checkpoint.on_failure == "stop":
                self.preemption.request(Preemption.FAILED_SAVE)

    def end(self) -> int:
        """Finish what is being written and say how the run ended; returns the exit code."""
        self.loader.close()
        self.watchdog.beat(self.state.step, "checkpoint")  # writing one may take longer than a step
        self.finish_save(wait=True)
        if self.failed:
            return FAILED
        if self.saved_step < self.state.step:
            self.log.unsaved(self.state.step)
            return FAILED
        stopped_by = None if self.is_done else self.stop_reason
        self.log.end(self.state, stopped_by)
        if stopped_by is None:
            return DONE
        is_saved = self.run.resume is not None or self.state.step > 0  # not if it was stopped before its first step
        return RESUMABLE if is_saved and is_planned(stopped_by) else FAILED


if __name__ == "__main__":
    cli.run(lambda: as_rank(lambda: main(setup(cli.parse(PretrainArgs)))))
