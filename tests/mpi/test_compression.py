"""Compressed gradients in training: replicas alike, oracles, habits of loops, and resuming."""

import copy

import pytest
import torch
from torch import nn

from hpctrain.compression.states import gather_states, load_states
from hpctrain.config import HorovodConfig
from hpctrain.data.order import share
from hpctrain.errors import Error
from hpctrain.world.agreement import check_tensors
from hpctrain.world.broadcast import broadcast_tree

BATCH = 7  # of which ranks have unequal parts
LOSSY = ["int8", "topk:0.05", "powersgd:1"]
ALL = ["fp16", "bf16", *LOSSY]


class Model(nn.Module):
    """Parameters of every kind, each in a bucket of its own kind."""

    def __init__(self, seed=3):
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 3)
        self.rows = nn.Embedding(5, 6, sparse=True)
        self.turn = nn.Parameter(torch.randn(12, dtype=torch.complex64))
        self.wide = nn.Parameter(torch.randn(12, 12, dtype=torch.float64) / 4)
        self.short = nn.Parameter(torch.randn(12, 12).to(torch.bfloat16) / 4)
        self.unused = nn.Parameter(torch.ones(8, 8))
        self.frozen = nn.Parameter(torch.ones(8, 8), requires_grad=False)

    def forward(self, x):
        x = torch.tanh(self.up(x + self.rows(torch.arange(len(x)) % 5)))
        x = (x * self.turn).abs() @ self.wide.float()
        return self.down(torch.tanh(x) @ self.short.float())


def plain(seed=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 9), nn.Linear(9, 3)).double()


def wrapped(strategy, model, compression, momentum=0.9, clip_norm=None, **options):
    if compression.startswith("powersgd"):
        options.setdefault("compression_min_rate", 0.0)
    strategy.config = HorovodConfig(bucket_bytes=1000, compression=compression, **options)
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    return strategy.wrap(model, inner, clip_norm=clip_norm)


def train(world, model, optimizer, steps, passes=1, dtype=torch.float64):
    for step in steps:
        torch.manual_seed(1000 + step)
        x, y = torch.randn(BATCH, 6, dtype=dtype), torch.randn(BATCH, 3, dtype=dtype)
        start, stop = share(0, BATCH, world.rank, world.size)
        optimizer.zero_grad()
        parts = [share(start, stop, n, passes) for n in range(passes)]
        parts = [(a, b) for a, b in parts if b > a]
        for number, (a, b) in enumerate(parts, start=1):
            loss = nn.functional.mse_loss(model(x[a:b]), y[a:b]) * ((b - a) * world.size / BATCH)
            if number < len(parts):
                with optimizer.no_sync():
                    loss.backward()
            else:
                loss.backward()
        optimizer.step()
    return model


def check_alike(world, model):
    named = [(n, p.detach()) for n, p in model.named_parameters()]
    check_tensors(world.comm, named)
    assert all(p.isfinite().all() for _, p in named)


@pytest.mark.parametrize("compression", ALL)
def test_replicas_are_alike_whatever_the_parameters_are(strategy, world, compression):
    """Sparse, complex, of 16 and 64 bits, unused, frozen; with uneven parts and passes."""
    model, start = Model(), Model()
    optimizer = wrapped(strategy, model, compression)
    train(world, model, optimizer, range(20), passes=2, dtype=torch.float32)
    check_alike(world, model)
    for (name, now), before in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(now, before) == (name in ("unused", "frozen")), name
    assert optimizer.statistics().keys() == {"moved_bytes", "dense_bytes", "compression"}


@pytest.mark.parametrize(
    ("compression", "options"),
    [("topk:1", {}), ("powersgd:99", {}), ("powersgd:1", {"compression_warmup_steps": 9})],
)
def test_what_leaves_nothing_out_is_dense(strategy, world, compression, options):
    found = []
    for each, more in (("none", {}), (compression, options)):
        model = plain()
        optimizer = wrapped(strategy, model, each, clip_norm=0.3, **more)
        found.append(train(world, model, optimizer, range(8), passes=2))
    for ours, theirs in zip(*(m.parameters() for m in found), strict=True):
        if compression == "topk:1" and world.size == 2:
            assert torch.equal(ours, theirs)
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("compression", LOSSY)
def test_parameters_are_short_of_plain_sgd_by_what_is_left(strategy, world, compression):
    """x - lr e goes as SGD with the same gradients does."""
    model = plain()
    optimizer = wrapped(strategy, model, compression, momentum=0)
    start, total = copy.deepcopy(model), {}
    for step in range(6):
        before = plain()
        before.load_state_dict(model.state_dict())
        train(world, model, optimizer, [step])
        torch.manual_seed(1000 + step)
        x, y = (torch.randn(BATCH, n, dtype=torch.float64) for n in (6, 3))
        nn.functional.mse_loss(before(x), y).backward()
        for name, p in before.named_parameters():
            total[name] = total.get(name, 0) + p.grad
    residual = optimizer.compressor.state_dict()["kept"]["residual"]
    began = dict(start.named_parameters())
    for name, p in model.named_parameters():
        left = residual[name].clone()
        world.comm.all_reduce(left)
        expected = began[name] - 0.05 * (total[name] - left.view(p.shape) / world.size)
        assert (p - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("compression", LOSSY)
def test_a_step_that_is_given_up_takes_its_residual_back(strategy, world, compression):
    """A gradient that is no number on one rank is none on all, and is forgotten with the step."""
    model = plain()
    optimizer = wrapped(strategy, model, compression)
    train(world, model, optimizer, range(2))
    before = optimizer.compressor.state_dict()
    x = torch.ones(2, 6).double()
    for bad in (True, False):
        optimizer.zero_grad()
        loss = model(x).sum()
        (loss * float("nan") if bad and world.rank == world.size - 1 else loss).backward()
        finite = all(p.grad.isfinite().all() for p in model.parameters())
        assert finite != bad
        optimizer.zero_grad()
        after = optimizer.compressor.state_dict()
        for kind in ("residual",):
            for name, tensor in before["kept"][kind].items():
                assert torch.equal(tensor, after["kept"][kind][name])
        for name, tensor in before["shared"].items():
            assert torch.equal(tensor, after["shared"][name])
    train(world, model, optimizer, range(2, 4))
    check_alike(world, model)


@pytest.mark.parametrize(
    ("compression", "options"),
    [
        ("int8", {}),
        ("topk:0.05", {"compression_warmup_steps": 8}),
        ("topk:0.05", {"compression_momentum": 0.9}),
        ("powersgd:1", {"compression_warmup_steps": 2}),
    ],
)
def test_it_goes_on_bit_for_bit(strategy, world, compression, options):
    momentum = 0 if "compression_momentum" in options else 0.9
    whole = plain()
    optimizer = wrapped(strategy, whole, compression, momentum, **options)
    train(world, whole, optimizer, range(5))
    states = broadcast_tree(world.comm, gather_states(world.comm, optimizer.compressor))
    part, inner = copy.deepcopy(whole), copy.deepcopy(optimizer.inner.state_dict())
    train(world, whole, optimizer, range(5, 10))

    other = wrapped(strategy, part, compression, momentum, **options)
    other.load_state_dict(inner)
    load_states(world.comm, other.compressor, states)
    train(world, part, other, range(5, 10))
    for ours, theirs in zip(part.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_part_that_is_used_now_and_then(strategy, world):
    """What it has not sent waits until it is used again."""
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).double()
    optimizer = wrapped(strategy, model, "topk:0.1", momentum=0)
    for step in range(4):
        optimizer.zero_grad()
        torch.manual_seed(10 * step + world.rank)
        x = model[0](torch.randn(3, 4).double())
        before = optimizer.compressor.state_dict()["kept"]["residual"]
        (model[1](x) if step % 2 == 0 else x).square().sum().backward()
        optimizer.step()
        after = optimizer.compressor.state_dict()["kept"]["residual"]
        if step % 2:
            assert torch.equal(before["1.weight"], after["1.weight"])
            assert not torch.equal(before["0.weight"], after["0.weight"])
    check_alike(world, model)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_momentum_twice_is_refused(strategy, world, optimizer):
    model = plain()
    more = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    strategy.config = HorovodConfig(compression="topk:0.1", compression_momentum=0.9)
    with pytest.raises(Error, match=f"{optimizer.__name__} has momentum"):
        strategy.wrap(model, optimizer(model.parameters(), lr=0.1, **more))


def test_ranks_that_compress_otherwise_are_refused(strategy, world):
    strategy.config = HorovodConfig(compression=["fp16", "bf16"][world.rank % 2])
    model = plain()
    with pytest.raises(Error, match=r"ranks differ in horovod\.compression"):
        strategy.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1))
