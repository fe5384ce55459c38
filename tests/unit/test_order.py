"""The epoch order: exactly once, at any position, well mixed, and read mostly by one rank."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.data.order import EpochOrder, portion, share
from hpctrain.data.quality import amplification, shuffle_quality
from hpctrain.data.random import key, permute
from hpctrain.world.world import equal_part, part_of

ORDERS = st.builds(
    EpochOrder,
    samples=st.integers(1, 3000),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
    shuffle=st.sampled_from(["block", "full", "none"]),
    block=st.integers(1, 200),
    lanes=st.integers(1, 100),
    aligned=st.booleans(),
    together=st.integers(1, 5),
    version=st.sampled_from([1, 2]),
)


def whole(order):
    return order.indices(np.arange(order.samples))


@given(order=ORDERS)
def test_every_sample_once(order):
    assert np.array_equal(np.sort(whole(order)), np.arange(order.samples))


@given(order=ORDERS, data=st.data())
def test_random_access(order, data):
    positions = data.draw(st.lists(st.integers(0, order.samples - 1), max_size=30))
    wanted = order.indices(np.array(positions, dtype=np.int64))
    assert wanted.tolist() == whole(order)[positions].tolist()


@pytest.mark.parametrize("shuffle", ["block", "full", "none"])
def test_large_sets_cost_nothing(shuffle):
    order = EpochOrder(10**12, 0, 0, shuffle, block=128, lanes=256)
    indices = order.indices(np.arange(10**12 - 1000, 10**12))
    assert len(set(indices.tolist())) == 1000
    assert indices.min() >= 0 and indices.max() < 10**12


def test_golden():
    """The order is part of the format: a checkpoint's cursor counts on it in later versions too."""
    assert whole(EpochOrder(10, 0, 0)).tolist() == GOLDEN[0]
    assert whole(EpochOrder(10, 1, 2)).tolist() == GOLDEN[1]
    assert whole(EpochOrder(29, 1, 2, "block", 4, 3, True, version=1)).tolist() == GOLDEN[2]
    assert whole(EpochOrder(29, 1, 2, "block", 4, 3, True)).tolist() == GOLDEN[4]
    assert whole(EpochOrder(29, 1, 2, "block", 4, 2, True, 2)).tolist() == GOLDEN[5]
    assert key(1, 2, 3) == 15020427595393229491
    for version in (1, 2):
        large = EpochOrder(10**12, 1, 2, "block", 128, 256, version=version).indices(
            np.array([0, 1, 10**11, 10**12 - 1])
        )
        assert large.tolist() == GOLDEN[3 if version == 1 else 6]


GOLDEN = [
    [9, 3, 0, 1, 4, 6, 2, 8, 7, 5],
    [4, 8, 1, 0, 3, 7, 2, 5, 6, 9],
    [
        2,
        22,
        6,
        3,
        20,
        4,
        1,
        21,
        24,
        0,
        10,
        26,
        14,
        11,
        25,
        15,
        9,
        27,
        17,
        18,
        19,
        13,
        8,
        5,
        12,
        23,
        7,
        28,
        16,
    ],
    [772796302526, 709502759127, 112190785578, 116811713068],
    [
        2,
        22,
        6,
        3,
        20,
        4,
        17,
        19,
        16,
        18,
        28,
        24,
        1,
        21,
        26,
        0,
        10,
        25,
        14,
        11,
        27,
        15,
        9,
        5,
        13,
        8,
        7,
        12,
        23,
    ],
    [
        17,
        19,
        28,
        16,
        18,
        2,
        20,
        21,
        3,
        1,
        14,
        15,
        0,
        5,
        13,
        12,
        7,
        6,
        24,
        26,
        4,
        10,
        25,
        27,
        11,
        9,
        23,
        22,
        8,
    ],
    [772796302526, 709502759127, 112190785578, 116811713068],
]


@pytest.mark.parametrize("block", [1, 5])
def test_epochs_and_seeds_differ(block):
    orders = {
        tuple(whole(EpochOrder(50, seed, epoch, "block", block, 4, True)))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


@pytest.mark.slow
@pytest.mark.parametrize(
    ("samples", "block", "lanes", "aligned"),
    [(50_000, 170, 256, False), (50_000, 64, 256, True), (60_000, 512, 128, False)],
)
def test_mixing_and_reading(samples, block, lanes, aligned):
    """Samples sorted by class are mixed as by a full permutation, though ranks read blocks."""
    labels = np.arange(samples) // 500
    order = EpochOrder(samples, 3, 4, "block", block, lanes, aligned)
    assert order.block_samples > 1
    assert shuffle_quality(order, labels, lanes) < 1.1
    for ranks in (5, 8, 12):
        assert amplification(order, lanes, ranks) < 1.3
    unmixed = EpochOrder(samples, 3, 4, "none")
    assert shuffle_quality(unmixed, labels, lanes) > 20


@pytest.mark.parametrize(
    ("samples", "block", "lanes", "aligned"),
    [
        (50_000, 64, 256, True),  # 80 samples in the last batch, 848 in no lane's whole blocks
        (50_000, 170, 256, False),
        (17_000, 64, 256, True),  # a block a lane, and two rows of the rest
        (20_000, 256, 64, True),
        (20_000, 1000, 64, True),  # fewer blocks than lanes
        (5_003, 5_000, 64, True),
        (1_003, 100, 256, True),
    ],
)
def test_every_batch_is_mixed(samples, block, lanes, aligned):
    """Neither the last batch, nor those with what fills no blocks, are runs of neighbours."""
    labels = np.arange(samples) * 10 // samples
    last, worst, full = [], [], []
    for seed in range(8):
        indices = whole(EpochOrder(samples, seed, 1, "block", block, lanes, aligned))
        rest = samples % lanes
        last.append(_spread(labels, indices[samples - rest :]))
        batches = indices[: samples - rest].reshape(-1, lanes)
        worst.append(max(_spread(labels, batch) for batch in batches))
        full.append(max(_spread(labels, batch) for batch in _permuted(samples, seed, lanes)))
    assert np.mean(last) < 1.5
    assert np.mean(worst) < 1.3 * np.mean(full)


def _spread(labels, indices):
    """Chi-squared of a batch's classes over its degrees of freedom."""
    expected = np.bincount(labels) / len(labels) * len(indices)
    counts = np.bincount(labels[indices], minlength=len(expected))
    return ((counts - expected) ** 2 / expected).sum() / (len(expected) - 1)


def _permuted(samples, seed, lanes):
    indices = np.random.default_rng(seed).permutation(samples)
    return indices[: samples // lanes * lanes].reshape(-1, lanes)


@pytest.mark.parametrize("samples", [64 * 256 * 3, 50_000])
def test_what_version_2_leaves_as_it_was(samples):
    """Where there is nothing but whole blocks in every lane, the order is that of version 1."""
    old = EpochOrder(samples, 1, 2, "block", 64, 256, True, version=1)
    new = EpochOrder(samples, 1, 2, "block", 64, 256, True)
    assert np.array_equal(whole(old), whole(new)) == (samples % (64 * 256) == 0)
    for shuffle in ("full", "none"):
        old = EpochOrder(samples, 1, 2, shuffle, 64, 256, version=1)
        assert np.array_equal(whole(old), whole(EpochOrder(samples, 1, 2, shuffle, 64, 256)))


def test_reading_is_even_in_time():
    """Lanes change windows one after the other: no moment in which all want new blocks."""
    order = EpochOrder(1_000_000, 0, 0, "block", 64, 256, aligned=True)
    blocks = whole(order)[: 256 * 1024].reshape(64, -1) // 64
    seen: set[int] = set()
    new = []
    for stretch in blocks:
        fresh = set(stretch.tolist()) - seen
        new.append(len(fresh))
        seen |= fresh
    assert max(new[16:]) < 2 * np.mean(new[16:])


def test_no_position_is_favoured():
    """Chi-square over where sample 0 lands, and over which sample comes first."""
    n, trials = 16, 8000
    first = np.zeros(n)
    place = np.zeros(n)
    for trial in range(trials):
        order = permute(np.arange(n, dtype=np.uint64), n, key(trial))
        first[order[0]] += 1
        place[np.argmin(order)] += 1
    for counts in (first, place):
        chi2 = ((counts - trials / n) ** 2 / (trials / n)).sum()
        assert chi2 < 37.7  # 99.9 % quantile of 15 degrees of freedom


@given(count=st.integers(0, 1000), size=st.integers(1, 50), start=st.integers(0, 10))
def test_shares(count, size, start):
    parts = [share(start, start + count, rank, size) for rank in range(size)]
    assert parts[0][0] == start and parts[-1][1] == start + count
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    sizes = [stop - begin for begin, stop in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == max(sizes)
    for rank, part in enumerate(parts):
        ends = [start + math.ceil(Fraction(count * number, size)) for number in (rank, rank + 1)]
        assert part == tuple(ends)
        assert equal_part(rank, size) == part_of([1] * size, rank)
        _, of, lower, upper, total = equal_part(rank, size)
        assert of == size and part == portion(start, start + count, lower, upper, total)


@given(
    count=st.integers(0, 1000),
    shares=st.lists(st.integers(0, 1000), min_size=1, max_size=20).filter(any),
    start=st.integers(0, 10),
)
def test_unequal_parts(count, shares, start):
    parts = []
    for rank in range(len(shares)):
        part = part_of(shares, rank)
        assert (part.rank, part.size) == (rank, len(shares))
        parts.append(portion(start, start + count, part.lower, part.upper, part.total))
    assert parts[0][0] == start and parts[-1][1] == start + count
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    for (begin, stop), mine in zip(parts, shares, strict=True):
        assert abs((stop - begin) - Fraction(count * mine, sum(shares))) < 1
