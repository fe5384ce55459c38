"""The loader against a sequential oracle, whatever makes its batches."""

import os
import signal
import time
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data.buffers import Buffers
from hpctrain.data.loader import Loader
from hpctrain.data.mixture import Mixture, Weighted
from hpctrain.data.order import EpochOrder
from hpctrain.data.shards import ShardSet
from hpctrain.data.source import ArraySource
from hpctrain.data.writer import Ragged, ShardWriter
from hpctrain.errors import Error
from hpctrain.world.launcher import Launch
from hpctrain.world.world import Unconnected, World, part_of
from tests.processes import ended
from tests.waiting import wait_until


class Blocks(ArraySource):
    """Numbers, in an order of blocks."""

    def __init__(self, samples, block, aligned):
        super().__init__({"x": np.arange(samples)})
        self.geometry = block, aligned

    def order(self, seed, epoch, shuffle, lanes):
        block, aligned = self.geometry
        return EpochOrder(len(self), seed, epoch, shuffle, block, lanes, aligned)


def world(rank, size):
    return World(Launch("mpirun", rank, size, rank, size))


class Dividing(Unconnected):
    """Each batch by the next of some divisions into shares."""

    def __init__(self, launch, divisions):
        super().__init__(launch)
        self.divisions = divisions

    def part(self, epoch, batch):
        return part_of(self.divisions[(epoch + batch) % len(self.divisions)], self.rank)


def loaders(source, batch_size, size, seed, **options):
    return [
        Loader(source, batch_size, world=world(rank, size), seed=seed, **options)
        for rank in range(size)
    ]


def divisions(size):
    shares = st.lists(st.integers(0, 5), min_size=size, max_size=size).filter(any)
    return st.lists(st.just([1] * size) | shares, min_size=1, max_size=3)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    n=st.integers(1, 200),
    block=st.integers(1, 20),
    aligned=st.booleans(),
    shuffle=st.sampled_from(["block", "full", "none"]),
    workers=st.integers(0, 2),
    seed=st.integers(0, 1000),
    worlds=st.lists(
        st.tuples(st.integers(1, 7).flatmap(divisions), st.integers(1, 40), st.integers(0, 6)),
        min_size=1,
        max_size=5,
    ),
)
def test_exactly_once_whatever_the_world(n, block, aligned, shuffle, workers, seed, worlds):
    """Two epochs through a sequence of (divisions, batch size, batches until both change).

    The first says the world's size too; within it, batches are divided by one after the other.
    """
    source = Blocks(n, block, aligned)
    state = None
    seen: list[list[int]] = [[], []]
    lanes = []
    for shares, batch_size, batches in [*worlds, ([[1, 1]], worlds[0][1], 10**6)]:
        size = len(shares[0])
        ranks = loaders(source, batch_size, size, seed, shuffle=shuffle, workers=workers)
        for loader in ranks:
            loader.world.comm = Dividing(loader.world.launch, shares)
            if state is not None:
                loader.load_state_dict(state)
        while batches > 0 and ranks[0].epoch < 2:
            epoch = ranks[0].epoch
            for parts in zip(*ranks, strict=True):
                now = [x for part in parts for x in part["x"].tolist()]
                seen[epoch] += now
                assert {part.global_samples for part in parts} == {len(now)}
                assert len(now) == min(batch_size, n - parts[0].start)
                assert sum(part.weight for part in parts) == pytest.approx(size)
                state = ranks[0].state_dict()
                assert all(loader.state_dict() == state for loader in ranks)
                batches -= 1
                if len(lanes) == epoch:
                    lanes.append(state["lanes"])
                if not batches:
                    break
    for epoch in range(2):
        order = source.order(seed, epoch, shuffle, lanes[epoch])
        assert seen[epoch] == order.indices(np.arange(n)).tolist()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_world_may_change_between_two_batches(workers):
    """Without a restart: what was made ahead for the old part is made again for the new."""
    source = ArraySource({"x": np.arange(997)})
    parts = [part_of(*case) for case in (([1, 1], 0), ([3, 1], 0), ([3, 1], 1), ([2, 0, 5], 2))]
    asked = []

    class Changing:
        def part(self, epoch, batch):
            asked.append((epoch, batch))
            return parts[batch // 2 % len(parts)]

    loader = Loader(source, 30, world=Changing(), shuffle="none", workers=workers)
    for number, batch in enumerate(loader):
        part = parts[number // 2 % len(parts)]
        start, count = 30 * number, min(30, 997 - 30 * number)
        first = start + -(-count * part.lower // part.total)
        last = start + -(-count * part.upper // part.total)
        assert batch["x"].tolist() == batch.positions.tolist() == list(range(first, last))
        assert batch.weight == (last - first) * part.size / count
    assert asked == [(0, number) for number in range(34)]


def doubled(batch):
    return batch.replace(x=batch["x"] * 2, u=batch.uniform(2), pid=torch.tensor(os.getpid()))


def noisy(batch):
    return batch.replace(noise=torch.rand(batch.samples), more=torch.from_numpy(np.random.rand(3)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread", "process"])
def test_workers_give_what_one_thread_gives(kind):
    source = ArraySource({"x": np.arange(1000), "image": np.random.rand(1000, 300)})
    plain = list(Loader(source, 64, transform=doubled, workers=0))
    made = Loader(source, 64, transform=doubled, workers=2, worker_kind=kind)
    batches = list(made)
    for a, b in zip(plain, batches, strict=True):
        assert a.keys() == b.keys() and (a.start, a.stop, a.samples) == (b.start, b.stop, b.samples)
        assert all(torch.equal(a[name], b[name]) for name in a if name != "pid")
        assert torch.equal(b.uniform(4), a.uniform(4))
    assert {int(b["pid"]) == os.getpid() for b in batches} == {kind == "thread"}
    made.close()


@pytest.mark.slow
def test_processes_are_seeded_for_each_batch():
    source = ArraySource({"x": np.arange(300)})
    runs = []
    for workers in (1, 2):
        loader = Loader(source, 64, transform=noisy, workers=workers, worker_kind="process")
        runs.append([torch.cat([b["noise"].double(), b["more"]]) for b in loader])
        loader.close()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert not torch.equal(runs[0][0], runs[0][1])


def failing(batch):
    if batch.start >= 128:
        raise ValueError("no such thing")
    return batch


def dying(batch):
    os._exit(7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["thread", "process"])
def test_a_transform_that_fails_says_so(kind):
    source = ArraySource({"x": np.arange(1000)})
    loader = Loader(source, 64, transform=failing, worker_kind=kind)
    with pytest.raises(ValueError, match="no such thing"):
        list(loader)
    assert loader.cursor == 128
    loader.close()


@pytest.mark.slow
def test_a_worker_that_dies_is_noticed():
    loader = Loader({"x": np.arange(100)}, 10, transform=dying, worker_kind="process")
    with pytest.raises(Error, match="worker process died"):
        list(loader)


def test_waiting_is_bounded():
    loader = Loader(
        {"x": np.arange(100)},
        10,
        transform=lambda batch: time.sleep(2) or batch,
        workers=1,
        timeout_seconds=0.2,
    )
    with pytest.raises(Error, match=r"position 0 were not ready after 0.2 s"):
        list(loader)


def test_kept_batches_are_not_overwritten():
    source = ArraySource({"x": np.arange(400 * 1000).reshape(400, 1000)})
    batches = list(Loader(source, 40, shuffle="none"))
    assert torch.equal(torch.cat([b["x"] for b in batches]), torch.from_numpy(source._fields["x"]))


def test_buffers_are_used_again():
    buffers = Buffers()
    places = set()
    for _ in range(50):
        array = buffers.empty((1000, 1000), np.uint8)
        places.add(torch.from_numpy(array[10:].reshape(-1)).view(-1, 10)[5:].data_ptr())
        del array
    assert len(places) == 1
    view = torch.from_numpy(buffers.empty((1000, 1000), np.uint8))[3:]
    other = torch.from_numpy(buffers.empty((1000, 1000), np.uint8))
    assert view.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


def test_after_a_fork():
    """Nothing a forked child inherits hangs: it starts threads of its own."""
    loader = Loader({"x": np.arange(1000)}, 10)
    iterator = iter(loader)
    next(iterator)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            seen = sum(int(b["x"].sum()) for b in iterator)
            code = 0 if seen > 0 else 2
        finally:
            os._exit(code)
    try:
        wait_until(lambda: ended(child), "the forked child to end")
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    assert status == 0


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


@pytest.mark.slow
@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    data=st.data(),
    seed=st.integers(0, 100),
    size=st.integers(1, 4),
)
def test_mixture(lengths, data, seed, size):
    """Proportions to 1/1024, each source through its own epochs, in any world."""
    weights = [data.draw(st.floats(0.1, 1)) for _ in lengths]
    sources = [ArraySource({"x": 1000 * i + np.arange(n)}) for i, n in enumerate(lengths)]
    mixture = Mixture(sources, weights, samples=1024)
    ranks = loaders(mixture, 60, size, seed)
    drawn: list[int] = []
    for _ in range(2):
        drawn += chain.from_iterable(
            part["x"].tolist() for parts in zip(*ranks, strict=True) for part in parts
        )
    values = np.array(drawn)
    assert len(values) == 2048
    for i, n in enumerate(lengths):
        mine = values[values // 1000 == i] - 1000 * i
        assert abs(len(mine) - 2048 * weights[i] / sum(weights)) <= 2 + 2 * len(lengths)
        counts = np.bincount(mine, minlength=n)
        assert counts.max() - counts.min() <= 1
        for start in range(0, len(mine) - n + 1, n):
            assert len(set(mine[start : start + n])) == n


def test_mixture_refuses():
    a, b = ArraySource({"x": np.arange(5)}), ArraySource({"y": np.arange(5)})
    with pytest.raises(Error, match="weight"):
        Mixture([a, a], [1, 0])
    with pytest.raises(Error, match="less than 1/1024"):
        Mixture([a, a], [1, 1e-6])
    with pytest.raises(Error, match=r"fields \['x'\] and \['y'\]|fields"):
        list(Loader(Mixture([a, b]), 10, workers=0))


def test_weighted():
    source = ArraySource({"x": np.arange(3)})
    drawn = Weighted(source, np.array([0.0, 1.0, 3.0]), samples=40_000)
    once = torch.cat([b["x"] for b in Loader(drawn, 1000)])
    shares = torch.bincount(once, minlength=3) / 40_000
    assert torch.allclose(shares, torch.tensor([0, 0.25, 0.75]), atol=0.01)
    parts = zip(*loaders(drawn, 1000, 3, 0), strict=True)
    assert torch.equal(once, torch.cat([part["x"] for batch in parts for part in batch]))
    with pytest.raises(Error, match="negative"):
        Weighted(source, np.array([1.0, -1.0, 3.0]))


def test_pytorchs_own_loader_takes_a_source():
    source = ArraySource({"x": np.arange(100), "y": np.random.rand(100, 2)})
    batches = list(torch.utils.data.DataLoader(source, batch_size=30))
    assert torch.equal(torch.cat([b["x"] for b in batches]), torch.arange(100))
    assert batches[0]["y"].shape == (30, 2)


def test_a_state_of_other_samples_is_refused():
    state = Loader({"x": np.arange(10)}, 3, seed=1).state_dict()
    for other in (
        Loader({"x": np.arange(11)}, 3, seed=1),
        Loader({"x": np.arange(10)}, 3, seed=2),
        Loader({"x": np.arange(10)}, 3, seed=1, shuffle="none"),
    ):
        with pytest.raises(Error, match="repeated and missed"):
            other.load_state_dict(state)


def test_a_run_from_before_keeps_its_order():
    """States of version 1 of the order do not name it."""
    source = Blocks(203, 8, True)
    for wrapped in (source, Mixture([source])):
        loader = Loader(wrapped, 10, seed=1, workers=0)
        state = loader.state_dict()
        assert state.pop("order") == 2
        loader.load_state_dict(state)
        assert loader.state_dict()["order"] == 1
        for epoch in range(2):
            got = [x for batch in loader for x in batch["x"].tolist()]
            assert sorted(got) == list(range(203))
            if wrapped is source:
                order = replace(source.order(1, epoch, "block", 10), version=1)
                assert got == order.indices(np.arange(203)).tolist()
        with pytest.raises(Error, match="version 3"):
            loader.load_state_dict({**state, "order": 3})


def test_a_mixture_of_samples_of_any_length(tmp_path):
    rows = [np.arange(n % 5, dtype="f4") + n for n in range(60)]
    with ShardWriter(tmp_path / "s") as writer:
        writer.write("train", {"r": Ragged.of(rows), "y": np.arange(60)})
    split = ShardSet(tmp_path / "s").split("train")
    mixture = Mixture([split, split], [1, 3])
    for batch in Loader(mixture, 16):
        for row, number in zip(batch.rows("r"), batch["y"].tolist(), strict=True):
            assert np.array_equal(row.numpy(), rows[number])
