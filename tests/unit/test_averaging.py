"""Periodic averaging against its equations written out, with threads as ranks, in float64."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hpctrain.errors import Error
from hpctrain.strategies import gradient_averaging
from hpctrain.strategies.averaging import Averaging
from hpctrain.strategies.averaging_fragments import divided
from hpctrain.strategies.averaging_knobs import AveragingConfig, check_knobs
from hpctrain.strategies.averaging_optimizer import AveragingOptimizer
from hpctrain.strategies.base import having
from hpctrain.strategies.flats import Flats
from hpctrain.strategies.state_averaging import mean_states
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World
from tests.unit.threads import ThreadExchange, on_ranks

SIZE = 3
SAMPLES = [5, 2, 1]  # of each rank in each step


@pytest.fixture(autouse=True)
def numbers(monkeypatch):
    """Threads wrap side by side, processes each for itself."""
    monkeypatch.setattr(gradient_averaging, "_numbers", itertools.repeat(0))


def model_of(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def batch(step, rank, samples=None):
    """A rank's inputs and targets; a row of the world's batch belongs to one rank."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    rows = SAMPLES[rank] if samples is None else samples
    return (
        torch.randn(rows, 4, generator=generator, dtype=torch.float64),
        torch.randn(rows, 2, generator=generator, dtype=torch.float64),
    )


def loss_of(model, step, rank):
    inputs, targets = batch(step, rank)
    return (model(inputs) - targets).square().mean()


def sgd(model, momentum=0.9):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=0.01)


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def advance(model, optimizer, steps, rank, size=SIZE):
    """Take these steps as the trainer does."""
    for step in steps:
        weight = SAMPLES[rank] * size / sum(SAMPLES[:size])
        optimizer.zero_grad()
        optimizer.weight, optimizer.samples = weight, SAMPLES[rank]
        (loss_of(model, step, rank) * weight).backward()
        optimizer.step()


def values(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def put(model, flat):
    nn.utils.vector_to_parameters(flat.clone(), model.parameters())  # which makes views of it


def ran(results):
    """What ranks returned; the first error, if there is one."""
    for each in results:
        if isinstance(each, BaseException):
            raise each
    return results


def trained(steps, make=sgd, size=SIZE, clip_norm=None, finish=True, **knobs):
    """Every rank's parameters after so many steps, and its optimizer."""

    def train(comm):
        model = model_of()
        optimizer = AveragingOptimizer(
            model, make(model), comm, AveragingConfig(**knobs), clip_norm
        )
        advance(model, optimizer, range(steps), comm.rank, size)
        if finish:
            optimizer.finish()
        return values(model), optimizer

    results = ran(on_ranks(size, train, ThreadExchange))
    if finish:
        assert all(torch.equal(each[0], results[0][0]) for each in results)  # the same bits
    return results


def close(ours, theirs, tolerance=1e-12):
    assert (ours - theirs).norm() <= tolerance * theirs.norm(), (ours - theirs).norm()


def rounds(steps, every, outer, make=sgd, clip_norm=None, size=SIZE):
    """The same written out: copies of one model, and what becomes of their weighted mean.

    Args:
        outer: Given the anchor and the mean, returns the next anchor.
    """
    models = [model_of() for _ in range(size)]
    optimizers = [make(model) for model in models]
    share = torch.tensor(SAMPLES[:size], dtype=torch.float64) / sum(SAMPLES[:size])
    anchor = values(models[0])
    for step in range(steps):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss_of(model, step, rank).backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            mean = (share[:, None] * torch.stack([values(m) for m in models])).sum(0)
            anchor = outer(anchor, mean)
            for model in models:
                put(model, anchor)
    return anchor


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rounds_of_one_step_are_synchronous_training(momentum):
    """One process that has every rank's samples in a batch; momentum too, where it is averaged."""
    model = model_of()
    optimizer = sgd(model, momentum)
    for step in range(12):
        optimizer.zero_grad()
        parts = [batch(step, rank) for rank in range(SIZE)]
        inputs, targets = (torch.cat(each) for each in zip(*parts, strict=True))
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()
    close(trained(12, lambda m: sgd(m, momentum), every=1)[0][0], values(model))


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("knobs", [{"outer": "mean"}, {"outer": "nesterov", "outer_lr": 1.0,
    "outer_momentum": 0.0}, {"outer": "slowmo", "outer_momentum": 0.0}])  # fmt: skip
def test_without_momentum_it_is_local_sgd(make, knobs):
    """Also where the last round is shorter, and where each rank's own gradient is clipped."""
    ours = trained(11, make, every=4, clip_norm=0.5, state="local", **knobs)[0][0]
    close(ours, rounds(11, 4, lambda anchor, mean: mean, make, clip_norm=0.5))


def momentum_of(kind, lr, mu):
    """An outer optimizer as its paper has it."""
    velocity = 0.0

    def outer(anchor, mean):
        nonlocal velocity
        gradient = anchor - mean
        if kind == "nesterov":
            velocity = mu * velocity + gradient
            return anchor - lr * (gradient + mu * velocity)
        if kind == "slowmo":
            velocity = mu * velocity + gradient / 0.1
            return anchor - lr * 0.1 * velocity
        velocity = mu * velocity + lr * (mean - anchor)
        return anchor + velocity

    return outer


@pytest.mark.parametrize("kind", ["nesterov", "slowmo", "bmuf"])
def test_outer_momentum(kind):
    knobs = {"outer": kind, "outer_lr": 0.6, "outer_momentum": 0.8, "state": "local"}
    expected = rounds(20, 4, momentum_of(kind, 0.6, 0.8))
    close(trained(20, every=4, **knobs)[0][0], expected)
    assert (expected - rounds(20, 4, lambda anchor, mean: mean)).norm() > 1e-3  # it matters


def test_diloco_on_a_quadratic():
    """50 rounds of one rank: m = (1 - g a)^H x, so that x and v follow a recurrence."""
    curvature, rate, every, lr, mu = 3.0, 0.02, 5, 0.7, 0.9
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    model = nn.Module()
    model.weight = weight
    config = AveragingConfig(every=every, outer="nesterov", outer_lr=lr, outer_momentum=mu)
    inner = torch.optim.SGD([weight], lr=rate)
    x, velocity = torch.tensor(2.0, dtype=torch.float64), 0.0
    moved = 1 - (1 - rate * curvature) ** every

    def train(comm):
        nonlocal x, velocity
        optimizer = AveragingOptimizer(model, inner, comm, config)
        for _ in range(50):
            for _ in range(every):
                optimizer.zero_grad()
                (curvature * weight.square() / 2).sum().backward()
                optimizer.step()
            x, velocity = (
                (1 - lr * moved * (1 + mu)) * x - lr * mu**2 * velocity,
                moved * x + mu * velocity,
            )
            assert abs(weight.item() - x) <= 1e-12

    ran(on_ranks(1, train, ThreadExchange))


def test_easgd():
    """Ranks and centre draw each other, by sums over ranks; the model is the centre."""
    pull, every = 0.2, 3
    models = [model_of() for _ in range(2)]
    optimizers = [sgd(model) for model in models]
    centre = values(models[0])
    for step in range(9):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            inputs, targets = batch(step, rank, samples=4)
            (model(inputs) - targets).square().mean().backward()
            optimizer.step()
        if (step + 1) % every == 0:
            drawn = [pull * (values(model) - centre) for model in models]
            for model, each in zip(models, drawn, strict=True):
                put(model, values(model) - each)
            centre = centre + sum(drawn)

    def train(comm):
        model = model_of()
        config = AveragingConfig(every=every, outer="easgd", alpha=pull, state="local")
        optimizer = AveragingOptimizer(model, sgd(model), comm, config)
        for step in range(9):
            optimizer.zero_grad()
            inputs, targets = batch(step, comm.rank, samples=4)
            (model(inputs) - targets).square().mean().backward()
            optimizer.step()
        own = values(model)
        with torch.no_grad(), having(optimizer.world_parameters()):
            meant = values(model)
        optimizer.finish()
        return own, meant, values(model)

    for rank, (own, meant, last) in enumerate(ran(on_ranks(2, train, ThreadExchange))):
        close(own, values(models[rank]))
        close(meant, centre)
        assert torch.equal(meant, last)


@pytest.mark.parametrize("knobs", [{"delay": 0, "mixing": 0.0}, {"delay": 2, "mixing": 0.0},
    {"delay": 2, "mixing": 0.5}, {"delay": 0, "mixing": 0.3}])  # fmt: skip
def test_streaming(knobs):
    """Fragments sent one after the other, applied late, and mixed with what a rank has by then."""
    every, count, lr, mu, steps = 6, 3, 0.7, 0.6, 20
    models = [model_of() for _ in range(SIZE)]
    optimizers = [sgd(model) for model in models]
    order = {id(p): n for n, p in enumerate(models[0].parameters())}
    parts = divided(list(models[0].parameters()), count)
    groups = [[order[id(p)] for p in part] for part in parts]
    anchor = [p.detach().clone() for p in models[0].parameters()]
    velocity = [torch.zeros_like(p) for p in anchor]
    share = [samples / sum(SAMPLES) for samples in SAMPLES]
    flying = {}

    def of(rank, n):
        return list(models[rank].parameters())[n].data

    for now in range(1, steps + 1):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss_of(model, now - 1, rank).backward()
            optimizer.step()
        for f, members in enumerate(groups):
            if (now - every * (f + 1) // count) % every == 0:
                flying[f] = (
                    now + knobs["delay"],
                    {
                        n: anchor[n] - sum(w * of(r, n) for r, w in enumerate(share))
                        for n in members
                    },
                )
            if f in flying and flying[f][0] == now:
                for n, gradient in flying.pop(f)[1].items():
                    velocity[n] = mu * velocity[n] + gradient
                    anchor[n] = anchor[n] - lr * (gradient + mu * velocity[n])
                    for rank in range(SIZE):
                        mixed = knobs["mixing"] * of(rank, n) + (1 - knobs["mixing"]) * anchor[n]
                        of(rank, n).copy_(mixed)
    ours = trained(
        steps, every=every, fragments=count, outer="nesterov", outer_lr=lr, outer_momentum=mu,
        state="local", finish=False, **knobs,
    )  # fmt: skip
    for rank, (found, _) in enumerate(ours):
        close(found, values(models[rank]))


def test_streaming_of_one_fragment_is_diloco():
    plain = trained(12, every=4, outer="nesterov")[0][0]
    streamed = trained(12, every=4, outer="nesterov", fragments=1, delay=0, mixing=0.0)[0][0]
    assert torch.equal(plain, streamed)


def test_finish_after_fragments_in_flight():
    """All ranks come to the same bits, whatever was under way; a second time changes nothing."""
    results = trained(
        9, every=4, fragments=2, delay=3, mixing=0.5, outer="nesterov", state="local", finish=False
    )

    def end(comm):
        optimizer = results[comm.rank][1]
        optimizer._comm = comm
        optimizer.finish()
        once = values(optimizer._model)
        optimizer.finish()
        assert torch.equal(once, values(optimizer._model))
        assert optimizer.world_parameters() is None
        return once

    first, *others = ran(on_ranks(SIZE, end, ThreadExchange))
    assert all(torch.equal(first, each) for each in others)


def test_the_mean_is_by_samples_of_the_round():
    """Ranks whose parts change from step to step; one has none in a round."""
    parts = [[4, 0], [1, 0], [2, 3], [0, 6]]  # of two ranks, step by step; rounds of two steps

    def train(comm):
        model = model_of()
        optimizer = AveragingOptimizer(
            model, sgd(model, 0.0), comm, AveragingConfig(every=2, state="local")
        )
        for step, samples in enumerate(parts):
            optimizer.zero_grad()
            mine = samples[comm.rank]
            optimizer.samples, optimizer.weight = mine, mine * 2 / sum(samples)
            if mine:
                inputs, targets = batch(step, comm.rank, mine)
                ((model(inputs) - targets).square().mean() * optimizer.weight).backward()
            optimizer.step()
        return values(model)

    models = [model_of(), model_of()]
    for step, samples in enumerate(parts):
        for rank, model in enumerate(models):
            optimizer = sgd(model, 0.0)
            optimizer.zero_grad()
            if samples[rank]:
                inputs, targets = batch(step, rank, samples[rank])
                (model(inputs) - targets).square().mean().backward()
                optimizer.step()
        if step % 2:
            weights = [sum(each[rank] for each in parts[step - 1 : step + 1]) for rank in (0, 1)]
            mean = sum(w * values(m) for w, m in zip(weights, models, strict=True)) / sum(weights)
            for model in models:
                put(model, mean)
    for found in ran(on_ranks(2, train, ThreadExchange)):
        close(found, values(models[0]))


def test_steps_before_the_first_round_are_synchronous():
    model = model_of()
    optimizer = adam(model)
    for step in range(5):
        optimizer.zero_grad()
        parts = [batch(step, rank) for rank in range(SIZE)]
        inputs, targets = (torch.cat(each) for each in zip(*parts, strict=True))
        (model(inputs) - targets).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
    for found, _ in trained(5, adam, every=2, start=5, clip_norm=0.3, finish=False):
        close(found, values(model))
    late = trained(9, adam, every=4, start=5, clip_norm=0.3, finish=False)
    assert all(torch.equal(late[0][0], each[0]) for each in late)  # a round has ended
    assert (late[0][0] - values(model)).norm() > 1e-3


class Buffers(nn.Module):
    """Statistics of what was seen, and a count."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 1).double()
        self.register_buffer("seen", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.seen, self.passes = x.detach().mean(0), self.passes + 1
        return self.line(x)


def test_buffers_come_with_the_parameters():
    def train(comm):
        torch.manual_seed(0)
        model = Buffers()
        nn.init.constant_(model.line.weight, 0.5)
        optimizer = AveragingOptimizer(model, sgd(model), comm, AveragingConfig(every=2))
        for step in range(2):
            optimizer.zero_grad()
            optimizer.samples = SAMPLES[comm.rank]
            model(batch(step, comm.rank)[0]).mean().backward()
            optimizer.step()
        return model

    expected = sum(n * batch(1, r)[0].mean(0) for r, n in enumerate(SAMPLES)) / sum(SAMPLES)
    for model in ran(on_ranks(SIZE, train, ThreadExchange)):
        assert torch.allclose(model.seen, expected, rtol=1e-12) and model.passes == 2


# Kept: what a checkpoint holds, taken up on as many ranks or others.


def through_a_checkpoint(stop, more, after=SIZE, make=adam, **knobs):
    """Parameters after stop + more steps, without and with a checkpoint at stop, by rank."""
    whole = [each[0] for each in trained(stop + more, make, finish=False, **knobs)]

    def save(comm):
        model = model_of()
        optimizer = AveragingOptimizer(model, make(model), comm, AveragingConfig(**knobs))
        advance(model, optimizer, range(stop), comm.rank)
        meant, state, own = optimizer.snapshot()
        with torch.no_grad(), having(meant):
            parameters = copy.deepcopy(model.state_dict())
        return parameters, state, own, values(model)

    saved = ran(on_ranks(SIZE, save, ThreadExchange))
    assert all(torch.equal(values_of(each[0]), values_of(saved[0][0])) for each in saved)
    parameters, state, own, _ = copy.deepcopy(saved[0])

    def go_on(comm):
        model = model_of(seed=9)
        model.load_state_dict(parameters)
        inner = make(model)
        inner.load_state_dict(copy.deepcopy(state))
        optimizer = AveragingOptimizer(model, inner, comm, AveragingConfig(**knobs))
        optimizer.load_strategy_state(copy.deepcopy(own))
        advance(model, optimizer, range(stop, stop + more), comm.rank, after)
        return values(model), optimizer

    return whole, ran(on_ranks(after, go_on, ThreadExchange))


def values_of(state):
    return torch.cat([each.reshape(-1) for each in state.values()])


EVERYWHERE = [
    {"every": 4, "outer": "nesterov"},
    {"every": 4, "outer": "slowmo"},
    {"every": 4, "outer": "easgd"},
    {"every": 4, "fragments": 2, "delay": 2, "mixing": 0.5, "outer": "nesterov"},
    {"every": 4, "start": 3},
]


@pytest.mark.parametrize("knobs", EVERYWHERE)
@pytest.mark.parametrize("stop", [4, 7])
def test_resume_with_every_ranks_state(knobs, stop):
    """The same bits on every rank, wherever in a round the checkpoint falls."""
    whole, resumed = through_a_checkpoint(stop, 6, state="local", **knobs)
    for expected, (found, _) in zip(whole, resumed, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("outer", ["mean", "nesterov", "slowmo", "bmuf"])
def test_resume_from_the_mean(outer):
    """The same bits where it falls on a round's end: one rank's state serves all."""
    whole, resumed = through_a_checkpoint(8, 7, every=4, outer=outer)
    for expected, (found, _) in zip(whole, resumed, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("state", ["mean", "local"])
@pytest.mark.parametrize("stop", [6, 8])
def test_another_number_of_ranks(state, stop):
    """Two go on from three's: from their mean, with the anchor and the place in the round."""
    _, resumed = through_a_checkpoint(
        stop, 10 - stop, after=2, every=4, outer="nesterov", state=state
    )
    (first, optimizer), (second, _) = resumed
    assert first.isfinite().all() and not torch.equal(first, second)  # in the midst of a round
    assert optimizer._fragments[0].steps == 2 and optimizer._steps == 10


def test_others_fragments_after_a_resume():
    """Rounds begin anew where they are divided otherwise; the velocity is kept."""
    _, resumed = through_a_checkpoint(6, 0, every=4, outer="nesterov", state="local")
    saved = [optimizer for _, optimizer in resumed]

    def save(comm):
        saved[comm.rank]._comm = comm
        return saved[comm.rank].strategy_state()

    kept = ran(on_ranks(SIZE, save, ThreadExchange))[0]

    def go_on(comm):
        model = saved[comm.rank]._model
        config = AveragingConfig(every=4, fragments=2, outer="nesterov", state="local")
        optimizer = AveragingOptimizer(model, adam(model), comm, config)
        optimizer.load_strategy_state(kept)
        return values(model), [v.clone() for f in optimizer._fragments for v in f.velocity]

    found = ran(on_ranks(SIZE, go_on, ThreadExchange))
    assert all(torch.equal(found[0][0], each[0]) for each in found)
    assert torch.cat(found[0][1]).abs().sum() > 0


# What goes wrong.


@pytest.mark.parametrize("delay", [0, 1])
def test_what_is_no_number_does_not_spread(delay):
    def train(comm):
        model = model_of()
        config = AveragingConfig(every=2, delay=delay, state="local")
        optimizer = AveragingOptimizer(model, sgd(model), comm, config)
        advance(model, optimizer, [0], comm.rank)
        if comm.rank == 1:
            model[0].bias.data[1] = float("nan")
        with pytest.raises(Error) as caught:
            advance(model, optimizer, [1, 2], comm.rank)
        return str(caught.value), values(model)

    told = ran(on_ranks(SIZE, train, ThreadExchange))
    assert len({message for message, _ in told}) == 1
    assert "parameters of rank 1 are not finite" in told[0][0]
    assert told[0][1].isfinite().all() and told[2][1].isfinite().all()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"outer_lr": 1.0}, "averaging.outer_lr is set, and averaging.outer=mean has none"),
        ({"alpha": 0.1, "outer": "bmuf"}, "averaging.alpha is set"),
        ({"fragments": 2, "outer": "slowmo"}, "do not go with averaging.outer=slowmo"),
        ({"every": 4, "fragments": 5}, "averaging.fragments=5 is too many for rounds of 4"),
        ({"every": 4, "delay": 4, "state": "local"}, "averaging.delay=4 is too many"),
        ({"delay": 2}, "averaging.delay does not go with averaging.state=mean"),
    ],
)
def test_knobs_that_do_not_go_together(knobs, message):
    with pytest.raises(Error, match=message) as caught:
        check_knobs(AveragingConfig(**knobs))
    assert caught.value.hint


def test_few_rounds_with_momentum_are_warned_of():
    strategy = Averaging.__new__(Averaging)
    strategy.world = World(ALONE)
    for knobs, steps, count in [
        ({"outer": "nesterov", "every": 10}, 499, 1),
        ({"outer": "nesterov", "every": 10}, 500, 0),
        ({"outer": "nesterov", "every": 10, "start": 1}, 500, 1),
        ({"outer": "mean", "every": 10}, 20, 0),
        ({"outer": "slowmo", "every": 10, "outer_momentum": 0.0}, 20, 0),
    ]:
        strategy.config = AveragingConfig(**knobs)
        assert len(strategy.warnings(steps)) == count


# The parts.


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_divided(sizes, count):
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    parts = divided(parameters, count)
    assert len(parts) == min(count, len(sizes)) and all(parts)
    assert [id(p) for part in parts for p in part] == [id(p) for p in parameters]
    assert all(
        sum(p.numel() for p in part) <= sum(sizes) / count + 2 * max(sizes) for part in parts
    )


def test_flats_hold_every_type_and_stride():
    tensors = [
        torch.randn(3, dtype=torch.float64),
        torch.randn(5).to(torch.bfloat16),
        torch.randn(3, dtype=torch.complex64),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 3).t().half(),
        torch.randn(2, 2, dtype=torch.complex128).conj(),
        torch.randn(()),
    ]
    before = [tensor.clone() for tensor in tensors]
    flats = Flats(tensors)
    assert {flat.dtype for flat in flats.read()} == {torch.float32, torch.float64}
    assert all(
        torch.equal(a.to(b.dtype), b)
        for a, b in zip(flats.split(flats.read()), tensors, strict=True)
    )
    flats.write([flat * 2 for flat in flats.read()])
    assert all(torch.equal(a, b * 2) for a, b in zip(tensors, before, strict=True))
    assert sum(flat.numel() for flat in flats.read()) == sum(
        t.numel() * (2 if t.is_complex() else 1) for t in tensors
    )
    rates = flats.each([1.0] * 6 + [2.0])
    assert any(isinstance(rate, torch.Tensor) for rate in rates) and 1.0 in rates


def test_bytes_and_rounds_are_told():
    def train(comm):
        model = model_of()
        config = AveragingConfig(every=2, state="local")
        optimizer = AveragingOptimizer(model, sgd(model), comm, config)
        advance(model, optimizer, range(5), comm.rank)
        return optimizer.statistics(), optimizer.statistics()

    size = sum(p.numel() for p in model_of().parameters()) + 1
    for first, second in ran(on_ranks(SIZE, train, ThreadExchange)):
        assert first == {"rounds": 2, "moved_bytes": 2 * 2 * (SIZE - 1) * 8 * size}
        assert second == {"rounds": 0, "moved_bytes": 0}


def test_a_rank_without_some_state_counts_as_zeros():
    """A rank whose optimizer has begun nothing yet, and counts of those that had most samples."""
    parameter = nn.Parameter(torch.zeros(2))

    def average(comm):
        state = {parameter: {"m": torch.tensor([4.0, 8.0]), "step": torch.tensor(7.0), "k": 3}}
        return mean_states(comm, [parameter], state if comm.rank else {}, [3.0, 1.0][comm.rank])

    for (found,) in ran(on_ranks(2, average, ThreadExchange)):
        assert found["m"].tolist() == [1.0, 2.0]
        assert found["step"] == 7.0 and found["k"] == 3
