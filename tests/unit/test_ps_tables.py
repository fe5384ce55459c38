"""Embedding tables on servers against one process, with every interleaving, in one thread."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hpctrain.errors import Error, PeerLost
from hpctrain.tables.row_store import RowStore
from hpctrain.tables.rules import Adagrad, Adam, Ftrl, RowAdagrad, Sgd
from hpctrain.tables.spec import Start, TableSpec
from hpctrain.tables.table import Touched
from tests.unit.table_simulation import Simulation

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
RULES = [
    Sgd(lr=0.1), Sgd(lr=0.1, clip=0.2), Adagrad(lr=0.1, start=0.1), RowAdagrad(lr=0.1),
    Adam(lr=0.05), Ftrl(lr=0.2, l1=0.01, l2=0.1),
]  # fmt: skip
STEPS = 5


def spec(name="a", dim=3, rule=RULES[0], **options):
    options = {
        "rows": None,
        "dtype": "float64",
        "start": Start("uniform", 0.5),
        "seed": 7,
        **options,
    }
    return TableSpec(name, dim, options.pop("rows"), options.pop("dtype"), rule,
                     options.pop("start"), options.pop("seed"), **options)  # fmt: skip


def batches(seed, workers, samples=6):
    """Ids of two tables by worker and step: few of them often, as in life."""
    generator = torch.Generator().manual_seed(seed)
    draws = {
        (w, t): [torch.randint(0, 12, (samples,), generator=generator).pow(2) - 40 for _ in "ab"]
        for t in range(STEPS)
        for w in range(workers)
    }
    return lambda worker, step: draws[worker, step]


def gradient(table, ids, rows):
    return (rows - ids[:, None] / 40.0) * (1 + table)


def single(specs, workers, batch):
    """One process with the whole batch: the mean over workers of their sums."""
    stores = [RowStore(each) for each in specs]
    for step in range(STEPS):
        for table, store in enumerate(stores):
            ids = torch.cat([batch(w, step)[table] for w in range(workers)])
            distinct, inverse, counts = torch.unique(ids, return_inverse=True, return_counts=True)
            rows = store.read(distinct)
            each = gradient(table, ids, rows[inverse]) / workers
            total = torch.zeros_like(rows).index_add_(0, inverse, each)
            store.update(distinct, total, counts)
    return stores


IDS = torch.arange(12).pow(2) - 40
topologies = {
    "workers": st.integers(1, 3),
    "servers": st.integers(1, 3),
    "seed": st.integers(0, 10**6),
}


@pytest.mark.slow
@settings(max_examples=12, phases=PHASES)
@given(**topologies, rule=st.sampled_from(RULES), admit=st.integers(1, 3),
       evict=st.sampled_from([(None, None), (1, None), (2, 5)]))  # fmt: skip
def test_sync_is_one_process_with_the_whole_batch(workers, servers, seed, rule, admit, evict):
    options = {"admit_after": admit, "evict_after": evict[0], "evict_below": evict[1]}
    specs = [spec("a", 3, rule, **options), spec("b", 2, rule, **options)]
    batch = batches(seed, workers)
    simulation = Simulation(specs, workers, servers, seed=seed)
    simulation.run(STEPS, batch, gradient)
    for table, store in enumerate(single(specs, workers, batch)):
        found = simulation.rows(table, IDS)
        assert (found - store.read(IDS)).norm() <= 1e-12 * (1 + store.read(IDS).norm())
        ours = [group.stores[table] for group in simulation.owned()]
        for part in ("rows", "candidates"):
            assert sum(len(s.listed(getattr(s, part))) for s in ours) == len(
                store.listed(getattr(store, part))
            )


@pytest.mark.slow
@settings(max_examples=8, phases=PHASES)
@given(**topologies, bound=st.integers(0, 2))
def test_staleness_is_bounded_and_no_push_is_lost(workers, servers, seed, bound):
    simulation = Simulation(
        [spec(), spec("b")], workers, servers,
        {"consistency": f"ssp:{bound}", "lr_by_delay": False}, seed,
    )  # fmt: skip
    # Of constant gradients and SGD every order gives the same sum.
    simulation.run(STEPS, batches(seed, workers), lambda table, ids, rows: torch.ones_like(rows))
    assert all(clock - slowest <= bound for _, clock, slowest in simulation.history)
    for table in range(2):
        batch = batches(seed, workers)
        all_ids = torch.cat([batch(w, t)[table] for w in range(workers) for t in range(STEPS)])
        counts = (all_ids[None, :] == IDS[:, None]).sum(1)
        start = simulation.specs[table].start_values(IDS.numpy())
        expected = start - 0.1 * counts[:, None].double()
        assert (simulation.rows(table, IDS) - expected).abs().max() < 1e-12


def test_without_a_bound_workers_run_ahead_and_old_gradients_count_less():
    ahead, least = 0, 1.0
    for seed in range(3):
        simulation = Simulation([spec(), spec("b")], 4, 1, {"consistency": "async"}, seed)
        batch = batches(seed, 4)
        simulation.run(STEPS, batch, lambda table, ids, rows: torch.ones_like(rows))
        ahead = max(ahead, *(clock - slowest for _, clock, slowest in simulation.history))
        moved = (simulation.rows(0, IDS) - simulation.specs[0].start_values(IDS.numpy())).abs()
        least = min(least, float(moved.sum()) / (0.1 * 3 * 6 * 4 * STEPS))
    assert ahead >= 2
    assert 0 < least < 0.99  # rates are divided by delays


def test_workers_without_samples_and_of_other_weights():
    weights = [1.5, 1.5, 0.0]
    batch = batches(3, 3)
    simulation = Simulation([spec()], 3, 2, seed=1)
    simulation.run(
        STEPS, lambda w, t: [batch(w, t)[0] if weights[w] else torch.empty(0, dtype=torch.int64)],
        gradient, weights.__getitem__,
    )  # fmt: skip
    store = single([spec()], 2, batch)[0]
    assert (simulation.rows(0, IDS) - store.read(IDS)).norm() < 1e-12


def test_a_lost_worker_is_not_waited_for():
    simulation = Simulation([spec(), spec("b")], 3, 2, seed=4)
    simulation.run(2, batches(1, 3), gradient)
    simulation.kill(2)
    simulation.run(3, batches(2, 3), gradient)
    assert all(group.version >= 5 for group in simulation.owned())


def test_a_lost_server_ends_the_run_in_a_line():
    simulation = Simulation([spec()], 2, 2, seed=4)
    simulation.run(1, lambda w, t: batches(1, 2)(w, t)[:1], gradient)
    simulation.kill(100)
    with pytest.raises(PeerLost, match="rows of tables"):
        simulation.until(lambda: False)


@pytest.mark.slow
@settings(max_examples=16, phases=PHASES)
@given(workers=st.integers(1, 3), servers=st.integers(2, 3), seed=st.integers(0, 10**6),
       consistency=st.sampled_from(["sync", "async", "ssp:1"]), tick=st.integers(0, 600),
       lost=st.integers(0, 2))  # fmt: skip
def test_a_lost_servers_rows_come_back_from_their_copy(
    workers, servers, seed, consistency, tick, lost
):
    config = {"consistency": consistency, "replicas": 1, "lr_by_delay": False}
    specs = [spec("a", 3, Adam(lr=0.05), admit_after=2), spec("b", 2, Sgd(lr=0.1))]
    batch = batches(seed, workers)
    simulation = Simulation(specs, workers, servers, config, seed)
    simulation.kill_after(tick, 100 + lost % servers)
    simulation.slow = 100 + (lost + 1) % servers  # which has the copy
    # In async the sum of SGD's updates tells whether a push is missing, or there twice.
    constant = lambda table, ids, rows: torch.ones_like(rows)  # noqa: E731
    simulation.run(STEPS, batch, gradient if consistency == "sync" else constant)
    simulation.fall()
    if consistency == "sync":
        whole = Simulation(specs, workers, servers, {"consistency": "sync"}, seed + 1)
        whole.run(STEPS, batch, gradient)
        for table in range(2):  # the very bits of a run that lost nothing
            assert torch.equal(simulation.rows(table, IDS), whole.rows(table, IDS))
    else:
        all_ids = torch.cat([batch(w, t)[1] for w in range(workers) for t in range(STEPS)])
        counts = (all_ids[None, :] == IDS[:, None]).sum(1)[:, None].double()
        expected = specs[1].start_values(IDS.numpy()) - 0.1 * counts
        assert (simulation.rows(1, IDS) - expected).abs().max() < 1e-12
    clocks = {clock for group in simulation.owned() for clock in group.schedule.applied.values()}
    assert clocks == {STEPS}


@pytest.mark.slow
@settings(max_examples=5, phases=PHASES)
@given(workers=st.integers(1, 2), before=st.integers(1, 3), after=st.integers(1, 3),
       rule=st.sampled_from(RULES), seed=st.integers(0, 10**6))  # fmt: skip
def test_a_checkpoint_is_read_by_any_number_of_servers(
    tmp_path_factory, workers, before, after, rule, seed
):
    folder = tmp_path_factory.mktemp("tables")
    specs = [spec("a", 3, rule, admit_after=2, evict_after=2), spec("b", 2, rule)]
    first = Simulation(specs, workers, before, seed=seed)
    first.run(STEPS, batches(seed, workers), gradient)
    assert first.keep(0, folder / "x") == before
    second = Simulation(specs, workers, after, seed=seed + 1)
    second.keep(0, folder / "x", before)
    for simulation in (first, second):
        simulation.run(STEPS, batches(seed + 1, workers), gradient)
    for table in range(2):
        assert torch.equal(first.rows(table, IDS), second.rows(table, IDS))
    first.keep(0, folder / "y")
    third = Simulation(specs, workers, after, seed=seed + 2)
    third.keep(0, folder / "y", before)
    third.keep(0, folder / "again")
    second.keep(0, folder / "second")
    for path in (folder / "second").iterdir():
        assert path.read_bytes() == (folder / "again" / path.name).read_bytes(), path.name


def test_damage_and_other_tables_are_told(tmp_path):
    first = Simulation([spec()], 1, 2)
    first.run(STEPS, lambda w, t: batches(0, 1)(w, t)[:1], gradient)
    first.keep(0, tmp_path)
    other = Simulation([spec(dim=4)], 1, 1)
    with pytest.raises(Error, match="of another table 'a': its dim is 3, and not 4"):
        other.keep(0, tmp_path, 2)
    path = tmp_path / "tables-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Error, match=r"tables-00001.safetensors is damaged.*checksum"):
        Simulation([spec()], 1, 1).keep(0, tmp_path, 2)
    path.unlink()
    with pytest.raises(Error, match=r"tables-00001.safetensors is damaged"):
        Simulation([spec()], 1, 3).keep(0, tmp_path, 2)


def test_pushes_wait_while_rows_are_written(tmp_path):
    """What is written is of one moment, though workers go on."""
    simulation = Simulation([spec()], 1, 1, {"consistency": "async"})
    simulation.run(1, lambda w, t: batches(0, 1)(w, t)[:1], gradient)
    group, client = simulation.servers[100].tables.groups[100], simulation.clients[0].tables
    before = simulation.rows(0, IDS)
    group._job = iter([None] * 3)
    group._asked = (99, 0)
    group.poll = lambda: None  # the disk is slow
    ones = torch.ones(12, 3, dtype=torch.float64)
    client.push(1.0, 1.0, [Touched(IDS, ones, torch.ones_like(IDS))])
    for _ in range(100):
        simulation.move()
    assert torch.equal(group.stores[0].read(IDS), before)
    del group.poll
    simulation.until(lambda: simulation.settled(0))
    assert not torch.equal(group.stores[0].read(IDS), before)
