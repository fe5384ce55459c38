"""The parameter server against sequential oracles, in one thread, with every interleaving."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.unit.ps_simulation import SIZES, Simulation

# A failing example is whole runs long: not worth making smaller.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True,
                                          weight_decay=0.01),
    "plain": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.05),
}  # fmt: skip


def single(simulation, steps, clip_norm=None):
    """Big-batch training with torch's own optimizer."""
    parameters = [torch.nn.Parameter(t.clone()) for t in simulation.start.split(SIZES)]
    groups = len(simulation.optimizer.param_groups)
    optimizer = type(simulation.optimizer)(
        [{**group, "params": parameters[g::groups]}
         for g, group in enumerate(simulation.optimizer.param_groups)]
    )  # fmt: skip
    rates = [group["lr"] for group in optimizer.param_groups]
    for clock in range(steps):
        weights = torch.cat([p.detach() for p in parameters])
        workers = range(len(simulation.clients))
        total = sum(simulation.gradient(w, weights) for w in workers) / len(workers)
        for parameter, gradient in zip(parameters, total.split(SIZES), strict=True):
            parameter.grad = gradient.clone()
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate / (1 + 0.1 * clock)
        optimizer.step()
    return torch.cat([p.detach() for p in parameters])


def difference(one, two):
    return float((one - two).norm() / two.norm())


@settings(max_examples=examples(40), phases=PHASES)
@given(
    workers=st.integers(1, 4), servers=st.integers(1, 3), near=st.booleans(),
    slice_bytes=st.sampled_from([64, 200, 4096]), name=st.sampled_from(sorted(OPTIMIZERS)),
    clip=st.sampled_from([None, 0.5]), replicas=st.integers(0, 1), groups=st.integers(1, 2),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_sync_is_single_with_the_whole_batch(
    workers, servers, slice_bytes, name, near, clip, replicas, groups, seed
):
    simulation = Simulation(
        {"slice_bytes": slice_bytes, "replicas": min(replicas, servers - 1)}, workers, servers,
        OPTIMIZERS[name], near=near, clip_norm=clip, groups=groups, seed=seed,
    )  # fmt: skip
    simulation.run(5)
    assert difference(simulation.final(), single(simulation, 5, clip)) < 1e-12


def replay(simulation, logs, by_delay=None):
    """The recorded order, done again one by one: an oracle that knows nothing of servers."""
    layout, rule = simulation.layout, simulation.rule
    config = simulation.config
    start = [torch.zeros(f.elements, dtype=f.torch_dtype) for f in layout.flats]
    simulation._scatter(start, simulation.start)
    versions = {p.number: [start[p.flat][p.start : p.stop].clone()] for p in layout.slices}
    states = {p.number: rule.new_state(versions[p.number][0]) for p in layout.slices}
    waiting = {index: list(log) for index, log in logs.items()}
    steps = Counter()
    reads = {}  # what a worker had read when it computed
    for index, log in logs.items():
        for _, worker, clock, read in log:
            reads.setdefault((worker, clock), {})[index] = read
    if by_delay is None:
        by_delay = config.consistency.startswith(("async", "ssp"))

    def gradient(worker, clock, piece):
        read = reads[worker, clock]
        if len(read) < len(layout.slices):  # part of it was dropped: what was pushed is what counts
            full = simulation.gradients[worker, clock]
        else:
            for index, version in read.items():
                if version >= len(versions[index]):
                    return None
            flats = [torch.zeros_like(f) for f in start]
            for p in layout.slices:
                flats[p.flat][p.start : p.stop] = versions[p.number][read[p.number]]
            full = simulation.gradient(worker, simulation.gather(flats))
        flats = [torch.zeros_like(f) for f in start]
        simulation._scatter(flats, full)
        return flats[piece.flat][piece.start : piece.stop].clone()

    moved = True
    while moved:
        moved = False
        for piece in layout.slices:
            log, history = waiting[piece.number], versions[piece.number]
            if log and log[0][0] > len(history) - 1:  # a round without a push
                history.append(history[-1])
                moved = True
            update = [entry for entry in log if entry[0] == len(history) - 1]
            parts = [gradient(worker, clock, piece) for _, worker, clock, _ in update]
            if not update or any(part is None for part in parts):
                continue
            _, worker, clock, read = update[0]
            delay = len(history) - 1 - read
            total = sum(parts) / len(parts)
            factor = 1.0 / max(1, delay) if by_delay else 1.0
            weights = history[-1].clone()
            steps[piece.number] += 1
            drift = weights - history[read]
            total = total + config.delay_compensation * total**2 * drift
            group = layout.flats[piece.flat].group
            rule.apply(weights, total, states[piece.number], simulation.hyper(clock)[group],
                       steps[piece.number], lr_factor=factor, bounds=piece.bounds)  # fmt: skip
            history.append(weights)
            del log[: len(update)]
            moved = True
    assert not any(waiting.values()), "the order cannot be replayed"
    flats = [torch.zeros_like(f) for f in start]
    for piece in layout.slices:
        flats[piece.flat][piece.start : piece.stop] = versions[piece.number][-1]
    return simulation.gather(flats)


topologies = {
    "workers": st.integers(1, 4), "servers": st.integers(1, 3),
    "slice_bytes": st.sampled_from([64, 200, 4096]), "near": st.booleans(),
    "seed": st.integers(0, 10**6),
}  # fmt: skip


@pytest.mark.slow
@settings(max_examples=examples(100), phases=PHASES)
@given(
    **topologies,
    consistency=st.sampled_from(["async", "ssp:0", "ssp:1", "ssp:3", "backup:1", "backup:2"]),
    name=st.sampled_from(sorted(OPTIMIZERS)), compensation=st.sampled_from([0.0, 0.1]),
    pull_every=st.sampled_from([1, 2, [1, 3]]),
)  # fmt: skip
def test_any_consistency_is_its_recorded_order_replayed(
    workers, servers, slice_bytes, near, seed, consistency, name, compensation, pull_every
):
    config = {"consistency": consistency, "slice_bytes": slice_bytes, "pull_every": pull_every}
    if not consistency.startswith("backup"):
        config["delay_compensation"] = compensation
    simulation = Simulation(config, workers, servers, OPTIMIZERS[name], near=near, seed=seed)
    simulation.run(6, slow_choice(seed, workers))
    assert difference(simulation.final(), replay(simulation, simulation.logs())) < 1e-12


def slow_choice(seed, workers):
    """Some actors move on ten times less often than others, and that changes."""
    generator = random.Random(seed)
    speeds = {}

    def choose(actors):
        if generator.random() < 0.01:
            speeds.clear()
        weights = [speeds.setdefault(a, generator.choice([1, 1, 0.1])) for a in actors]
        return generator.choices(actors, weights)[0]

    return choose


@pytest.mark.slow
@settings(max_examples=examples(1000), phases=PHASES)
@given(
    workers=st.integers(2, 4), servers=st.integers(1, 2), bound=st.integers(0, 4),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_no_worker_is_more_than_the_bound_ahead(workers, servers, bound, seed):
    simulation = Simulation(
        {"consistency": f"ssp:{bound}", "slice_bytes": 4096}, workers, servers,
        OPTIMIZERS["plain"], seed=seed,
    )  # fmt: skip
    simulation.run(5, slow_choice(seed, workers))
    assert max(clock - slowest for _, clock, slowest in simulation.history) <= bound


@pytest.mark.slow
def test_without_a_bound_they_do_run_ahead():
    ahead = 0
    for seed in range(20):
        simulation = Simulation({"consistency": "async"}, 4, 1, OPTIMIZERS["plain"], seed=seed)
        simulation.run(5, slow_choice(seed, 4))
        ahead = max(ahead, *(clock - slowest for _, clock, slowest in simulation.history))
    assert ahead >= 3


@settings(max_examples=examples(60), phases=PHASES)
@given(
    workers=st.integers(2, 4), servers=st.integers(1, 3), seed=st.integers(0, 10**6),
    consistency=st.sampled_from(["sync", "async", "ssp:2", "backup:1"]), tick=st.integers(1, 800),
    slice_bytes=st.sampled_from([64, 4096]),
)  # fmt: skip
def test_a_lost_worker_is_forgotten(workers, servers, seed, consistency, tick, slice_bytes):
    simulation = Simulation(
        {"consistency": consistency, "slice_bytes": slice_bytes}, workers, servers,
        OPTIMIZERS["sgd"], seed=seed,
    )  # fmt: skip
    simulation.run(6, faults=[(tick, lambda: simulation.kill(workers - 1))])
    for worker in range(workers - 1):
        assert simulation.clients[worker].clock >= 6


@pytest.mark.slow
@settings(max_examples=examples(100), phases=PHASES)
@given(
    workers=st.integers(1, 3), servers=st.integers(2, 4), seed=st.integers(0, 10**6),
    consistency=st.sampled_from(["sync", "async", "ssp:2", "backup:1"]), tick=st.integers(1, 800),
    lost=st.integers(0, 3), name=st.sampled_from(sorted(OPTIMIZERS)), near=st.booleans(),
)  # fmt: skip
def test_a_lost_servers_slices_come_back_from_their_replicas(
    workers, servers, seed, consistency, tick, lost, name, near
):
    simulation = Simulation(
        {"consistency": consistency, "slice_bytes": 64, "replicas": 1}, workers, servers,
        OPTIMIZERS[name], seed=seed, near=near,
    )  # fmt: skip
    number = simulation.server_numbers[lost % servers]
    simulation.run(6, faults=[(60 + tick, lambda: simulation.kill(number))])
    logs = simulation.logs()
    assert len(logs) == len(simulation.layout.slices)
    if consistency != "backup:1":  # no push may be missing, and none be there twice
        for log in logs.values():
            assert sorted((w, c) for _, w, c, _ in log) == [
                (w, c) for w in range(workers) for c in range(6)
            ]
    assert difference(simulation.final(), replay(simulation, logs)) < 1e-12


@settings(max_examples=examples(100), phases=PHASES)
@given(
    **topologies, consistency=st.sampled_from(["sync", "async", "ssp:2", "backup:1"]),
    tick=st.integers(0, 600), clip=st.booleans(),
)  # fmt: skip
def test_a_snapshot_holds_whole_steps(
    workers, servers, slice_bytes, near, seed, consistency, tick, clip
):
    simulation = Simulation(
        {"consistency": consistency, "slice_bytes": slice_bytes}, workers, servers,
        OPTIMIZERS["sgd"], near=near, seed=seed, clip_norm=1.0 if clip else None,
    )  # fmt: skip
    simulation.snapshot_after(tick)
    simulation.run(6, slow_choice(seed, workers))
    snapshot = simulation.snapshot
    assert snapshot is not None
    # What it holds is the state after a set of pushes, the same set for every slice.
    sets = set()
    for index, log in simulation.logs().items():
        piece = simulation.layout.slices[index]
        steps = snapshot.steps[index]
        rows = [entry for entry in log if entry[0] < steps]
        sets.add(frozenset((worker, clock) for _, worker, clock, _ in rows))
        assert len({version for version, *_ in rows}) == steps
        held = snapshot.weights[piece.flat][piece.start : piece.stop]
        assert held.abs().sum() > 0
    if not consistency.startswith("backup"):
        assert len(sets) == 1
