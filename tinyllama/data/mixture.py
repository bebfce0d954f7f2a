"""The order of the samples: a pure function from a global sample number to a source, its epoch and a block of it.

Nothing is stored and nothing depends on ranks, workers or batch sizes, so one integer says where a run is:

1. Samples come in windows of ``WINDOW``. Each source has its exact quota in each window (``Mixture._starts``), and the
   places of a window are dealt out by a keyed shuffle. Shares may move linearly over the first samples (a ramp).
2. The i-th draw of a source belongs to epoch ``i // num_blocks`` of the source, and is number ``i % num_blocks`` in
   that epoch's own order of the blocks: a keyed permutation computed number by number, with no array of it in memory.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from tinyllama import InputError

ORDER_VERSION = 1
"""Version of the order: raise it with any change to the order, so that no checkpoint of another one resumes."""

WINDOW = 1024
"""Samples in a window: small, so that the shares are tight (1,024 is one step of the published run). A query deals
every window it touches whole, about 60 us each. Changing it changes the order of every run."""

_WINDOWS_AT_ONCE = 1024  # bounds the memory of a query that touches many windows: about 100 MB
_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, splitmix64's step


class Mixture:
    """The order of the samples: the block of each global sample, for sources mixed by weight; immutable, thread-safe.

    ``num_blocks`` (blocks an epoch, at least 1: see check_datasets), ``weights`` (shares of the samples; need not sum
    to 1) and ``fingerprints`` (of the token streams) have one entry a source. With a ``ramp`` the shares go linearly
    from those of ``weights`` at sample 0 to those of ``final_weights`` (None: the weight stays) at sample ``ramp``, and
    stay. Raises InputError for no source or a weight that is not a finite number above 0; at one end it may be 0.
    """

    def __init__(
        self,
        num_blocks: Sequence[int],
        weights: Sequence[float],
        seed: int,
        fingerprints: Sequence[str],
        final_weights: Sequence[float | None] | None = None,
        ramp: int = 0,
    ):
        errors = [] if weights else ["data.sources is empty: give at least one path and weight"]
        final = [w if f is None else f for w, f in zip(weights, final_weights or [None] * len(weights), strict=True)]
        for k, (weight, last) in enumerate(zip(weights, final, strict=True)):
            if not (math.isfinite(weight + last) and min(weight, last) >= 0 and max(weight, last) > 0):
                errors.append(
                    f"data.sources[{k}].weight is {weight}: give a finite number above 0 or remove the source"
                )
        if errors:
            raise InputError(*errors)

        first_weights, last_weights = _integers(weights), _integers(final)
        self._num_blocks = np.array(num_blocks, dtype=np.int64)
        self._window_key = _digest("window", seed)
        self._source_keys = np.array([_digest("source", seed, name) for name in fingerprints], dtype=np.uint64)
        # draws before each window of the ramp and before the first after it, where the shares are the last ones
        self._ramp_starts = _ramp_starts(first_weights, last_weights, ramp)
        self._weights = last_weights if ramp else first_weights  # after the ramp

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return source, epoch of the source and block, (n,) int64 each, of global sample numbers (n,) in any order."""
        source, draw = np.empty((2, len(samples)), dtype=np.int64)
        windows, row = np.unique(samples // WINDOW, return_inverse=True)
        for first in range(0, len(windows), _WINDOWS_AT_ONCE):
            some: slice | np.ndarray = slice(None)
            if len(windows) > _WINDOWS_AT_ONCE:
                some = np.flatnonzero((row >= first) & (row < first + _WINDOWS_AT_ONCE))
            sources, draws = self._deal(windows[first : first + _WINDOWS_AT_ONCE])
            cell = (row[some] - first, samples[some] % WINDOW)
            source[some], draw[some] = sources[cell], draws[cell]
        epoch, index = np.divmod(draw, self._num_blocks[source])
        keys = _splitmix64(self._source_keys[source] + epoch.astype(np.uint64) * np.uint64(_GOLDEN))
        return source, epoch, permute(index, self._num_blocks[source], keys)

    def samples_by_source(self, sample: int) -> list[int]:
        """Return how many samples come from each source before global sample number ``sample``."""
        window, place = divmod(sample, WINDOW)
        sources, _ = self._deal(np.array([window]))
        inside = np.bincount(sources[0, :place], minlength=len(self._weights))
        return (self._starts(np.array([window]))[0] + inside).tolist()

    def _starts(self, windows: np.ndarray) -> np.ndarray:
        """Return the draws of each source, (n, K), before the windows with the numbers (n,).

        The first source has had floor(samples * share), the second its floor of what is left, and so on: exact (Python
        integers never overflow), never falling, and together all samples, so that the differences are the quotas. On a
        ramp they are looked up in a table, which no sample after the ramp makes longer.
        """
        inside = np.minimum(windows, len(self._ramp_starts) - 1)
        left, total = (windows - inside).astype(object) * WINDOW, sum(self._weights)
        starts = self._ramp_starts[inside]
        for k, weight in enumerate(self._weights):
            draws = left * weight // max(total, 1)
            starts[:, k] += draws.astype(np.int64)
            left, total = left - draws, total - weight
        return starts

    def _deal(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of every place in windows (n,), and the number of its draw: two (n, WINDOW) int64."""
        starts = self._starts(windows)
        quotas = self._starts(windows + 1) - starts  # (n, K)
        n, num_sources = quotas.shape
        # hands: every source as often as its quota, in order of the sources
        hands = np.repeat(np.tile(np.arange(num_sources), n), quotas.ravel()).reshape(n, WINDOW)
        places = np.arange(WINDOW)
        # Sorting random keys that carry their place in the low bits shuffles the places, the same way in every numpy.
        samples = (windows[:, None] * WINDOW + places).astype(np.uint64)
        keys = _splitmix64(samples * np.uint64(_GOLDEN) + np.uint64(self._window_key))
        keys = keys // np.uint64(WINDOW) * np.uint64(WINDOW) + places.astype(np.uint64)
        shuffled = (np.sort(keys, axis=1) % np.uint64(WINDOW)).astype(np.int64)
        # Dealt to the sources and sorted within each, so that the draws of a source follow the samples.
        dealt = np.sort(hands * WINDOW + shuffled, axis=1) % WINDOW
        first_draw = starts - np.cumsum(quotas, axis=1) + quotas  # of a source, less its first position in hands
        draw_numbers = np.take_along_axis(first_draw, hands, axis=1) + places
        sources, draws = np.empty((2, n, WINDOW), dtype=np.int64)
        np.put_along_axis(sources, dealt, hands, axis=1)
        np.put_along_axis(draws, dealt, draw_numbers, axis=1)
        return sources, draws


def _ramp_starts(weights: list[int], final: list[int], ramp: int) -> np.ndarray:
    """Return the draws of each source before every window that the ramp touches, and the one after: (n, K), from zeros.

    A window's quotas are the shares' exact integrals over it, each rounded down, and one more for those sources that
    are furthest behind their integral from sample 0: off by less than one sample in every window, without drifting.
    That needs the windows before, hence a table: 8 bytes a window and source, and 10 us a window to make. For three
    sources and blocks of 2,048 tokens, a ramp of 6B tokens is 69 kB and 0.03 s, one of 3T tokens 34 MB and 15 s.
    """
    first, last = sum(weights), sum(final)
    unit = first * last * 2 * max(ramp, 1)  # the integrals are whole numbers of 1 / unit

    def integrals(sample: int) -> list[int]:
        on, after = min(sample, ramp), max(sample - ramp, 0)
        return [
            2 * ramp * a * last * on + (b * first - a * last) * on * on + 2 * ramp * b * first * after
            for a, b in zip(weights, final, strict=True)
        ]

    starts = [[0] * len(weights)]
    before = integrals(0)
    for end in range(WINDOW, -(-ramp // WINDOW) * WINDOW + 1, WINDOW):
        upto = integrals(end)
        wanted = [a - b for a, b in zip(upto, before, strict=True)]
        draws = [start + want // unit for start, want in zip(starts[-1], wanted, strict=True)]
        behind = sorted(
            (k for k, want in enumerate(wanted) if want % unit), key=lambda k: (draws[k] * unit - upto[k], k)
        )
        for k in behind[: end - sum(draws)]:
            draws[k] += 1
        starts.append(draws)
        before = upto
    return np.array(starts, dtype=np.int64)


def _integers(weights: Sequence[float]) -> list[int]:
    """Return integers in the ratio of the weights, taken as the decimal numbers that were written."""
    shares = [Fraction(repr(float(weight))) for weight in weights]
    unit = math.lcm(*(share.denominator for share in shares))
    integers = [int(share * unit) for share in shares]
    return [weight // math.gcd(*integers) for weight in integers]


def permute(index: np.ndarray, size: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Return where ``keys`` (uint64) put ``index`` in a permutation of range(size), elementwise: (n,) int64 each.

    A Feistel network over range(a * b), a and b about sqrt(size) and a * b >= size, that is applied again to a result
    outside range(size) until it is inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 5).
    """
    a = np.sqrt(size).astype(np.uint64) + np.uint64(1)
    n = size.astype(np.uint64)
    b = (n + a - np.uint64(1)) // a
    x = index.astype(np.uint64)
    walking: slice | np.ndarray = slice(None)
    while True:
        x[walking] = _feistel(x[walking], a[walking], b[walking], keys[walking])
        walking = np.flatnonzero(x >= n)
        if not walking.size:
            return x.astype(np.int64)


def _feistel(x: np.ndarray, a: np.ndarray, b: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Apply a keyed bijection on range(a * b), elementwise on uint64; a and b must be below 2^32."""
    half = np.uint64(32)
    left, right = np.divmod(x, b)  # left < a, right < b
    for number in range(_ROUNDS):
        noise = _splitmix64(right + keys + np.uint64(number * _GOLDEN % 2**64)) >> half
        left = left + (noise * a >> half)  # noise as a fraction of 2^32, times a
        left -= a * (left >= a)
        left, right, a, b = right, left, b, a
    return left * b + right


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64, in place: splitmix64's output function (Steele, Lea and Flood 2014, Vigna's variant)."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _digest(*values: object) -> int:
    digest = hashlib.blake2b(json.dumps(values).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little")
