"""Embedding tables in one process, against torch's own embeddings and dicts."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hpctrain
from hpctrain.config import PsConfig
from hpctrain.errors import Error
from hpctrain.strategies.base import check_shareable
from hpctrain.strategies.parameter_server import check_tables
from hpctrain.tables import files
from hpctrain.tables.index import Index
from hpctrain.tables.row_store import RowStore
from hpctrain.tables.rules import Adagrad, Adam, Ftrl, RowAdagrad, Sgd, rule_of
from hpctrain.tables.spec import SHARDS, Start, TableSpec
from hpctrain.tables.table import Table

LARGEST = 2**63 - 1


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(-LARGEST - 1, LARGEST) | st.integers(0, 50))),
        max_size=30,
    ),
    st.integers(1, 400),
)
def test_an_index_is_a_dict(calls, spread):
    index, oracle, slot = Index(), {}, 0
    for adds, ids in calls:
        if adds:
            ids = [i for i in dict.fromkeys([*ids, *range(slot, slot + spread)]) if i not in oracle]
            fresh = dict(zip(ids, range(slot, slot + len(ids)), strict=True))
            slot += len(ids)
            index.add(np.array(ids, np.int64), np.array(list(fresh.values()), np.int64))
            oracle |= fresh
        else:
            gone = [i for i in dict.fromkeys(ids) if i in oracle] + list(oracle)[: spread // 2]
            gone = list(dict.fromkeys(gone))
            index.remove(np.array(gone, np.int64))
            for i in gone:
                del oracle[i]
        asked = np.array([*oracle, *ids, 12345], np.int64)
        assert index.find(asked).tolist() == [oracle.get(i, -1) for i in asked.tolist()]
        assert index.size == len(oracle)


def test_an_index_does_not_grow_where_ids_come_and_go():
    index = Index()
    for turn in range(300):
        ids = np.arange(turn * 100, turn * 100 + 100)
        index.add(ids, ids)
        index.remove(ids)
    assert index._new.capacity <= 2048


def test_what_rows_begin_with_is_a_function_of_seed_name_and_id():
    def values(ids, name="a", seed=1, start=None):
        rule = Sgd(lr=0.1)
        start = start or Start.of("normal:0.5")
        spec = TableSpec(name, 5, None, "float64", rule, start, seed)
        return spec.start_values(np.array(ids, np.int64))

    whole = values(range(-500, 500))
    assert torch.equal(whole[[3, 1, 999]], values([-497, -499, 499]))
    assert not torch.equal(whole, values(range(-500, 500), name="b"))
    assert not torch.equal(whole, values(range(-500, 500), seed=2))
    assert abs(whole.mean()) < 0.03 and abs(whole.std() - 0.5) < 0.03
    flat = values(range(1000), start=Start.of("uniform:2"))
    assert -2 <= flat.min() < -1.9 and 1.9 < flat.max() <= 2 and abs(flat.mean()) < 0.1
    assert len(flat.unique()) == flat.numel()


TORCH = {
    "sgd": (Sgd(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "adagrad": (
        Adagrad(lr=0.1, start=0.2),
        lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.2),
    ),
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("mode", ["sum", "mean", None])
def test_a_table_is_an_embedding_of_torch(name, mode):
    rule, make = TORCH[name]
    table = Table("a", 4, rows=20, mode=mode, optimizer=rule, dtype=torch.float64, seed=3)
    start = table.spec.start_values(np.arange(20))
    kind = nn.Embedding if mode is None else lambda *a, **k: nn.EmbeddingBag(*a, mode=mode, **k)
    oracle = kind(20, 4, sparse=True, _weight=start.clone())
    optimizer = make(oracle.parameters())
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    for step in range(8):
        bags = torch.randint(0, 20, (6, 3), generator=generator)
        flat, offsets = bags.flatten(), torch.arange(0, 18, 3)
        results = []
        for module in (table, oracle):
            if mode is None:
                result = module(bags).sum(1)
            elif step % 2:
                result = module(flat, offsets)
            else:
                result = module(bags)
            (result - target).square().mean().backward()
            results.append(result.detach())
        assert (results[0] - results[1]).abs().max() < 1e-12
        optimizer.step()
        optimizer.zero_grad()
        table.step()
    assert (table.store.read(torch.arange(20)) - oracle.weight).abs().max() < 1e-12


def test_samples_have_weights_and_passes_add_up():
    table = Table("a", 2, hashed=True, optimizer=Sgd(lr=1.0), init="zeros", dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    for _ in range(2):
        out = table(torch.tensor([5, 5, 9]), torch.tensor([0, 2]), weights)
        out.sum().backward()
    table.step()
    assert table.store.read(torch.tensor([5, 9, 1])).tolist() == [[-6.0] * 2, [-8.0] * 2, [0.0] * 2]
    with torch.no_grad():
        table(torch.tensor([[1]]))
    table.step()
    assert len(table.store) == 2, "a pass without gradients makes no row"


def steps_of(rule, count=6, ids=((1, 2), (2,), (1, 2, 3), (3,), (2,), (1,))):
    """Rows after updates, and the gradients that each has had."""
    generator = torch.Generator().manual_seed(1)
    spec = TableSpec("a", 3, None, "float64", rule, Start.of("uniform:1"), 0)
    store, had = RowStore(spec), {}
    for some in ids[:count]:
        gradient = torch.randn(len(some), 3, generator=generator, dtype=torch.float64)
        for number, each in zip(some, gradient, strict=True):
            had.setdefault(number, []).append(each.clone())
        store.update(torch.tensor(some), gradient, torch.ones(len(some), dtype=torch.int64))
    return spec, store, had


def test_each_row_has_adams_own_steps():
    spec, store, had = steps_of(Adam(lr=0.1))
    for number, gradients in had.items():
        row = nn.Parameter(spec.start_values(np.array([number])))
        optimizer = torch.optim.Adam([row], lr=0.1)
        for gradient in gradients:
            row.grad = gradient[None]
            optimizer.step()
        assert (store.read(torch.tensor([number])) - row).abs().max() < 1e-12


def test_a_row_has_one_sum_of_squares():
    spec, store, had = steps_of(RowAdagrad(lr=0.1))
    for number, gradients in had.items():
        row, total = spec.start_values(np.array([number]))[0], 0.0
        for gradient in gradients:
            total += float(gradient.square().mean())
            row = row - 0.1 * gradient / (total**0.5 + 1e-10)
        assert (store.read(torch.tensor([number]))[0] - row).abs().max() < 1e-12


def test_ftrl_is_the_papers():
    spec, store, had = steps_of(Ftrl(lr=0.2, l1=1.0, l2=0.1))
    zeros = 0
    for number, gradients in had.items():
        for column in range(3):
            weight = float(spec.start_values(np.array([number]))[0, column])
            z = n = 0.0
            for gradient in gradients:
                g = float(gradient[column])
                sigma = ((n + g * g) ** 0.5 - n**0.5) / 0.2
                z, n = z + g - sigma * weight, n + g * g
                sign = 1 if z > 0 else -1
                scale = (1 + n**0.5) / 0.2 + 0.1
                weight = 0.0 if abs(z) <= 1.0 else -(z - sign * 1.0) / scale
            zeros += weight == 0
            assert abs(float(store.read(torch.tensor([number]))[0, column]) - weight) < 1e-12
    assert 0 < zeros < 9


def test_a_rows_gradient_is_clipped_by_itself():
    _, store, had = steps_of(Sgd(lr=1.0, clip=0.5), count=1)
    for number, (gradient,) in had.items():
        moved = store.spec.start_values(np.array([number])) - store.read(torch.tensor([number]))
        expected = gradient * min(1.0, 0.5 / float(gradient.norm()))
        assert (moved - expected).abs().max() < 1e-12


class Slow:
    """A dict of rows: what is admitted and forgotten, said as in the documentation."""

    def __init__(self, spec):
        self.spec, self.rows, self.waits, self.version = spec, {}, {}, 0

    def due(self, row, version, rows=True):
        spec = self.spec
        if spec.evict_after is None or version - row["touched"] <= spec.evict_after:
            return False
        return not rows or spec.evict_below is None or row["sights"] < spec.evict_below

    def update(self, counts):
        self.version += 1
        for table, rows in ((self.rows, True), (self.waits, False)):
            for i in [i for i, row in table.items() if self.due(row, self.version, rows)]:
                del table[i]
        for i, count in counts.items():
            if i not in self.rows:
                seen = self.waits.pop(i, {"sights": 0})["sights"]
                if seen + count < self.spec.admit_after:
                    self.waits[i] = {"sights": seen + count, "touched": self.version}
                    continue
                self.rows[i] = {"sights": seen, "value": 0}
            row = self.rows[i]
            row["sights"] += count
            row["value"] -= 1
            row["touched"] = self.version


@settings(max_examples=30)
@given(
    st.lists(st.dictionaries(st.integers(0, 15), st.integers(1, 3), max_size=6), max_size=25),
    st.integers(1, 4), st.none() | st.integers(1, 4), st.none() | st.integers(1, 6),
)  # fmt: skip
def test_rows_are_admitted_and_forgotten(steps, admit, evict, below):
    below = None if evict is None else below
    spec = TableSpec(
        "a", 1, None, "float64", Sgd(lr=1.0), Start("zeros", 0.0), 0, admit, evict, below
    )
    store, slow = RowStore(spec), Slow(spec)
    ids = torch.arange(16)
    for counts in steps:
        some = torch.tensor(sorted(counts), dtype=torch.int64)
        sights = torch.tensor([counts[i] for i in some.tolist()], dtype=torch.int64)
        store.update(some, torch.ones(len(some), 1, dtype=torch.float64), sights)
        slow.update(counts)
        expected = [
            0 if i not in slow.rows or slow.due(slow.rows[i], slow.version + 1)
            else slow.rows[i]["value"] for i in range(16)
        ]  # fmt: skip
        assert store.read(ids)[:, 0].tolist() == expected
    alive = {i for i, row in slow.rows.items() if not slow.due(row, slow.version + 1)}
    assert set(store.rows.read("id", store.listed(store.rows)).tolist()) == alive
    assert store.made - store.forgotten == len(store)


def test_memory_of_what_is_forgotten_is_used_again():
    spec = TableSpec("a", 2, None, "float32", Sgd(lr=1.0), Start.of("uniform:1"), 0, 1, 2)
    store = RowStore(spec)
    for turn in range(60):
        ids = torch.arange(turn * 100, turn * 100 + 100)
        store.update(ids, torch.ones(100, 2), torch.ones(100, dtype=torch.int64))
    assert len(store) < 2000 and store.rows.used < 2000 and store.forgotten > 4000


def test_all_parts_of_a_table_are_used_alike():
    spec = TableSpec("a", 2, None, "float32", Sgd(lr=1.0), Start.of("zeros"), 0)
    counts = np.bincount(spec.shards(np.arange(SHARDS * 100)), minlength=SHARDS)
    assert counts.min() > 50 and counts.max() < 160


def test_a_checkpoint_of_one_process_comes_back(tmp_path):
    model = nn.ModuleDict({"a": Table("a", 3, hashed=True), "b": Table("b", 2, rows=9, mode=None)})
    for table in model.values():
        table(torch.tensor([[1, 5], [7, 1]])).square().sum().backward()
        table.step()
    stores = {name: table.store for name, table in model.items()}
    files.finish(files.write(tmp_path, 0, stores))
    other = copy.deepcopy(model)
    files.load(tmp_path, 1, list(other.values()))
    ids = torch.arange(9)
    for name, table in model.items():
        assert torch.equal(other[name].store.read(ids), table.store.read(ids))
        assert other[name].statistics()["rows"] == table.statistics()["rows"] == 3
    with pytest.raises(Error, match="without tables, and this one has some"):
        files.load(tmp_path, 0, list(model.values()))
    with pytest.raises(Error, match="'b' is only in one"):
        files.load(tmp_path, 1, [model["a"]])


def test_a_table_follows_its_model_to_float64():
    model = nn.Sequential(Table("a", 3, hashed=True)).double()
    assert model(torch.tensor([[1, 2]])).dtype == torch.float64
    model[0](torch.tensor([[1]])).sum().backward()
    model[0].step()
    with pytest.raises(Error, match="its type stays"):
        model.float()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rows": 5, "hashed": True}, "rows=5 and hashed=True"),
        ({}, "rows=None and hashed=False"),
        ({"rows": 5, "mode": "max"}, "no mode 'max'"),
        ({"rows": 5, "optimizer": "adm"}, "no optimizer 'adm' of tables.*'adam'"),
        ({"rows": 5, "optimizer": Sgd(lr=-1.0)}, r"Sgd\(lr=-1.0\)"),
        ({"rows": 5, "init": "orthogonal"}, "cannot start from 'orthogonal'"),
        ({"rows": 5, "dtype": torch.float16}, "cannot be torch.float16"),
        ({"rows": 5, "evict_below": 3}, "evict_below without evict_after"),
    ],
)
def test_what_is_no_table_is_refused(arguments, says):
    with pytest.raises(Error, match=says):
        Table("a", 4, **arguments)
    with pytest.raises(Error, match="a table's name is 'a b'"):
        Table("a b", 4, rows=3)
    with pytest.raises(Error, match="table 'a' of 3 rows has no row 3"):
        Table("a", 4, rows=3)(torch.tensor([[3]]))


def test_who_holds_no_tables_says_so():
    model = nn.ModuleList([Table("a", 4, rows=3), nn.Linear(4, 1)])
    with pytest.raises(Error, match="holds no embedding tables, and this model has 'a'"):
        check_shareable(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for settings_ in ({"replicas": 2}, {"consistency": "backup:1"}, {"record_order": "x"}):
        with pytest.raises(Error, match="is not for models with embedding tables"):
            check_tables(PsConfig(servers=3, **settings_))


def test_one_process_updates_tables_with_its_optimizer():
    world = hpctrain.init()
    model = nn.ModuleDict({"t": Table("t", 2, rows=5, optimizer="sgd"), "l": nn.Linear(2, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = hpctrain.strategy("single", world).wrap(model, optimizer)
    model["l"](model["t"](torch.tensor([[1, 2]]))).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert len(model["t"].store) == 0, "what is forgotten is not applied"
    model["l"](model["t"](torch.tensor([[1, 2]]))).sum().backward()
    optimizer.step()
    assert len(model["t"].store) == 2
    assert rule_of("sgd") == model["t"].spec.rule
