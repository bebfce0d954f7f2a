import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from orders import order_of

from tinyllama import InputError
from tinyllama.data.mixture import WINDOW, Mixture, permute

PUBLISHED = [0.693584, 0.306416]  # SlimPajama : StarCoder


def mixture(num_blocks, weights, seed=0):
    return Mixture(num_blocks, weights, seed, [f"source {k}" for k in range(len(num_blocks))])


def permutation(size, key):
    return permute(np.arange(size), np.full(size, size), np.full(size, key, dtype=np.uint64))


weights = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=6)
samples = st.lists(st.integers(0, 2**40), min_size=1, max_size=20)


# the permutation of one source-epoch


def test_permute_is_a_permutation_of_every_small_size():
    for size in range(1, 301):
        for key in (0, 1, 2**64 - 1):
            assert sorted(permutation(size, key)) == list(range(size)), (size, key)


@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 999_983, 1_000_000])
def test_permute_is_a_permutation_of_large_sizes(size):
    assert (np.bincount(permutation(size, 7), minlength=size) == 1).all()


def test_permute_of_a_huge_size_keeps_to_it_without_collisions():
    size = 2**40 - 87
    blocks = permute(np.arange(100_000), np.full(100_000, size), np.full(100_000, 7, dtype=np.uint64))
    assert blocks.min() >= 0
    assert size * 0.999 < blocks.max() < size
    assert len(np.unique(blocks)) == 100_000


def test_permute_shuffles():
    blocks = permutation(10_000, 7)
    assert abs(np.corrcoef(np.arange(10_000), blocks)[0, 1]) < 0.05
    assert abs(np.corrcoef(blocks[1:], blocks[:-1])[0, 1]) < 0.05
    # neighbours differ by as many values as in numpy's own shuffles, 0.74 of the size
    assert 0.72 < len(np.unique(np.diff(blocks))) / 10_000 < 0.76


def test_permute_reaches_every_order_of_four():
    orders = {tuple(permutation(4, key * 0x9E3779B97F4A7C15 % 2**64)) for key in range(1000)}
    assert len(orders) == 24


# the order of the samples


@given(weights=weights, seed=st.integers(0, 2**63), data=st.data())
@settings(max_examples=25)
def test_every_block_once_per_source_epoch(weights, seed, data):
    num_blocks = data.draw(st.lists(st.integers(1, 700), min_size=len(weights), max_size=len(weights)))
    source, epoch, block = mixture(num_blocks, weights, seed).locate(np.arange(5000))
    for k, size in enumerate(num_blocks):
        draws = np.flatnonzero(source == k)
        # draws of a source follow the samples: epoch 0 is over before epoch 1 begins
        assert epoch[draws].tolist() == (np.arange(len(draws)) // size).tolist()
        for whole in np.split(block[draws], np.arange(size, len(draws), size)):
            assert len(np.unique(whole)) == len(whole)
            assert whole.max(initial=0) < size
            assert len(whole) == size or whole.size == len(draws) % size


@given(weights=weights, start=st.integers(0, 2**40))
@settings(max_examples=40)
def test_shares_hold_over_any_ten_thousand_samples(weights, start):
    source, _, _ = mixture([10**9] * len(weights), weights).locate(np.arange(start, start + 10_000))
    counts = np.bincount(source, minlength=len(weights))
    shares = np.array(weights) / sum(weights)
    assert np.abs(counts - 10_000 * shares).max() <= WINDOW


@given(weights=weights, window=st.integers(0, 2**30))
@settings(max_examples=40)
def test_quotas_of_a_window_are_exact(weights, window):
    mix = mixture([10**9] * len(weights), weights)
    drawn = np.array(mix.samples_by_source(window * WINDOW), dtype=object)
    shares = [Fraction(repr(weight)) for weight in weights]  # the decimals: a float's error is samples far on
    behind = [share / sum(shares) * window * WINDOW - count for share, count in zip(shares, drawn, strict=True)]
    assert drawn.sum() == window * WINDOW
    # a source is less than a sample behind, and ahead by what the floors before it have left over, less than one each
    assert max(behind) < 1
    assert all(late >= -k for k, late in enumerate(behind))
    quotas = np.array(mix.samples_by_source((window + 1) * WINDOW), dtype=object) - drawn
    source, _, _ = mix.locate(np.arange(window * WINDOW, (window + 1) * WINDOW))
    assert np.bincount(source, minlength=len(weights)).tolist() == quotas.tolist()


def test_shares_of_the_published_mixture():
    mix = mixture([321_868_032, 142_131_968], PUBLISHED)
    assert mix.samples_by_source(WINDOW * 10**6) == [710_230_016, 313_769_984]
    source, _, _ = mix.locate(np.arange(10 * WINDOW))
    counts = [np.sum(window == 0) for window in source.reshape(10, WINDOW)]
    assert set(counts) == {710, 711}  # 710.23 of 1,024
    # shuffled inside the window: runs of one source as random places give them, 1 + 2 * 1024 * p * (1 - p) = 436
    runs = 1 + np.count_nonzero(np.diff(source[:WINDOW]))
    assert 390 < runs < 480


def test_one_source_and_tiny_weights():
    source, epoch, block = mixture([3], [1e-300]).locate(np.arange(6))
    assert source.tolist() == [0] * 6
    assert epoch.tolist() == [0, 0, 0, 1, 1, 1]
    assert sorted(block[:3]) == sorted(block[3:]) == [0, 1, 2]
    assert mixture([3, 3], [1e-300, 1]).samples_by_source(2**40) == [0, 2**40]
    assert mixture([5, 5], [1, 1e-6]).samples_by_source(10**9 + 1000)[1] in (1000, 1001)


@given(weights=weights, queries=samples, data=st.data())
@settings(max_examples=30)
def test_locate_does_not_depend_on_the_query(weights, queries, data):
    mix = mixture([11 + k for k in range(len(weights))], weights)
    order = data.draw(st.permutations(range(len(queries))))
    whole = np.stack(mix.locate(np.array(queries)))
    shuffled = np.stack(mix.locate(np.array(queries)[order]))
    single = np.concatenate([np.stack(mix.locate(np.array([sample]))) for sample in queries], axis=1)
    assert shuffled.tolist() == whole[:, order].tolist()
    assert single.tolist() == whole.tolist()


def test_locate_more_windows_than_are_dealt_at_once():
    mix = mixture([50, 7], [2, 1])
    far = np.arange(1500)[::-1] * WINDOW * 3 + 5
    whole = np.stack(mix.locate(far))
    assert whole[:, 700:710].tolist() == np.stack(mix.locate(far[700:710])).tolist()
    assert whole[:, -10:].tolist() == np.stack(mix.locate(far[-10:])).tolist()


def test_locate_of_nothing_is_empty():
    assert [part.tolist() for part in mixture([5], [1]).locate(np.arange(0))] == [[], [], []]


@given(weights=weights, end=st.integers(0, 5000))
@settings(max_examples=30)
def test_samples_by_source_counts_what_locate_gave(weights, end):
    mix = mixture([7] * len(weights), weights)
    source, _, _ = mix.locate(np.arange(end))
    assert mix.samples_by_source(end) == np.bincount(source, minlength=len(weights)).tolist()


def test_epochs_sources_and_seeds_have_orders_of_their_own():
    _, _, block = mixture([100], [1]).locate(np.arange(300))
    _, _, other_seed = mixture([100], [1], seed=1).locate(np.arange(100))
    _, _, other_source = Mixture([100], [1], 0, ["another"]).locate(np.arange(100))
    orders = [*block.reshape(3, 100), other_seed, other_source]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.count_nonzero(one == other) < 10  # 1 expected of random orders


def test_windows_and_seeds_have_shuffles_of_their_own():
    source, _, _ = mixture([100, 100], [1, 1]).locate(np.arange(2 * WINDOW))
    other_seed, _, _ = mixture([100, 100], [1, 1], seed=1).locate(np.arange(WINDOW))
    assert 400 < np.count_nonzero(source[:WINDOW] == source[WINDOW:]) < 624  # 512 expected
    assert 400 < np.count_nonzero(source[:WINDOW] == other_seed) < 624


def test_weights_need_not_sum_to_one():
    one, other = mixture([10, 20], [0.25, 0.75]), mixture([10, 20], [3, 9])
    assert order_of(one) == order_of(other)
    assert np.stack(one.locate(np.arange(99))).tolist() == np.stack(other.locate(np.arange(99))).tolist()


def test_the_order_is_of_blocks_weights_seed_and_sources():
    base = [10, 20], [1, 2], 0, ["a", "b"]
    changed = [
        ([10, 21], [1, 2], 0, ["a", "b"]),
        ([10, 20], [1, 2.001], 0, ["a", "b"]),
        ([10, 20], [1, 2], 1, ["a", "b"]),
        ([10, 20], [1, 2], 0, ["a", "c"]),
        ([20, 10], [2, 1], 0, ["b", "a"]),
    ]
    assert order_of(Mixture(*base)) == order_of(Mixture(*base))
    assert len({order_of(Mixture(*arguments)) for arguments in [base, *changed]}) == 6


def test_the_order_never_changes():
    # A change here changes the data of every run that resumes: raise ORDER_VERSION, do not edit the values alone.
    mix = Mixture([5, 1000, 2**33], [0.5, 0.3, 0.2], 1337, ["a", "b", "c"])
    samples = np.array([*range(6), 1023, 1024, 5000, 2_000_000, 2**40])
    source, epoch, block = mix.locate(samples)
    assert source.tolist() == [2, 0, 1, 2, 1, 1, 0, 1, 2, 2, 0]
    assert epoch.tolist() == [0, 0, 0, 0, 0, 0, 102, 0, 0, 0, 109951162777]
    assert block.tolist() == [7652740355, 4, 556, 7840185630, 985, 854, 4, 769, 7015412224, 5579277198, 2]
    assert mix.samples_by_source(2_000_000) == [1_000_003, 600_002, 399_995]


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_bad_weight(weight):
    with pytest.raises(InputError, match=rf"^data.sources\[1\].weight is {weight}: give a finite number above 0"):
        mixture([10, 10], [1, weight])


def test_every_error_is_reported():
    with pytest.raises(InputError) as caught:
        mixture([10, 10], [-1, 0])
    assert len(caught.value.args) == 2
    assert caught.value.args[0].startswith("data.sources[0].weight is -1")
    with pytest.raises(InputError, match="data.sources is empty"):
        mixture([], [])


# shares that change

shares = st.integers(0, 40) | st.integers(0, 999_999)  # many are of a few per cent, others have six digits
ramps = st.lists(st.tuples(shares, shares).filter(any), min_size=1, max_size=5).filter(
    lambda pairs: any(a for a, _ in pairs) and any(b for _, b in pairs)
)


def integral(a, b, ramp, sample):
    """The exact share of the samples before ``sample``, of a weight going from a to b, both fractions of all."""
    on = Fraction(min(sample, ramp))
    return a * on + (b - a) * on * on / (2 * ramp) + b * max(sample - ramp, 0)


@settings(max_examples=60)
@given(ramps, st.integers(1, 20_000))
def test_shares_of_a_ramp_follow_it_in_every_window_and_on_the_whole(pairs, ramp):
    first, last = ([Fraction(pair[i], sum(pair[i] for pair in pairs)) for pair in pairs] for i in (0, 1))
    order = Mixture([97] * len(pairs), [a for a, _ in pairs], 5, ["x"] * len(pairs), [b for _, b in pairs], ramp)
    end = -(-ramp // WINDOW) * WINDOW
    before = [0] * len(pairs)
    for sample in range(WINDOW, end + 4 * WINDOW, WINDOW):
        drawn = order.samples_by_source(sample)
        assert sum(drawn) == sample
        for k, (a, b) in enumerate(zip(first, last, strict=True)):
            wanted = integral(a, b, ramp, sample) - integral(a, b, ramp, sample - WINDOW)
            if sample <= end:
                assert abs(drawn[k] - before[k] - wanted) < 1
            assert abs(drawn[k] - integral(a, b, ramp, sample)) < len(pairs) + 1
            assert drawn[k] >= before[k]
        before = drawn


def quotas_of_a_ramp(first, last, ramp):
    """Draws of each source before each window, as _ramp_starts says them, in fractions."""
    shares = [(Fraction(a, sum(first)), Fraction(b, sum(last))) for a, b in zip(first, last, strict=True)]
    starts = [[0] * len(shares)]
    for sample in range(WINDOW, -(-ramp // WINDOW) * WINDOW + 1, WINDOW):
        upto = [integral(a, b, ramp, sample) for a, b in shares]
        wanted = [now - integral(a, b, ramp, sample - WINDOW) for now, (a, b) in zip(upto, shares, strict=True)]
        draws = [before + math.floor(want) for before, want in zip(starts[-1], wanted, strict=True)]
        cut = [k for k, want in enumerate(wanted) if want.denominator > 1]
        cut.sort(key=lambda k: upto[k] - draws[k], reverse=True)  # the furthest behind first; of two alike, the first
        for k in cut[: sample - sum(draws)]:
            draws[k] += 1
        starts.append(draws)
    return starts


@pytest.mark.parametrize(
    ("first", "last", "ramp"),
    [
        ([1, 1, 1], [1, 1, 1], 3 * WINDOW),  # alike in everything: the first is first
        ([0, 0, 0, 6], [1, 1, 1, 3], 4 * WINDOW + 1),
        ([2, 1, 1, 3], [2, 3, 1, 1], 5 * WINDOW - 1),
        ([75, 0, 0], [75, 15, 10], 9_999),
        ([7, 5, 3, 2, 1], [1, 2, 3, 5, 7], 20 * WINDOW),
    ],
)
def test_quotas_on_a_ramp_are_those_furthest_behind(first, last, ramp):
    order = Mixture([97] * len(first), first, 5, list("abcde"[: len(first)]), last, ramp)
    expected = quotas_of_a_ramp(first, last, ramp)
    assert [order.samples_by_source(window * WINDOW) for window in range(len(expected))] == expected
    # behind the ramp each is given the floor of its share of what is left, and the last one the rest
    end, total = (len(expected) - 1) * WINDOW, sum(last)
    left, counts = 10**6 * WINDOW, []
    for weight in last:
        counts.append(left * weight // total)
        left, total = left - counts[-1], total - weight
    assert order.samples_by_source(end + 10**6 * WINDOW) == [a + b for a, b in zip(expected[-1], counts, strict=True)]


@settings(max_examples=30)
@given(ramps, st.integers(1, 9_000), st.integers(0, 12_000))
def test_samples_by_source_counts_what_locate_gave_on_a_ramp_and_after_it(pairs, ramp, end):
    order = Mixture([50] * len(pairs), [a for a, _ in pairs], 5, ["x"] * len(pairs), [b for _, b in pairs], ramp)
    source, epoch, block = order.locate(np.arange(end))
    assert np.bincount(source, minlength=len(pairs)).tolist() == order.samples_by_source(end)
    for k in range(len(pairs)):  # each source's blocks, all of an epoch before the next
        mine = source == k
        whole = np.flatnonzero(mine)[: mine.sum() // 50 * 50]
        assert (epoch[whole].reshape(-1, 50) == np.arange(len(whole) // 50)[:, None]).all()
        assert (np.sort(block[whole].reshape(-1, 50), axis=1) == np.arange(50)).all()


def test_the_ramp_of_the_second_version():
    # SlimPajama 100 -> 75, StarCoder 0 -> 15, Proof Pile 0 -> 10 over 6B tokens of blocks of 2048
    ramp = -(-6_000_000_000 // 2048)
    order = Mixture([1000] * 3, [75, 0, 0], 3407, ["s", "c", "p"], [75, 15, 10], ramp)
    assert order.samples_by_source(WINDOW) == [1024, 0, 0]
    end = ramp // WINDOW * WINDOW + WINDOW  # of the window that the ramp ends in
    after = (end - ramp) * np.array([0.75, 0.15, 0.1])
    drawn = np.array(order.samples_by_source(end))
    assert np.abs(drawn - after - ramp * np.array([0.875, 0.075, 0.05])).max() < 2
    later = np.array(order.samples_by_source(end + 1_024_000))
    assert (later - drawn).tolist() == pytest.approx([768_000, 153_600, 102_400], abs=2)


def test_a_run_of_3t_tokens_has_no_longer_table_than_its_ramp():
    ramp = -(-6_000_000_000 // 2048)
    order = Mixture([321_868_032, 142_131_968], [1, 0], 3407, ["s", "c"], PUBLISHED, ramp)
    last = 1_430_512 * WINDOW
    drawn, source = order.samples_by_source(last), order.locate(np.arange(last, last + WINDOW))[0]
    prose = ramp * (1 + PUBLISHED[0]) / 2 + (last - ramp) * PUBLISHED[0]
    assert drawn == pytest.approx([prose, last - prose], abs=3)
    assert sum(drawn) == last
    assert 710 <= np.sum(source == 0) <= 711
    assert order._ramp_starts.nbytes == 16 * (-(-ramp // WINDOW) + 1)


def test_a_ramp_changes_the_order_and_none_changes_nothing():
    plain = Mixture([10, 10], [1, 2], 0, ["x", "y"])
    assert order_of(Mixture([10, 10], [1, 2], 0, ["x", "y"], [None, None], 0)) == order_of(plain)
    others = {
        order_of(Mixture([10, 10], [1, 2], 0, ["x", "y"], final, ramp))
        for final, ramp in [([None, 3], 5000), ([None, 3], 5010), ([None, 4], 5000)]
    }
    assert len(others | {order_of(plain)}) == 4


def test_a_source_may_come_or_go_but_must_be_there_once():
    assert Mixture([10, 10], [1, 0], 0, ["x", "y"], [0, 1], 3000).samples_by_source(10_000)[0] < 2000
    with pytest.raises(InputError, match=r"data.sources\[1\].weight is 0"):
        Mixture([10, 10], [1, 0], 0, ["x", "y"], [1, 0], 3000)
    with pytest.raises(InputError, match=r"data.sources\[0\].weight"):
        Mixture([10, 10], [1, 1], 0, ["x", "y"], [float("nan"), 1], 3000)
    with pytest.raises(InputError, match=r"data.sources\[1\].weight"):
        Mixture([10, 10], [1, 1], 0, ["x", "y"], [1, -0.5], 3000)
