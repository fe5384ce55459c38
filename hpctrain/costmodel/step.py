"""Predict a training step: computing, waiting for stragglers, and what of the exchange shows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import NamedTuple

from hpctrain.costmodel.collectives import (
    ALGORITHMS,
    Cost,
    one_of,
    parameter_server,
    parameter_server_tail,
    place,
)
from hpctrain.costmodel.inputs import Job, Machine, Network
from hpctrain.costmodel.strategies import StrategyCost
from hpctrain.errors import Error


class Breakdown(NamedTuple):
    """The parts of a mean step, in seconds.

    ``step_seconds`` is the sum of ``compute``, ``wait``, ``exposed`` and ``update``.

    Attributes:
        compute: Forward and backward, of a rank.
        wait: For the slowest rank.
        exchange: All of it, hidden or not.
        exposed: What of it the step is longer for.
        update: By the optimizer, and of a co-located server, where a worker's cores do it.
        step_seconds: The whole.
        workers: Ranks that compute.
        samples_per_second: Of all of them.
        efficiency: Of that, by as many ranks as there are, each as fast as one alone.
        bound: What takes the largest part besides computing.
    """

    compute: float
    wait: float
    exchange: float
    exposed: float
    update: float
    step_seconds: float
    workers: int
    samples_per_second: float
    efficiency: float
    bound: str


def predict(job: Job, strategy: StrategyCost, network: Network, machine: Machine) -> Breakdown:
    """Predict the mean step of a job.

    Args:
        job: What is trained.
        strategy: How replicas agree.
        network: Alpha and beta.
        machine: Gamma, and the update.

    Raises:
        Error: The strategy needs other ranks than there are.
    """
    if not strategy.fits(job.ranks):
        raise Error(
            f"{strategy.label} does not fit on {job.ranks} ranks.",
            hint="a rank alone is single; servers and backups need workers besides.",
        )
    workers = strategy.workers(job.ranks)
    whole_update = machine.update_seconds_per_byte * job.parameter_bytes
    update = whole_update
    if strategy.kind == "ps":
        # What dedicated servers do is part of the exchange; what threads of a worker do, its own.
        serves = strategy.colocated
        update = serving(job, strategy, machine, workers) if serves else 0.0
    compute = job.compute_seconds
    wait = compute * job.jitter * waiting(workers, strategy)
    total, exposed = Cost(), 0.0
    if strategy.kind == "averaging":
        once = exchange(job.parameter_bytes, job, strategy, network, machine)
        total = Cost(*(part / strategy.every for part in once))
        exposed = total.seconds
    elif strategy.kind != "single":
        total, exposed = overlapped(job, strategy, network, machine)
    if strategy.kind == "ps" and strategy.ahead > 0:
        _, least = overlapped(job, strategy, network, machine, alone=True)
        exposed = queued(compute + least, total.transfer + total.work, workers) - compute
    step = compute + wait + exposed + update
    return Breakdown(
        compute, wait, total.seconds, exposed, update, step, workers,
        samples_per_second=workers * job.samples / step,
        efficiency=workers / job.ranks * (compute + whole_update) / step,
        bound=_bound(total, exposed, wait, compute),
    )  # fmt: skip


def exchange(
    size: float,
    job: Job,
    strategy: StrategyCost,
    network: Network,
    machine: Machine,
    alone: bool = False,
) -> Cost:
    """Return the cost of exchanging gradients, from every worker to every other.

    Args:
        size: Bytes.
        job: Whose they are.
        strategy: How they are exchanged.
        network: Alpha and beta.
        machine: Gamma.
        alone: Of ps: only one worker, while the others exchange nothing.
    """
    if job.ranks == 1:
        return Cost()
    nodes, local = job.nodes, min(job.ranks, job.ranks_per_node)
    codec = strategy.compression
    coding = size * codec.encode_seconds_per_byte
    if strategy.kind == "ps":
        placement = place(nodes, local, strategy.servers, strategy.colocated)
        workers = strategy.workers(job.ranks)
        if alone:
            placement, workers = one_of(placement), 1
        cost = parameter_server(size, placement, network, codec.ratio)
        if not strategy.colocated:  # servers work while bytes travel
            share = size / job.parameter_bytes
            work = share * serving(job, strategy, machine, workers)
            cost = cost._replace(work=max(0.0, work - cost.transfer))
        return cost._replace(work=cost.work + coding)
    decoding = size * codec.decode_seconds_per_byte
    cost = ALGORITHMS[strategy.algorithm](size * codec.ratio, nodes, local, network, machine)
    return cost._replace(work=cost.work + coding + decoding)


def serving(job: Job, strategy: StrategyCost, machine: Machine, workers: int) -> float:
    """Return the seconds of a server's arithmetic in a step: n gradients of S/k bytes, the update.

    In async and ssp it updates for every push; else once, for their mean.

    Args:
        job: What is trained.
        strategy: With its servers, k.
        machine: Gamma, and the update.
        workers: n.
    """
    updates = workers if strategy.ahead > 0 else 1
    each = machine.reduce_seconds_per_byte + strategy.compression.decode_seconds_per_byte
    sums = workers * each + updates * machine.served_update
    return job.parameter_bytes / strategy.servers * sums


class Timeline(NamedTuple):
    """Exchanges beside a backward pass, in seconds.

    Attributes:
        exposed: From the end of backward to the end of the last exchange.
        hidden: Of exchange before the end of backward.
        slack: So much later backward could end without the exchange ending later.
    """

    exposed: float
    hidden: float
    slack: float


def timeline(ready: Iterable[tuple[float, float]], backward: float) -> Timeline:
    """Lay exchanges one after the other, none before its gradients are ready.

    Args:
        ready: Of each: when its gradients are, from the start of backward, and how long it takes.
        backward: Its end.
    """
    end = hidden = slack = 0.0
    for moment, seconds in ready:
        start = max(end, moment)
        end = start + seconds
        slack = start - moment
        hidden += max(0.0, min(end, backward) - min(start, backward))
    return Timeline(max(0.0, end - backward), hidden, slack)


def lengthened(line: Timeline, contention: float) -> float:
    """Return by how many seconds a step is longer for its exchange.

    Beside an exchange, computing loses ``contention`` seconds for each of the exchange's: backward
    ends later. The exchange of the last bucket begins later by that only as far as it had not to
    wait for the one before anyway.

    Args:
        line: The exchanges beside backward.
        contention: Seconds of computing that are lost for each second of exchange beside it.
    """
    return line.exposed + max(0.0, contention * line.hidden - line.slack)


def queued(alone: float, busy: float, workers: int) -> float:
    """Return the mean step where workers, each at its own pace, share servers' links.

    A worker that finds others there takes longer; together they cannot take steps faster than the
    busiest link allows. In between is what mean value analysis of a closed queueing network says
    (Reiser & Lavenberg, "Mean-value analysis of closed multichain queuing networks", J. ACM 27,
    1980). It is exact for a link that divides its rate among whoever sends, however computing times
    are distributed (Baskett, Chandy, Muntz & Palacios, J. ACM 22, 1975); it is taken to hold, too,
    where a part of the exchange is hidden behind computing.

    Args:
        alone: The step of a worker while the others exchange nothing.
        busy: How long a step of every worker keeps the busiest link, or server.
        workers: How many there are.
    """
    demand = busy / workers
    elsewhere = max(0.0, alone - demand)
    found = step = 0.0  # workers that one finds at the link when it comes there
    for number in range(1, workers + 1):
        there = demand * (1 + found)
        step = elsewhere + there
        found = number * there / step if step else 0.0
    return step


def overlapped(
    job: Job, strategy: StrategyCost, network: Network, machine: Machine, alone: bool = False
) -> tuple[Cost, float]:
    """Return the cost of exchanging all buckets, and by how many seconds the step is longer.

    Args:
        job: What is trained.
        strategy: How replicas agree.
        network: Alpha and beta.
        machine: Gamma, and contention.
        alone: Of ps: only one worker, while the others exchange nothing.
    """
    total = Cost()
    ready = []
    for done, share in job.buckets:
        cost = exchange(share * job.parameter_bytes, job, strategy, network, machine, alone)
        total = Cost(*map(sum, zip(total, cost, strict=True)))
        ready.append((done * job.backward_seconds, cost.seconds))
    if strategy.kind == "ps" and strategy.ahead == 0:
        moment, seconds = ready[-1]
        ready[-1] = moment, seconds + tail(job, strategy, network, machine)
    return total, lengthened(timeline(ready, job.backward_seconds), machine.contention)


def tail(job: Job, strategy: StrategyCost, network: Network, machine: Machine) -> float:
    """Return how long answers still come when all pushes have, where pushes are answered together.

    A link works both ways at a time while some parameters are pushed and others come back. But what
    workers push last is answered when the last of them has pushed it, and nothing is left to push.

    Args:
        job: What is trained.
        strategy: With its servers.
        network: Alpha and beta.
        machine: By how many bytes workers are apart.
    """
    local = min(job.ranks, job.ranks_per_node)
    placement = place(job.nodes, local, strategy.servers, strategy.colocated)
    size = min(job.parameter_bytes, strategy.servers * machine.lag_bytes)
    return parameter_server_tail(size, placement, network, strategy.compression.ratio)


def waiting(workers: int, strategy: StrategyCost) -> float:
    """Return how long a step waits for the straggler, in standard deviations of a worker's time.

    Times are taken as normal and independent. The slowest of n takes some Phi^-1((n - 3/8) / (n +
    1/4)) deviations more than the mean (Blom, "Statistical estimates and transformed
    beta-variables", 1958); where b of them are not waited for, n - b takes the place of n above
    the line. Where all meet only every m steps, the deviation of a mean of m counts, which is
    smaller by sqrt(m). Bounded staleness of s waits no longer than meeting every s + 1 steps would:
    an upper bound.

    Args:
        workers: n.
        strategy: Its backups b, its staleness s, or its steps m between averagings.
    """
    if workers == 1 or math.isinf(strategy.ahead):
        return 0.0
    rank = workers - strategy.backups
    deviations = NormalDist().inv_cdf((rank - 0.375) / (workers + 0.25))
    return max(0.0, deviations) / math.sqrt(max(strategy.ahead + 1, strategy.every))


def _bound(total: Cost, exposed: float, wait: float, compute: float) -> str:
    if max(exposed, wait) < 0.02 * compute:
        return "computing"
    if wait > exposed:
        return "slowest rank"
    return {total.latency: "latency", total.work: "arithmetic", total.transfer: "bandwidth"}[
        max(total)
    ]
