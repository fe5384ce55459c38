"""Sharded optimizer state against plain torch in one process, with threads as ranks, in float64."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hpctrain.errors import Error
from hpctrain.optim.lamb import Lamb
from hpctrain.strategies import gradient_averaging
from hpctrain.strategies.sharded import (
    ELEMENTWISE,
    ShardedOptimizer,
    check_elementwise,
    part_of,
)
from tests.unit.threads import ThreadExchange, on_ranks

SIZE = 3
SAMPLES = [4, 1, 3]


@pytest.fixture(autouse=True)
def numbers(monkeypatch):
    """Threads wrap side by side, processes each for itself."""
    monkeypatch.setattr(gradient_averaging, "_numbers", itertools.repeat(0))


class Net(nn.Module):
    """Matrices, a single number, a part that is used at times, one frozen, one with strides."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.rare = nn.Parameter(torch.randn(7))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.turned = nn.Parameter(torch.randn(2, 5).t())
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                )

    def forward(self, x, step):
        hidden = torch.tanh(self.first(x)) * self.scale
        used = self.rare.sum() if step % 3 == 1 else 0.0
        return self.last(hidden) + hidden @ self.turned + used


def loss_of(model, step, ranks):
    generator = torch.Generator().manual_seed(step)
    parts = []
    for samples in SAMPLES:
        inputs = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
        parts.append((inputs, torch.randn(samples, 2, generator=generator, dtype=torch.float64)))
    inputs, targets = (torch.cat([parts[r][n] for r in ranks]) for n in (0, 1))
    return (model(inputs, step) - targets).square().mean()


def groups(model):
    """Two groups, not in the model's order."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": rest, "weight_decay": 0.0}, {"params": matrices, "lr": 0.03}]


MAKE = {
    "sgd": lambda m: torch.optim.SGD(groups(m), lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda m: torch.optim.AdamW(groups(m), lr=0.02, amsgrad=True),
    "adagrad": lambda m: torch.optim.Adagrad(groups(m), lr=0.05),
    "rmsprop": lambda m: torch.optim.RMSprop(groups(m), lr=0.01, momentum=0.5),
    "nadam": lambda m: torch.optim.NAdam(groups(m), lr=0.01),
}


def alone(kind, steps, clip_norm=None):
    model = Net()
    optimizer = MAKE[kind](model)
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, range(SIZE)).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
    return model, optimizer


def advance(model, optimizer, steps, rank):
    for step in steps:
        optimizer.zero_grad()
        (loss_of(model, step, [rank]) * (SAMPLES[rank] * SIZE / sum(SAMPLES))).backward()
        optimizer.step()


def ran(results):
    for each in results:
        if isinstance(each, BaseException):
            raise each
    return results


def sharded(kind, steps, clip_norm=None, bucket_bytes=150, start=None, size=SIZE):
    """Every rank's model, optimizer, and what rank 0 would save."""

    def train(comm):
        model = Net()
        inner = MAKE[kind](model)
        if start is not None:
            model.load_state_dict(start[0])
            inner.load_state_dict(copy.deepcopy(start[1]))
        optimizer = ShardedOptimizer(model, inner, comm, bucket_bytes, clip_norm)
        advance(model, optimizer, steps, comm.rank)
        return model, optimizer, optimizer.world_state()

    return ran(on_ranks(size, train, ThreadExchange))


def assert_close(ours, theirs, tolerance=1e-12):
    for mine, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_equals_one_process(kind, clip_norm):
    """Parameters and the whole state, groups in another order than the model, and a part of it
    unused in some steps."""
    model, optimizer = alone(kind, range(6), clip_norm)
    results = sharded(kind, range(6), clip_norm)
    for found, _, _ in results:
        assert_close(found, model)
        assert all(
            torch.equal(a, b)
            for a, b in zip(found.parameters(), results[0][0].parameters(), strict=True)
        )
    ours, theirs = results[0][2], optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        assert ours["state"][number].keys() == state.keys()
        for name, value in state.items():
            mine = ours["state"][number][name]
            assert mine.dtype == value.dtype and mine.shape == value.shape, name
            assert (mine - value).norm() <= 1e-12 * value.norm() + 1e-300, name


@pytest.mark.parametrize("bucket_bytes", [1, 150, 2**20])
def test_the_state_is_a_share(bucket_bytes):
    """Of n ranks each has 1/n, but for an element of each bucket and a count of each piece."""
    results = sharded("adamw", range(2), bucket_bytes=bucket_bytes)
    whole = sum(p.numel() for p in results[0][0].parameters() if p.requires_grad)
    held = [
        sum(s["exp_avg"].numel() for s in optimizer.inner.state.values())
        for _, optimizer, _ in results
    ]
    buckets = len(results[0][1]._buckets)
    assert sum(held) == whole
    assert max(held) - whole / SIZE <= buckets
    if bucket_bytes == 2**20:
        assert max(held) == -(-whole // SIZE)
    assert all("max_exp_avg_sq" in s for _, o, _ in results for s in o.inner.state.values())


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_goes_on_from_anybodys_checkpoint(kind):
    """Of one process, and of itself on as many ranks: then with the same bits."""
    whole = sharded(kind, range(7))
    half = sharded(kind, range(4))
    again = sharded(kind, range(4, 7), start=(half[0][0].state_dict(), half[0][2]))
    for (expected, _, _), (found, _, _) in zip(whole, again, strict=True):
        assert all(
            torch.equal(a, b)
            for a, b in zip(expected.parameters(), found.parameters(), strict=True)
        )
    model, optimizer = alone(kind, range(4))
    for found, _, _ in sharded(
        kind, range(4, 7), start=(model.state_dict(), optimizer.state_dict())
    ):
        assert_close(found, alone(kind, range(7))[0])


def test_several_passes_in_a_step():
    """Within no_sync() or not, sums are sums."""

    def train(comm):
        model = Net()
        optimizer = ShardedOptimizer(model, MAKE["sgd"](model), comm, 150)
        for first in (0, 3):
            optimizer.zero_grad()
            weight = SAMPLES[comm.rank] * SIZE / sum(SAMPLES)
            with optimizer.no_sync():
                (loss_of(model, first, [comm.rank]) * weight).backward()
            (loss_of(model, first + 1, [comm.rank]) * weight).backward()
            (loss_of(model, first + 2, [comm.rank]) * weight).backward()
            optimizer.step()
        return model

    model = Net()
    optimizer = MAKE["sgd"](model)
    for first in (0, 3):
        optimizer.zero_grad()
        for step in range(first, first + 3):
            loss_of(model, step, range(SIZE)).backward()
        optimizer.step()
    for found in ran(on_ranks(SIZE, train, ThreadExchange)):
        assert_close(found, model)


def test_types_that_cannot_be_summed_and_sparse_rows():
    """bfloat16 and complex parameters in parts; an embedding with sparse gradients whole."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.short = nn.Parameter(torch.randn(5).bfloat16())
            self.turns = nn.Parameter(torch.randn(3, dtype=torch.complex64))
            self.table = nn.Embedding(6, 2, sparse=True)

        def forward(self, rank):
            rows = self.table(torch.tensor([rank, 5]))
            return self.short.float().square().sum() + self.turns.abs().sum() + rows.square().sum()

    def train(comm):
        model = models[comm.rank]
        optimizer = ShardedOptimizer(
            model, torch.optim.SGD(model.parameters(), lr=0.1), comm, 2**20, 1.0
        )
        for _ in range(3):
            optimizer.zero_grad()
            model(comm.rank).backward()
            optimizer.step()
        return model, optimizer.grad_norm

    model, *models = (Mixed() for _ in range(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (sum(model(rank) for rank in range(2)) / 2).backward()
        gradients = [
            p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in model.parameters()
        ]
        norm = torch.stack([g.abs().float().norm() for g in gradients]).norm()
        for parameter in model.parameters():
            parameter.grad *= min(1.0, 1.0 / (float(norm) + 1e-6))
        optimizer.step()
    for found, last in ran(on_ranks(2, train, ThreadExchange)):
        assert torch.allclose(last.float(), norm, rtol=1e-2)
        for ours, theirs in zip(found.parameters(), model.parameters(), strict=True):
            assert torch.allclose(ours, theirs, rtol=2e-2 if ours.dtype == torch.bfloat16 else 1e-3)


def test_a_gradient_that_is_no_number_is_known_to_all():
    def train(comm):
        model = Net()
        optimizer = ShardedOptimizer(model, MAKE["sgd"](model), comm, 150)
        return [optimizer.on_all_ranks(holds) for holds in (True, comm.rank != 1, False)]

    assert ran(on_ranks(SIZE, train, ThreadExchange)) == [[True, False, False]] * SIZE


def test_what_needs_whole_tensors_is_refused():
    parameters = [nn.Parameter(torch.zeros(2))]
    for kind in ELEMENTWISE:
        check_elementwise(kind(parameters))

    class Own(torch.optim.SGD):
        """Who knows what it does."""

    for optimizer in (Lamb(parameters), torch.optim.LBFGS(parameters), Own(parameters, lr=0.1)):
        with pytest.raises(Error, match="cannot cut the state of") as caught:
            check_elementwise(optimizer)
        assert "horovod" in caught.value.hint


@given(st.integers(0, 1000), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_parts(elements, ranks):
    ends = [part_of(elements, rank, ranks) for rank in range(ranks)]
    assert ends[0][0] == 0 and ends[-1][1] == elements
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))
    sizes = [stop - start for start, stop in ends]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
