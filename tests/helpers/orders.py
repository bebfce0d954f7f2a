"""The order of the samples of a mixture, for tests that compare two of them."""

import numpy as np

from tinyllama.data.mixture import Mixture


def order_of(mixture: Mixture) -> bytes:
    """Where thousands of samples lie, at the start, after a ramp and far in the run."""
    samples = np.concatenate([np.arange(start, start + 4096) for start in (0, 5000, 10**6, 10**10)])
    return np.stack(mixture.locate(samples)).tobytes()
