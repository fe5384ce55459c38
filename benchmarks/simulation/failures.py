"""A long run on nodes that fail, simulated event by event: what part of the time is useful."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Cluster:
    """Nodes that fail independently, at exponential times.

    Attributes:
        nodes: How many.
        node_mtbf_seconds: Mean time between failures of one.
        checkpoint_seconds: How long training stands still for a checkpoint.
    """

    nodes: int
    node_mtbf_seconds: float
    checkpoint_seconds: float

    @property
    def mtbf_seconds(self) -> float:
        """The mean time between failures of all nodes together."""
        return self.node_mtbf_seconds / self.nodes


@dataclass(frozen=True)
class Recovery:
    """What a failure costs.

    Attributes:
        name: What it is called.
        down_seconds: Until training goes on; another failure meanwhile begins it anew.
        lost_seconds: Work that is done again; infinite: all since the last checkpoint.
        repair_seconds: Until the node is back. Meanwhile the others go on, slower by its share. 0:
            a spare node took its place.
    """

    name: str
    down_seconds: float
    lost_seconds: float = math.inf
    repair_seconds: float = 0.0


class Outcome(NamedTuple):
    """Of a run.

    Attributes:
        goodput: Useful time by all time: what the run would have taken without failures and
            checkpoints.
        failures: How many there were.
        lost_seconds: Work done again.
        checkpoint_seconds: Spent on checkpoints.
        down_seconds: Spent on recovery.
    """

    goodput: float
    failures: int
    lost_seconds: float
    checkpoint_seconds: float
    down_seconds: float


def simulate(
    cluster: Cluster, recovery: Recovery, interval: float, work_seconds: float, seed: int = 0
) -> Outcome:
    """Simulate a run of so many seconds of work, with a checkpoint after each ``interval``."""
    rng = np.random.default_rng(seed)
    first = rng.exponential(cluster.node_mtbf_seconds, cluster.nodes)
    failures = list(zip(first.tolist(), range(cluster.nodes), strict=True))
    heapq.heapify(failures)
    returns: list[float] = []
    now = saved = work = lost = left = 0.0
    count = 0
    phase = "work"
    spent = {"work": 0.0, "checkpoint": 0.0, "down": 0.0}
    while saved + work < work_seconds:
        speed = 1 - len(returns) / cluster.nodes
        if phase == "work":
            left = max(0.0, min(interval - work, work_seconds - saved - work)) / speed
        end = min(now + left, failures[0][0], returns[0] if returns else math.inf)
        elapsed = end - now
        spent[phase] += elapsed
        work += elapsed * speed if phase == "work" else 0.0
        left -= elapsed
        now = end
        if returns and end == returns[0]:
            heapq.heappop(returns)
        elif end == failures[0][0]:
            _, node = failures[0]
            again = now + recovery.repair_seconds + rng.exponential(cluster.node_mtbf_seconds)
            heapq.heapreplace(failures, (again, node))
            if recovery.repair_seconds:
                heapq.heappush(returns, now + recovery.repair_seconds)
            gone = min(work, recovery.lost_seconds)
            work, lost, count = work - gone, lost + gone, count + 1
            phase, left = "down", recovery.down_seconds
        elif phase == "work" and saved + work < work_seconds:
            phase, left = "checkpoint", cluster.checkpoint_seconds
        else:
            if phase == "checkpoint":
                saved, work = saved + work, 0.0
            phase = "work"
    return Outcome(work_seconds / now, count, lost, spent["checkpoint"], spent["down"])


def young(checkpoint_seconds: float, mtbf_seconds: float) -> float:
    """Return the best interval, to first order: sqrt(2 C M).

    Young, "A first order approximation to the optimum checkpoint interval", 1974.
    """
    return math.sqrt(2 * checkpoint_seconds * mtbf_seconds)


def daly(checkpoint_seconds: float, mtbf_seconds: float) -> float:
    """Return the best interval, to a higher order.

    Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006,
    equation 37.
    """
    ratio = checkpoint_seconds / (2 * mtbf_seconds)
    if ratio >= 1:
        return mtbf_seconds
    factor = 1 + math.sqrt(ratio) / 3 + ratio / 9
    return young(checkpoint_seconds, mtbf_seconds) * factor - checkpoint_seconds


def expected_goodput(
    interval: float, checkpoint_seconds: float, restart_seconds: float, mtbf_seconds: float
) -> float:
    """Return the goodput of restarts, exactly: tau / (M e^(R/M) (e^((tau + C)/M) - 1)).

    Daly, 2006, as above.
    """
    grown = math.expm1((interval + checkpoint_seconds) / mtbf_seconds)
    return interval / (mtbf_seconds * math.exp(restart_seconds / mtbf_seconds) * grown)
