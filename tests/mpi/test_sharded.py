"""Sharded optimizer state over Horovod's reduce-scatter and all-gather, beside its all-reduce."""

import copy

import pytest
import torch
from torch import nn

from hpctrain.compression.dense import Dense
from hpctrain.strategies.horovod import HorovodOptimizer
from hpctrain.strategies.sharded import ShardedOptimizer
from hpctrain.strategies.start import share


def model_of(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)


def train(model, optimizer, rank, dtype):
    for step in range(8):
        torch.manual_seed(100 * step + rank)
        inputs = torch.randn(3, 5).to(dtype)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("bucket_bytes", [1, 250, 2**20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_horovod(strategy, world, bucket_bytes, dtype):
    """Parts that are uneven, or, of a bias of one element, nothing; bytes for what has no sums."""
    model = model_of(dtype)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    other = copy.deepcopy(model)
    comm = world.comm
    sharded = ShardedOptimizer(model, inner, comm, bucket_bytes, 0.05)
    ours = train(model, sharded, world.rank, dtype)
    share(comm, other, ring_inner := torch.optim.AdamW(other.parameters(), lr=0.01))
    ring = HorovodOptimizer(other, ring_inner, comm, Dense(), bucket_bytes, 0.05)
    theirs = train(other, ring, world.rank, dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    for mine, expected in zip(ours, theirs, strict=True):
        assert (mine - expected).norm() <= tolerance * expected.norm()
    held = sum(s["exp_avg"].numel() for s in inner.state.values())
    whole = sum(p.numel() for p in model.parameters())
    assert held <= -(-whole // world.size) + len(sharded._buckets)
    state = sharded.world_state()
    if world.rank == 0:
        expected = ring_inner.state_dict()
        assert state["param_groups"] == expected["param_groups"]
        for number, values in expected["state"].items():
            for name, value in values.items():
                mine = state["state"][number][name]
                assert mine.dtype == value.dtype and mine.shape == value.shape
                # Moments near zero are noise where numbers have 8 bits.
                least = 1e-3 if dtype == torch.bfloat16 else 1e-30
                assert (mine - value).norm() <= tolerance * value.norm() + least
    # Gradients travel in 32 bits at least, parameters as they are.
    bytes_each = max(dtype.itemsize, 4) + dtype.itemsize
    assert sharded.statistics()["moved_bytes"] == 8 * (world.size - 1) * whole * bytes_each
