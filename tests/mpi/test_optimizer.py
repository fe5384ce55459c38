"""The Horovod optimizer against one process that sees the whole batch."""

import copy

import pytest
import torch
from torch import nn

from hpctrain.config import HorovodConfig
from hpctrain.data.order import share
from hpctrain.errors import Error
from hpctrain.strategies.horovod import HorovodOptimizer


def model_of(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def wrap(strategy, model, optimizer, bucket_bytes=200, **more):
    strategy.config = HorovodConfig(bucket_bytes=bucket_bytes)
    return strategy.wrap(model, optimizer, **more)


def optimizer_of(kind, model):
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def assert_same(model, reference, tolerance=1e-12):
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 12])
@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_equals_one_process(strategy, world, kind, batch_size, passes, clip_norm):
    """Also where a rank has no samples at all (batch of 1), and where passes are uneven."""
    reference = model_of(3)
    reference_optimizer = optimizer_of(kind, reference)
    model = model_of(100 + world.rank)  # wrap() must bring rank 0's start to all
    if world.rank == 0:
        model.load_state_dict(reference.state_dict())
    optimizer = wrap(strategy, model, optimizer_of(kind, model), clip_norm=clip_norm)
    for step in range(5):
        torch.manual_seed(1000 + step)
        x, y = torch.randn(batch_size, 5).double(), torch.randn(batch_size, 3).double()
        reference_optimizer.zero_grad()
        nn.functional.mse_loss(reference(x), y).backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(reference.parameters(), clip_norm)
        reference_optimizer.step()

        start, stop = share(0, batch_size, world.rank, world.size)
        optimizer.zero_grad()
        parts = [share(start, stop, n, passes) for n in range(passes)]
        parts = [(a, b) for a, b in parts if b > a]
        for number, (a, b) in enumerate(parts, start=1):
            loss = nn.functional.mse_loss(model(x[a:b]), y[a:b])
            loss = loss * ((b - a) * world.size / batch_size)
            if number < len(parts):
                with optimizer.no_sync():
                    loss.backward()
            else:
                loss.backward()
        optimizer.step()
    assert_same(model, reference)


def test_bucket_sizes_change_nothing(strategy, world):
    results = []
    for bucket_bytes in (1, 100, 10**9):
        model = model_of(1)
        optimizer = wrap(strategy, model, optimizer_of("sgd", model), bucket_bytes)
        torch.manual_seed(world.rank)
        model(torch.randn(4, 5).double()).square().mean().backward()
        optimizer.step()
        results.append(model)
    assert_same(results[0], results[1], 0)
    assert_same(results[0], results[2], 0)


def test_unused_parameter_is_left_alone(strategy, world):
    """Neither weight decay nor momentum moves it, as where one process trains."""
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    inner = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1, momentum=0.9)
    optimizer = wrap(strategy, model, inner)
    before = copy.deepcopy(model["unused"].state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        model["used"](torch.ones(1, 2)).sum().backward()
        optimizer.step()
    for name, tensor in model["unused"].state_dict().items():
        assert torch.equal(tensor, before[name])
    assert model["unused"].weight.grad is None and len(inner.state) == 2


def test_parameter_used_on_one_rank_alone(strategy, world):
    model = nn.ModuleDict({"a": nn.Linear(2, 1, bias=False), "b": nn.Linear(2, 1, bias=False)})
    optimizer = wrap(strategy, model, torch.optim.SGD(model.parameters(), lr=1.0))
    start = model["b"].weight.detach().clone()
    optimizer.zero_grad()
    model["b" if world.rank == 0 else "a"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    expected = start - 1.0 / world.size
    assert torch.allclose(model["b"].weight, expected)


def test_gradients_set_to_none_by_the_model(strategy, world):
    """`model.zero_grad()` drops the views; stale numbers must not come back with them."""
    model = model_of(5)
    optimizer = wrap(strategy, model, torch.optim.SGD(model.parameters(), lr=0.0))
    for factor in (1.0, 2.0):
        model.zero_grad(set_to_none=True)
        (model(torch.ones(1, 5).double()).sum() * factor).backward()
        optimizer.step()
        bias = model[2].bias.grad
        assert torch.allclose(bias, torch.full_like(bias, factor))
    model.zero_grad(set_to_none=True)
    optimizer.step()  # no backward at all
    assert all(p.grad is None for p in model.parameters())


def test_bfloat16_parameters(strategy, world):
    model = nn.Linear(3, 1, bias=False).to(torch.bfloat16)
    optimizer = wrap(strategy, model, torch.optim.SGD(model.parameters(), lr=1.0))
    optimizer.zero_grad()
    model(torch.full((1, 3), float(world.rank + 1), dtype=torch.bfloat16)).sum().backward()
    optimizer.synchronize()
    mean = sum(range(1, world.size + 1)) / world.size
    assert torch.equal(model.weight.grad, torch.full((1, 3), mean, dtype=torch.bfloat16))


def test_gradient_scaler(strategy, world):
    """AMP, clipping and accumulation together, the ordinary PyTorch way."""
    model = model_of(2, torch.float32)
    optimizer = wrap(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1))
    reference = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = torch.full((2, 5), float(world.rank))
    optimizer.zero_grad()
    with optimizer.no_sync():
        scaler.scale(model(x[:1]).sum() / 2).backward()
    scaler.scale(model(x[1:]).sum() / 2).backward()
    optimizer.synchronize()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    everything = torch.arange(world.size).float()[:, None].expand(-1, 5)
    (reference(everything).sum() / world.size).backward()
    nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    torch.optim.SGD(reference.parameters(), lr=0.1).step()
    assert_same(model, reference, 1e-5)


def test_backward_twice_accumulates(strategy, world):
    """As in one process, and with DistributedDataParallel."""
    model = model_of(1)
    optimizer = wrap(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.zero_grad()
    for factor in (1.0, 2.0):
        (model(torch.ones(1, 5).double()).sum() * factor * (world.rank + 1)).backward()
    expected = 3.0 * sum(range(1, world.size + 1)) / world.size
    assert torch.allclose(model[2].bias.grad, torch.tensor(expected).double())
    optimizer.step()


def test_is_an_optimizer(strategy, world):
    model = model_of(1)
    inner = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = wrap(strategy, model, inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert isinstance(optimizer, HorovodOptimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    assert inner.param_groups[0]["lr"] == 0.25
    assert optimizer.state_dict() == inner.state_dict()
    with pytest.raises(Error, match="wrap"):
        optimizer.add_param_group({"params": []})
    with pytest.raises(Error, match="closure"):
        optimizer.step(lambda: 0.0)


def test_start_includes_optimizer_state(strategy, world):
    """A rank that joins with nothing gets rank 0's momenta too."""
    model = model_of(world.rank)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    if world.rank == 0:
        model(torch.ones(1, 5).double()).sum().backward()
        inner.step()
    wrap(strategy, model, inner)
    state = inner.state_dict()["state"]
    assert len(state) == 4
    total = torch.stack([entry["exp_avg"].sum() for entry in state.values()])
    mine = total.clone()
    world.comm.all_reduce(total)
    assert torch.allclose(total, mine * world.size)


def test_channels_last_weights(strategy, world):
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = wrap(strategy, model, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.zero_grad()
    model(torch.ones(1, 3, 5, 5) * (world.rank + 1)).sum().backward()
    optimizer.synchronize()
    assert model.weight.grad.stride() == model.weight.stride()
    mean = sum(range(1, world.size + 1)) / world.size
    assert torch.allclose(model.weight.grad, torch.full((4, 3, 3, 3), 9 * mean))
