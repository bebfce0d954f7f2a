"""Turn the budget of a run (steps, tokens or epochs) into optimizer steps, and each of these into micro-batches."""

from dataclasses import replace

from tinyllama import InputError
from tinyllama.checkpoint.state import TrainState
from tinyllama.config.args import OptimArgs, PretrainArgs, TrainArgs

MOST_TOKENS = 10**18
"""More are a typing error, and do not fit into 64 bits."""


def gradient_accumulation(train: TrainArgs, world_size: int) -> int:
    """Return how many micro-batches a rank passes through in one step.

    Raises InputError, naming the nearest numbers that divide, when the global batch is not a whole number of them.
    """
    batch, micro_batch = train.global_batch_size, train.micro_batch_size
    unit = world_size * micro_batch
    if batch % unit == 0:
        return batch // unit
    hints = []
    most, share = batch // micro_batch, batch // world_size
    fewer, more = range(min(world_size - 1, most), 0, -1), range(world_size + 1, min(2 * world_size, most) + 1)
    if batch % micro_batch == 0 and (ranks := [*_first_divisor(most, fewer), *_first_divisor(most, more)]):
        hints.append(f"start {' or '.join(map(str, ranks))} rank{'s' * (ranks != [1])}")
    if batch % world_size == 0 and (fits := _first_divisor(share, range(min(micro_batch - 1, share), 0, -1))):
        hints.append(f"give --train.micro_batch_size {fits[0]}")
    lower = batch // unit * unit
    nearest = " or ".join(str(size) for size in (lower, lower + unit) if size)
    hints.append(f"give --train.global_batch_size {nearest}")
    raise InputError(
        f"train.global_batch_size {batch} is not a multiple of {world_size} ranks x train.micro_batch_size "
        f"{micro_batch}: {', or '.join(hints)}"
    )


def _first_divisor(total: int, numbers: range) -> list[int]:
    """Return the first of ``numbers`` that divides ``total``, if one of their first 10,000 does."""
    return [number for number in numbers[:10_000] if total % number == 0][:1]


def total_steps(args: PretrainArgs, block_size: int, num_blocks: int, done: TrainState | None = None) -> int:
    """Return the optimizer steps of the run, from whichever of steps, tokens and epochs was given.

    What is ``done`` counts as it was done, and what is left of tokens or epochs is divided by today's batch.
    ``num_blocks`` is the number of blocks of all sources together: an epoch is that many samples.
    Raises InputError for a run of no steps or too many, and for a warm-up or a decay that does not fit into it.
    """
    train, done = args.train, done or TrainState()
    if train.max_steps is not None:
        steps = train.max_steps
    elif train.max_tokens is not None:
        left = train.max_tokens - done.samples * block_size
        steps = done.step + max(-(-left // (train.global_batch_size * block_size)), 0)
    else:
        left = train.epoch_samples(num_blocks) - done.samples
        steps = done.step + max(left // train.global_batch_size, 0)
        if steps == 0:
            raise InputError(
                f"train.max_epochs {train.max_epochs} of {num_blocks:,} blocks is less than one step of "
                f"train.global_batch_size {train.global_batch_size} samples: raise the one or lower the other"
            )
    tokens = (done.samples + (steps - done.step) * train.global_batch_size) * block_size
    if tokens > MOST_TOKENS:
        raise InputError(f"{steps:,} steps make {tokens:,} tokens: lower train.global_batch_size or the run's length")
    warmup = args.optim.warmup_steps
    if done.step < warmup and steps <= warmup:
        raise InputError(
            f"optim.warmup_steps {warmup} does not end within the run's {steps} steps: lower it, as by "
            f"--optim.warmup_steps {steps // 10}, or lower train.global_batch_size for more steps of as much data"
        )
    stable_steps = steps - 1 - warmup
    batch = train.global_batch_size
    unit = done.decay_batch if done.decay_batch > 0 else batch
    if train.max_steps is None and done.step >= warmup and unit != batch:  # of the steps that decay_steps counts
        left = (steps - done.step + 1) * batch  # one more, as the budget was rounded to whole steps of either batch
        stable_steps = int((done.samples - samples_of_warmup(args, done) + left) / unit)
    if args.optim.decay_steps is not None and args.optim.decay_steps > stable_steps:
        raise InputError(
            f"optim.decay_steps {args.optim.decay_steps} is more than the {stable_steps} steps between the run's "
            "warm-up and its last step: lower it"
        )
    return steps


def samples_of_warmup(args: PretrainArgs, done: TrainState) -> int:
    """Return how many samples had been seen when the warm-up ended; -1 before that.

    If it ends with the step that is done, what is recorded may be the end of another warm-up, which was shorter. If
    none is recorded, as where a warm-up has been shortened to less than is done, its steps count at the mean batch.
    """
    warmup = args.optim.warmup_steps
    if done.step <= warmup:
        return done.samples if done.step == warmup else -1
    return done.warmup_samples if done.warmup_samples >= 0 else done.samples * warmup // done.step


def smaller_batch(args: PretrainArgs, num_blocks: int, block_size: int, accumulation: int) -> str:
    """Return the flags of a batch that makes some 50 steps of ``num_blocks``, or as many as its ranks can."""
    train, warmup = args.train, args.optim.warmup_steps
    ranks = train.global_batch_size // (train.micro_batch_size * accumulation)
    if num_blocks < ranks:
        return f"start at most {num_blocks} ranks"
    micro = min(train.micro_batch_size, num_blocks // ranks)
    batch = max(num_blocks // 50 // (ranks * micro), 1) * ranks * micro
    flags = f"--train.global_batch_size {batch}"
    flags += f" --train.micro_batch_size {micro}" if micro != train.micro_batch_size else ""
    smaller = replace(args, train=replace(train, global_batch_size=batch), optim=OptimArgs(warmup_steps=0))
    steps = total_steps(smaller, block_size, num_blocks)
    return flags + (f" --optim.warmup_steps {steps // 10}" if steps <= warmup else "")
