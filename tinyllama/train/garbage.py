"""Collect Python's garbage at the same steps on all ranks."""

import gc

GC_INTERVAL = 50
"""optimizer steps between two collections"""


def freeze_gc() -> None:
    """Stop Python's collector from running when it likes; call it after the first step, when all has been compiled.

    Left alone it stops each rank at another moment, and all wait for that one each time: collecting at the same step
    on all ranks made 512 GPUs 1.5 % faster (pytorch/torchtitan#148). What is alive now is never looked at again.
    """
    gc.collect()
    gc.freeze()
    gc.disable()


def collect_gc(step: int) -> None:
    """Collect garbage on every rank at the same steps.

    All generations, not the youngest two as torchtitan does: what outlives a collection would stay for the rest of the
    run, and with everything older frozen this takes milliseconds.
    """
    if step % GC_INTERVAL == 0:
        gc.collect()
