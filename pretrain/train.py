"""Pretrain a model: the recipe, to be read from top to bottom.

    python pretrain/train.py --config configs/pretrain/tinyllama_1.1b.yaml --train.max_steps 20
    srun --nodes 2 --ntasks-per-node 8 python pretrain/train.py --config configs/pretrain/tinyllama_1.1b.yaml

Exit codes: 0 done; 2 bad input or config; 75 stopped by a signal or by train.max_time with a checkpoint: the same
command goes on; 1 anything else.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricOptimizer

from tinyllama import InputError, atomic
from tinyllama.checkpoint import reader, resume
from tinyllama.checkpoint.state import TrainState
from tinyllama.checkpoint.writer import Checkpointer, CheckpointError
from tinyllama.config import cli
from tinyllama.config.args import PretrainArgs, check
from tinyllama.config.model import ModelConfig
from tinyllama.convert.weights import copy_into
from tinyllama.data.loader import Loader, on_device, validation_batches
from tinyllama.data.mixture import Mixture
from tinyllama.data.packed import PackedDataset, check_datasets, open_packed
from tinyllama.model import GPT
from tinyllama.monitor.console import Row, show_card, start_card
from tinyllama.monitor.metrics import RunLog, max_memory_gb
from tinyllama.monitor.watchdog import Watchdog
from tinyllama.ops import attention, choice, float8
from tinyllama.throughput import Meter, flops_per_token, peak_flops
from tinyllama.train import evaluate, lock
from tinyllama.train.anomaly import Guard
from tinyllama.train.collectives import collect_gc, freeze_gc, set_timeout
from tinyllama.train.init_from import start_weights
from tinyllama.train.launch import rank_map, ranks, shard_size
from tinyllama.train.optim import build_optimizer, clip, local_gradients, set_lr
from tinyllama.train.parallel import build_fabric, dtypes, reshard, sync_gradients
from tinyllama.train.preemption import Preemption
from tinyllama.train.run import Run, gradient_accumulation, total_steps

DONE, DEFECT, STOPPED = 0, 1, 75
Losses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def setup(args: PretrainArgs) -> Run:
    """Find every fault of the input before anything is started or written."""
    config = check(args)
    devices, nodes = ranks(args.parallel)
    shard_size(args.parallel, devices, nodes)
    accumulation = gradient_accumulation(args.train, devices * nodes)
    sources = [open_packed(source.path) for source in args.data.sources]
    validation = [open_packed(source.path) for source in args.data.validation]
    check_datasets([*sources, *validation], vocab_size=config.vocab_size, block_size=config.block_size)
    num_blocks = [source.num_blocks(config.block_size) for source in sources]
    if sum(num_blocks) < args.train.global_batch_size:
        raise InputError(
            f"data.sources hold {sum(num_blocks)} blocks of {config.block_size + 1} tokens, less than one batch of "
            f"train.global_batch_size {args.train.global_batch_size}: give more data or lower it"
        )
    weights = [source.weight for source in args.data.sources]
    final_weights = [source.final_weight for source in args.data.sources]
    ramp = -(-(args.data.ramp_tokens or 0) // config.block_size)  # in samples
    fingerprints = [source.fingerprint for source in sources]
    mixture = Mixture(num_blocks, weights, args.data.seed, fingerprints, final_weights, ramp)
    max_steps = total_steps(args, config.block_size, sum(num_blocks))
    ops = choose_ops(args, config, [*sources, *validation])
    step_dir = resume.to_resume(Path(args.out_dir), args.train.resume)
    run = Run(args, config, sources, validation, mixture, accumulation, max_steps, ops, step_dir)
    if run.resume is not None:
        saved = reader.read_state(run.resume)
        now = run.data_facts()
        resume.refuse_changes(run.resume, {key: saved.get(key) for key in now}, now)
        if saved["step"] > max_steps:
            raise InputError(f"{run.resume} is beyond the run's {max_steps} steps: raise train.max_steps")
    start_weights(run)
    return run


def choose_ops(args: PretrainArgs, config: ModelConfig, datasets: list[PackedDataset]) -> dict[str, str]:
    """The backend of each operation on the device that this run will have."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.train.precision == "float8" and (fault := float8.fault(device)):
        raise InputError(f"train.precision float8 cannot be used: {fault}")
    for dataset in datasets if args.data.document_mask else []:
        if not dataset.eos:
            raise InputError(f"data.document_mask needs documents that end with eos: prepare {dataset.path} again so")
    masked = args.data.document_mask
    return choice.resolve(asdict(args.ops), config, device, precision=args.train.precision, masked=masked)


def main(run: Run) -> int:
    """Start every rank, build the model, resume if there is something to resume from, and train."""
    args = run.args
    fabric = build_fabric(args.parallel, args.train)
    fabric.launch()
    run = replace(run, resume=fabric.broadcast(run.resume))  # a file system may show ranks different newest ones
    preemption = Preemption(args.train.max_time)
    gpt, model, optimizer = build(run, fabric)
    if (weights := start_weights(run)) is not None:
        copy_into(gpt, weights)
    state = TrainState() if run.resume is None else reader.load(run.resume, gpt, optimizer.optimizer)
    hosts = rank_map()
    if fabric.is_global_zero:
        shard = shard_size(args.parallel, *ranks(args.parallel))
        show_card("pretrain", start_card(run, fabric.world_size, shard, dtypes(gpt), hosts))
    if args.dry_run:
        return DONE
    rank, times = fabric.global_rank, {"first_timeout": args.train.start_timeout, "timeout": args.train.timeout}
    with (
        lock.held(run.out_dir, os.environ.get("SLURM_JOB_ID")),
        Watchdog(run.out_dir, rank=rank, world_size=fabric.world_size, **times) as watchdog,
        RunLog(run, state.step if run.resume else None, speaks=rank == 0) as log,
    ):
        code = fit(run, fabric, gpt, model, optimizer, state, preemption, watchdog, log)
    fabric.barrier()  # Fabric's launcher ends a rank that outlives another by more than seconds
    return code


def build(run: Run, fabric: Fabric) -> tuple[GPT, torch.nn.Module, _FabricOptimizer]:
    """The model, sharded and with its start weights, as itself and as Fabric calls it, and its optimizer."""
    with torch.device("meta"):
        gpt = GPT(run.config, run.ops)
    model = fabric.setup_module(gpt)
    return gpt, model, fabric.setup_optimizers(build_optimizer(gpt, run.args.optim))


def fit(
    run: Run,
    fabric: Fabric,
    gpt: GPT,
    model: torch.nn.Module,
    optimizer: _FabricOptimizer,
    state: TrainState,
    preemption: Preemption,
    watchdog: Watchdog,
    log: RunLog,
) -> int:
    """Train from ``state`` to the last step, a signal or a stop; gives the exit code."""
    args = run.args
    settings = cli.dump(run.resolved())
    if fabric.is_global_zero:
        atomic.write(run.out_dir / "config.yaml", settings.encode())
    said, facts = f"start    {run.origin} at step {state.step}", {"step": state.step, "world_size": fabric.world_size}
    changed = resume.changed(run.resume, run.resolved()) if run.resume else {}
    if changed:
        said += "\nchanged  " + ", ".join(f"{key} {was} -> {now}" for key, (was, now) in changed.items())
    log.event("start", said, **facts, ops=run.ops, changed=changed)
    checkpointer = Checkpointer(
        run.out_dir / "checkpoints",
        config=settings,
        facts=run.data_facts() | run.tokenizer_facts() | log.facts(),
        keep_last=args.checkpoint.keep_last,
        keep_every=args.checkpoint.keep_every,
        asynchronous=args.checkpoint.asynchronous,
    )
    copies = fabric.world_size // shard_size(args.parallel, *ranks(args.parallel))
    guard = Guard(args.train, optimizer.optimizer, state, copies, fabric.device)
    peak = peak_flops(torch.cuda.get_device_name()) if fabric.device.type == "cuda" else None
    meter = Meter()
    loader = Loader(
        run.sources,
        run.mixture,
        block_size=run.config.block_size,
        vocab_size=run.config.vocab_size,
        global_batch_size=args.train.global_batch_size,
        micro_batch_size=args.train.micro_batch_size,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        start_sample=state.samples,
    )
    batches = on_device(loader, fabric.device)
    losses = losses_of(run, model)
    first, saved, asked, fatal = state.step, state.step, None, None

    @contextlib.contextmanager
    def told() -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            log.event("checkpoint_failed", f"error: {error}", step=state.step, error=str(error))
            if args.checkpoint.on_failure == "stop":
                preemption.ask(Preemption.FAILED_SAVE)

    while True:
        last = state.step == run.max_steps
        if run.validation and (state.step % args.eval.interval == 0 or last) and state.validated < state.step:
            with log.clock("validation", state.step):
                val_loss = validate(run, fabric, gpt, losses, preemption, watchdog, state.step)
            if val_loss is not None:
                state.validated = state.step
                log.row({"step": state.step, "tokens": state.tokens, "val_loss": val_loss})
        if checkpointer.done():
            with told():
                checkpointer.wait()
        asked = preemption.asked()
        if saved < state.step and (state.step % args.checkpoint.interval == 0 or last or asked):
            fatal = log.verdicts(guard.verdicts(late=0))
            if fatal:
                break
            watchdog.beat(state.step, "checkpoint")
            with told():
                checkpointer.wait()
            with told(), log.clock("checkpoints", state.step):
                checkpointer.save(state, gpt, optimizer.optimizer, wait=bool(last or asked))
                saved = state.step
        if last or asked:
            break
        watchdog.beat(state.step, "step")
        collect_gc(state.step)
        meter.go_on()

        lr = run.lr_at(state.step)
        set_lr(optimizer, lr)
        loss_sum = torch.zeros((), device=fabric.device)
        for micro_batch in range(run.accumulation):
            input_ids, targets = next(batches)
            sync_gradients(gpt, micro_batch == run.accumulation - 1, args.parallel)
            loss = losses(input_ids, targets)  # summed over the tokens
            # FSDP averages gradients over the ranks: what comes out is that of the mean over the step's tokens
            fabric.backward(loss * (fabric.world_size / run.tokens_per_step))
            loss_sum += loss.detach()
        state.step += 1
        state.samples += args.train.global_batch_size
        state.tokens += run.tokens_per_step
        gradients = local_gradients(gpt)
        norm = guard.judge(state.step, loss_sum, run.tokens_per_step, gradients)
        clip(gradients, norm, args.optim.max_norm)
        optimizer.step()  # a step that must not reach the weights leaves them as they are
        optimizer.zero_grad()
        meter.step(run.tokens_per_step)
        if state.step == first + 1:  # all is compiled, and the ranks run evenly
            freeze_gc()
            set_timeout(args.train.timeout + 60, keep=[checkpointer.group])

        due = state.step % args.log.interval == 0 or state.step == run.max_steps
        verdicts = guard.verdicts(late=0 if due else 1)  # 0 waits for the device
        fatal = log.verdicts(verdicts)
        if fatal:
            break
        if due:
            speed = meter.lap()
            row: Row = {"step": state.step, "tokens": state.tokens, "loss": verdicts[-1].loss, "lr": lr}
            row |= {"grad_norm": verdicts[-1].grad_norm, "tokens_per_second": speed, "skipped": state.skipped}
            row["mfu"] = speed * flops_per_token(run.config) / (peak * fabric.world_size) if peak else None
            row["max_memory_gb"] = max_memory_gb(fabric.device)
            log.row(row, seconds_left=(run.max_steps - state.step) * run.tokens_per_step / speed)
        meter.pause()
    loader.close()
    with told():
        checkpointer.wait()
    if fatal or saved < state.step:
        return DEFECT
    stopped_by = None if last else asked
    log.end(state, stopped_by)
    if stopped_by == "checkpoint.on_failure":
        return DEFECT
    return STOPPED if stopped_by else DONE


def losses_of(run: Run, model: torch.nn.Module) -> Losses:
    """The model as a function of input ids and targets, both (B, T), to their summed loss."""
    data, eos_id = run.args.data, run.sources[0].eos_id
    if not data.document_mask or eos_id is None:
        return model
    return lambda ids, targets: model(ids, targets, attention.documents(ids, eos_id), data.restart_positions)


def validate(
    run: Run, fabric: Fabric, gpt: GPT, losses: Losses, preemption: Preemption, watchdog: Watchdog, step: int
) -> float | None:
    """Mean loss over the validation tokens of all ranks; None when asked to stop before it is known."""
    batches = validation_batches(
        run.validation,
        block_size=run.config.block_size,
        vocab_size=run.config.vocab_size,
        micro_batch_size=run.args.train.micro_batch_size,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        max_samples=run.args.eval.max_samples,
    )

    def stop() -> bool:
        watchdog.beat(step, "validation")
        return preemption.asked() is not None

    total = evaluate.loss_sum(losses, batches, fabric.device, stop)
    reshard(gpt)
    if total is None:
        return None
    loss, num_tokens = fabric.all_reduce(total, reduce_op="sum").tolist()
    return loss / num_tokens


if __name__ == "__main__":
    cli.run(lambda: main(setup(cli.parse(PretrainArgs))))
