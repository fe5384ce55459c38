"""The order's properties, and the loader's against a sequential oracle."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data.loader import Loader
from hpctrain.data.order import EpochOrder, key, permute, share
from hpctrain.data.source import ArraySource
from hpctrain.launcher import Launch
from hpctrain.world import World


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_a_permutation(n, seed, epoch):
    order = EpochOrder(n, seed, epoch).indices(0, n)
    assert sorted(order.tolist()) == list(range(n))


@given(n=st.integers(1, 2000), data=st.data())
def test_random_access(n, data):
    order = EpochOrder(n, 1, 2)
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    assert order.indices(start, stop).tolist() == order.indices(0, n)[start:stop].tolist()


def test_large_sets_cost_nothing():
    order = EpochOrder(10**12, 0, 0)
    indices = order.indices(10**12 - 1000, 10**12)
    assert len(set(indices.tolist())) == 1000
    assert indices.min() >= 0 and indices.max() < 10**12


def test_golden():
    """The order is part of the format: a checkpoint's cursor counts on it in later versions too."""
    assert EpochOrder(10, 0, 0).indices(0, 10).tolist() == GOLDEN[0]
    assert EpochOrder(10, 1, 2).indices(0, 10).tolist() == GOLDEN[1]
    assert key(1, 2, 3) == GOLDEN[2]


GOLDEN = ([1, 8, 0, 2, 6, 7, 5, 4, 9, 3], [6, 7, 1, 3, 4, 8, 5, 2, 0, 9], 15020427595393229491)


def test_epochs_and_seeds_differ():
    orders = {
        tuple(EpochOrder(50, seed, epoch).indices(0, 50)) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25


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


def loaders(source, batch_size, size, seed):
    return [
        Loader(source, batch_size, world=World(Launch("mpirun", rank, size, rank, size)), seed=seed)
        for rank in range(size)
    ]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 100),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 1000),
    worlds=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 6)), max_size=5),
)
def test_exactly_once_whatever_the_world(n, batch_size, seed, worlds):
    """Two epochs through a sequence of (world size, batches until it changes)."""
    source = ArraySource({"x": np.arange(n)})
    oracle = [
        EpochOrder(n, seed, epoch).indices(start, min(start + batch_size, n)).tolist()
        for epoch in range(2)
        for start in range(0, n, batch_size)
    ]
    state = loaders(source, batch_size, 1, seed)[0].state_dict()
    seen = []
    for size, batches in [*worlds, (2, 10**6)]:
        ranks = loaders(source, batch_size, size, seed)
        for loader in ranks:
            loader.load_state_dict(state)
        while batches > 0 and ranks[0].epoch < 2:
            for parts in zip(*ranks, strict=True):
                seen.append([x for part in parts for x in part["x"].tolist()])
                assert {part.global_samples for part in parts} == {len(seen[-1])}
                assert sum(part.weight for part in parts) == pytest.approx(size)
                state = ranks[0].state_dict()
                assert all(loader.state_dict() == state for loader in ranks)
                batches -= 1
                if not batches:
                    break
    assert seen == oracle


def test_uniform_belongs_to_positions():
    source = ArraySource({"x": np.arange(30)})
    whole = torch.cat([batch.uniform(3) for batch in Loader(source, 7, seed=4)])
    parts = zip(*loaders(source, 10, 3, 4), strict=True)
    assert torch.equal(whole, torch.cat([part.uniform(3) for batch in parts for part in batch]))
    assert whole.min() >= 0 and whole.max() < 1
    assert abs(whole.mean() - 0.5) < 0.1


def test_split_keeps_order_and_weight():
    source = ArraySource({"x": np.arange(10)})
    batch = next(iter(Loader(source, 7, shuffle=False)))
    parts = list(batch.split(3))
    assert [part["x"].tolist() for part in parts] == [[0, 1, 2], [3, 4], [5, 6]]
    assert sum(part.weight for part in parts) == pytest.approx(1)
    assert torch.equal(torch.cat([part.uniform(1) for part in parts]), batch.uniform(1))
