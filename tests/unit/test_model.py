"""The cost model: formulas against a walk of every message, limits, and what is typed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.costmodel.collectives import (
    ALGORITHMS,
    Placement,
    binomial,
    halving,
    hierarchical,
    parameter_server,
    parameter_server_tail,
    place,
    ring,
)
from hpctrain.costmodel.inputs import Job, Machine, Network, even_buckets, network_of
from hpctrain.costmodel.step import lengthened, predict, queued, timeline, waiting
from hpctrain.costmodel.strategies import Compression, StrategyCost, strategy_of
from hpctrain.errors import Error

NETWORK = Network(1e9, 1.0, 1e-4, 1e10, 1e-5)
MACHINE = Machine(1e-10, 2e-10)


def named(text):
    return strategy_of(text, lambda name: Compression(name, 0.5, 1e-9, 1e-9))


def walked_ring(size, n, network, machine):
    """Every rank's clock through 2(n-1) steps: receive from the left, add in the first half."""
    piece = size / n
    ready = [0.0] * n
    for step in range(2 * (n - 1)):
        arrived = [ready[r - 1] + network.latency_seconds + piece * network.beta for r in range(n)]
        work = piece * machine.reduce_seconds_per_byte if step < n - 1 else 0.0
        ready = [max(ready[r], arrived[r]) + work for r in range(n)]
    return max(ready)


@given(st.integers(2, 40), st.floats(1, 1e9))
def test_ring_is_what_walking_every_step_gives(n, size):
    assert ring(size, n, 1, NETWORK, MACHINE).seconds == pytest.approx(
        walked_ring(size, n, NETWORK, MACHINE)
    )


def test_halving_by_hand():
    # 8 ranks: 3 rounds of S/2, S/4, S/8, added; then the same back.
    cost = halving(8e8, 8, 1, NETWORK, MACHINE)
    sent = 4e8 + 2e8 + 1e8
    assert cost.latency == pytest.approx(6e-4)
    assert cost.transfer == pytest.approx(2 * sent / 1e9)
    assert cost.work == pytest.approx(sent * 1e-10)
    assert binomial(8e8, 8, 1, NETWORK, MACHINE).transfer == pytest.approx(6 * 0.8)


@given(st.integers(1, 16), st.integers(1, 8), st.floats(1, 1e9))
def test_limits_of_all_reduces(nodes, local, size):
    costs = {name: cost(size, nodes, local, NETWORK, MACHINE) for name, cost in ALGORITHMS.items()}
    if nodes * local == 1:
        assert all(cost.seconds == 0 for cost in costs.values())
    # No algorithm moves fewer bytes over a node's link than 2(N-1)/N S (Patarasu & Yuan).
    least = 2 * (nodes - 1) / nodes * size * NETWORK.beta
    assert all(cost.transfer >= least * (1 - 1e-9) for cost in costs.values())
    if local == 1:
        assert hierarchical(size, nodes, 1, NETWORK, MACHINE) == pytest.approx(
            ring(size, nodes, 1, NETWORK, MACHINE)
        )


def counted(size, placement, network):
    """Bytes over every node's link, message by message."""
    servers = [node for node, count in enumerate(placement.servers) for _ in range(count)]
    workers = [node for node, count in enumerate(placement.workers) for _ in range(count)]
    out, into = [0.0] * len(placement.workers), [0.0] * len(placement.workers)
    for worker in workers:
        for server in servers:
            if worker != server:
                for a, b in ((worker, server), (server, worker)):
                    out[a] += size / len(servers)
                    into[b] += size / len(servers)
    return max(out + into) * network.beta


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=5).filter(
        lambda nodes: any(w for w, _ in nodes) and any(s for _, s in nodes)
    )
)
def test_parameter_server_is_bound_by_the_worst_link(nodes):
    placement = Placement(*map(tuple, zip(*nodes, strict=True)))
    network = Network(1e9, 1.0, 1e-4, math.inf, 1e-5)
    cost = parameter_server(1e8, placement, network)
    assert cost.transfer == pytest.approx(counted(1e8, placement, network))


def test_parameter_server_by_hand():
    # 4 workers, 2 servers, each on a node: a server's link carries 4 S/2.
    placement = Placement((1, 1, 1, 1, 0, 0), (0, 0, 0, 0, 1, 1))
    assert parameter_server(1e8, placement, NETWORK).transfer == pytest.approx(0.2)
    # A worker and a server on each node: as a ring.
    everywhere = parameter_server(1e8, place(8, 1, 8, True), NETWORK)
    assert everywhere.transfer == pytest.approx(ring(1e8, 8, 1, NETWORK, Machine()).transfer)


def test_answers_behind_all_pushes_take_as_long_again():
    # Dedicated servers: 4 workers push S/2 each to 2 of them, which then answer as much.
    dedicated = Placement((1, 1, 1, 1, 0, 0), (0, 0, 0, 0, 1, 1))
    assert parameter_server_tail(1e8, dedicated, NETWORK) == pytest.approx(0.2)
    assert parameter_server_tail(1e8, dedicated, NETWORK, 0.25) == pytest.approx(0.05)
    # Where every node does both, a link is as busy in each direction all the time.
    assert parameter_server_tail(1e8, place(8, 1, 8, True), NETWORK, 0.25) == pytest.approx(0)
    # No more than there is, and of a large job next to nothing.
    quick = Network(1e8, 1.0, 0.0, math.inf, 0.0)
    job = Job(1e8, 0.0, 0.0, ranks=6)
    for lag, part in ((0.0, 1.0), (5e6, 1.1), (1e12, 2.0)):
        step = predict(job, named("ps:2"), quick, Machine(lag_bytes=lag))
        assert step.exchange == pytest.approx(2.0) and step.exposed == pytest.approx(2.0 * part)
    # Where each push is answered for itself, nobody waits for that.
    own = [predict(job, named("ps:2+async"), quick, Machine(lag_bytes=lag)) for lag in (0.0, 1e12)]
    assert own[0] == own[1]


def test_place_takes_ranks_away_unless_colocated():
    assert place(3, 2, 4, False) == Placement((0, 1, 1), (2, 1, 1))
    assert place(3, 2, 4, True) == Placement((2, 2, 2), (2, 1, 1))


def test_timeline_by_hand():
    # Backward of 10 s; buckets ready at 5 and 10, of 7 and 1 s: the second waits until 12.
    line = timeline([(5.0, 7.0), (10.0, 1.0)], 10.0)
    assert line == pytest.approx((3.0, 5.0, 2.0))
    # Half of 5 hidden seconds are lost to contention; 2 of those the last exchange had to wait.
    assert lengthened(line, 0.5) == pytest.approx(3.5)
    assert lengthened(line, 0.0) == pytest.approx(3.0)


@given(
    st.lists(st.floats(0, 10), min_size=1, max_size=6).map(sorted), st.floats(0, 5),
    st.floats(0, 1),
)  # fmt: skip
def test_a_step_with_overlap_is_between_all_hidden_and_none(ready, each, contention):
    longer = lengthened(timeline([(moment, each) for moment in ready], 10.0), contention)
    whole = each * len(ready)
    assert -1e-9 <= longer <= whole + 1e-9
    assert longer >= lengthened(timeline([(m, each) for m in ready], 10.0), 0.0) - 1e-9


JOB = Job(1e8, 0.1, 0.2, ranks=8, samples=32, buckets=even_buckets(4), jitter=0.1)


def test_predictions_add_up():
    for text in ("horovod", "ps:2", "ps:8+colocated+ssp:2", "averaging:4", "ps:2+int8"):
        step = predict(JOB, named(text), NETWORK, MACHINE)
        parts = step.compute + step.wait + step.exposed + step.update
        assert step.step_seconds == pytest.approx(parts)
        assert step.samples_per_second == pytest.approx(step.workers * 32 / step.step_seconds)
        assert 0 < step.efficiency < 1
    assert predict(JOB, named("ps:2"), NETWORK, MACHINE).workers == 6


def test_what_each_strategy_saves():
    def step(text, **changes):
        return predict(JOB, named(text), Network(1e9, **changes), MACHINE)

    assert step("ps:2+async").wait == 0 < step("ps:2+ssp:3").wait < step("ps:2").wait
    assert step("ps:2+backup:1").wait < step("ps:2").wait
    assert step("averaging:4").exchange == pytest.approx(step("averaging:1").exchange / 4)
    assert step("horovod").exchange > step("horovod", link_share=1.0).exchange
    assert step("ps:4").exchange < step("ps:1").exchange


def test_compression_pays_where_the_link_is_slow_and_gradients_fill_it():
    def saved(text, network):
        plain, coded = (predict(JOB, named(t), network, MACHINE) for t in (text, f"{text}+int8"))
        return plain.step_seconds - coded.step_seconds

    assert saved("horovod", Network(1e7)) > 0 > saved("horovod", Network(1e12))
    assert saved("ps:8+colocated", Network(1e7)) > 0
    # Out of a server that has its node for itself go weights alone, and they are not compressed.
    assert saved("ps:1", Network(1e7)) < 0.1 * saved("ps:8+colocated", Network(1e7))


def test_waiting_is_near_the_mean_of_the_largest():
    # Harter, "Expected values of normal order statistics", 1961, table 1.
    for n, expected in ((10, 1.53875), (100, 2.50759), (400, 2.96818)):
        assert waiting(n, StrategyCost(kind="horovod")) == pytest.approx(expected, rel=0.01)


def test_bounds_are_named():
    def bound(network, text="horovod", **changes):
        job = Job(**{**vars(JOB), "jitter": 0.0, **changes})
        return predict(job, named(text), network, MACHINE).bound

    assert bound(Network(1e7)) == "bandwidth"
    assert bound(Network(1e13, latency_seconds=0.1)) == "latency"
    assert bound(Network(1e13, latency_seconds=0)) == "computing"
    assert bound(Network(1e13, latency_seconds=0), jitter=0.5) == "slowest rank"


def test_networks_as_typed():
    network = network_of("25Gbit,latency=20us,share=0.8,local=12GB,local-latency=3us", NETWORK)
    assert network.bytes_per_second == 3.125e9 and network.local_bytes_per_second == 12e9
    assert network.latency_seconds == pytest.approx(20e-6) and network.link_share == 0.8
    assert network.beta == pytest.approx(1 / 2.5e9)
    assert network_of("100Mbit", NETWORK).latency_seconds == NETWORK.latency_seconds


@pytest.mark.parametrize(
    "text",
    ["fast", "25", "25Gbit,latency=fast", "1Gbit,share=2", "0Gbit", "1Gbit,delay=1s", "1.2.3Gbit"],
)
def test_networks_that_cannot_be_read(text):
    with pytest.raises(Error, match=r"HINT|rate|time|share|no '") as caught:
        network_of(text, NETWORK)
    assert caught.value.hint


def test_strategies_as_typed():
    strategy = named("ps:4+colocated+ssp:3+topk:0.01")
    assert (strategy.servers, strategy.colocated, strategy.ahead) == (4, True, 3)
    assert strategy.compression.name == "topk:0.01" and not strategy.exact
    assert named("horovod+halving").algorithm == "halving" and named("horovod").exact
    assert math.isinf(named("ps+async").ahead) and named("ps").servers == 1
    assert named("averaging:8").every == 8


@pytest.mark.parametrize(
    "text",
    ["", "gossip", "ps:x", "ps:0", "averaging", "horovod:2", "horovod+async", "horovod+topk:0.1",
     "single+fp16", "ps+ssp", "ps+ring"],
)  # fmt: skip
def test_strategies_that_there_are_not(text):
    with pytest.raises(Error) as caught:
        named(text)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["ps:8", "single", "ps:9+colocated", "ps:4+backup:4"])
def test_too_few_ranks_or_too_many(text):
    with pytest.raises(Error, match="does not fit on 8 ranks"):
        predict(JOB, named(text), NETWORK, MACHINE)


def test_a_servers_arithmetic_by_hand():
    quick = Network(1e15, latency_seconds=0.0, local_bytes_per_second=1e15)
    # 6 workers, 2 servers of 5e7 bytes each: 6 gradients read, and one update, or 6 of them.
    assert predict(JOB, named("ps:2"), quick, MACHINE).exchange == pytest.approx(0.03 + 0.01, 1e-3)
    each = predict(JOB, named("ps:2+async"), quick, MACHINE)
    assert each.exchange == pytest.approx(0.03 + 0.06, rel=1e-3) and each.update == 0
    # Where all parameters of a server lie end to end, it may be quicker.
    flat = Machine(1e-10, 2e-10, 0.0, 1e-10)
    assert predict(JOB, named("ps:2"), quick, flat).exchange == pytest.approx(0.035, 1e-3)
    # A thread of a worker takes the worker's time.
    beside = predict(JOB, named("ps:8+colocated"), quick, MACHINE)
    assert beside.update == pytest.approx(0.01 + 0.0025) and beside.exchange < 1e-5


def sharing(workers, think, demand, cycles, seed):
    """Workers that think for random times, and then share a link's rate; event by event."""
    rng = np.random.default_rng(seed)
    thinking = list(rng.exponential(think, workers))  # until when
    sending = {}  # by worker, what is left
    now, done = 0.0, 0
    while done < cycles:
        worker = min(range(workers), key=lambda w: math.inf if w in sending else thinking[w])
        begins = math.inf if worker in sending else thinking[worker]
        first = min(sending, key=sending.get, default=None)
        ends = math.inf if first is None else now + sending[first] * len(sending)
        moment = min(begins, ends)
        sending = {w: left - (moment - now) / len(sending) for w, left in sending.items()}
        now = moment
        if ends <= begins:
            del sending[first]
            thinking[first] = now + rng.exponential(think)
            done += 1
        else:
            sending[worker] = demand
    return now * workers / done


@pytest.mark.parametrize(("workers", "think"), [(1, 1.0), (4, 4.0), (7, 1.0)])
def test_queued_is_what_sharing_a_link_gives(workers, think):
    mean = sharing(workers, think, 1.0, 4000, seed=1)
    assert queued(think + 1.0, float(workers), workers) == pytest.approx(mean, rel=0.06)


@given(st.integers(1, 50), st.floats(1e-3, 10), st.floats(0, 10))
def test_queued_is_between_its_bounds(workers, alone, busy):
    # Asymptotic bounds (Denning & Buzen, "The operational analysis of queueing network models").
    step = queued(alone, busy, workers)
    assert step >= max(alone, busy) * (1 - 1e-9)
    assert step <= max(alone, busy / workers) + busy * (workers - 1) / workers + 1e-9
