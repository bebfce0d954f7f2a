"""Garbage is collected at the same steps on all ranks, and at no other."""

import gc
import weakref

from tinyllama.train import garbage


def test_garbage_waits_for_its_step() -> None:
    class Ring:
        def __init__(self) -> None:
            self.me = self

    assert gc.isenabled()
    try:
        garbage.freeze_gc()
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 1000
        ring = Ring()
        gone = weakref.ref(ring)
        gc.collect()  # it is now of the oldest generation
        del ring
        garbage.collect_gc(garbage.GC_INTERVAL - 1)
        assert gone() is not None
        garbage.collect_gc(garbage.GC_INTERVAL)
        assert gone() is None
    finally:
        gc.unfreeze()
        gc.enable()
