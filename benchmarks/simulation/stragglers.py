"""Steps of up to tens of thousands of ranks, simulated: what slow ones cost each strategy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpctrain.costmodel.strategies import StrategyCost
from hpctrain.errors import Error


@dataclass(frozen=True)
class Ranks:
    """Who computes, and how evenly.

    Attributes:
        count: How many.
        compute_seconds: Mean of a step's forward and backward, of a rank that is not slow.
        jitter: Standard deviation from step to step by the mean; times are lognormal.
        slow: How many are slow all the time.
        slow_factor: So many times as long they take.
    """

    count: int
    compute_seconds: float
    jitter: float = 0.05
    slow: int = 0
    slow_factor: float = 1.0


class Steps(NamedTuple):
    """What came out.

    Attributes:
        step_seconds: Mean, between a rank's steps.
        error_seconds: Standard error of that, as far as steps (or rounds of them) are independent.
        efficiency: Samples that counted, by those of as many ranks that never wait.
    """

    step_seconds: float
    error_seconds: float
    efficiency: float


def simulate(
    ranks: Ranks, strategy: StrategyCost, steps: int, exchange_seconds: float, seed: int = 0
) -> Steps:
    """Simulate every rank's every step, by the recursion of its strategy.

    A worker begins a step when it has ended its last one, and, with bounded staleness s, when all
    have ended the one s + 1 before (Ho et al., 2013): s = 0 is sync, no bound async. With backups
    the slowest drop the step that they are at when the others go on. With averaging all meet every
    ``strategy.every`` steps.

    Args:
        ranks: Who computes.
        strategy: How they agree.
        steps: Of each rank.
        exchange_seconds: Of an exchange, as far as it does not hide.
        seed: Of the times.

    Raises:
        Error: There are as many backups as ranks, or too few steps for a spread.
    """
    if strategy.backups >= ranks.count:
        raise Error(f"{strategy.backups} backups of {ranks.count} ranks.", hint="leave one.")
    if steps < 2 * strategy.every:
        raise Error(f"{steps} steps show no spread.", hint=f"take {2 * strategy.every} or more.")
    rng = np.random.default_rng(seed)
    variance = math.log1p(ranks.jitter**2)
    mean = np.full(ranks.count, ranks.compute_seconds)
    mean[: ranks.slow] *= ranks.slow_factor
    ended = np.zeros(ranks.count)
    all_ended: list[float] = []
    means = [0.0]
    for step in range(steps):
        spread = rng.lognormal(-variance / 2, math.sqrt(variance), ranks.count)
        took = mean * spread
        if strategy.backups:
            last = ranks.count - strategy.backups - 1
            ended = ended + np.partition(took, last)[last] + exchange_seconds
        elif strategy.kind == "averaging":
            ended = ended + took
            if (step + 1) % strategy.every == 0:
                ended[:] = ended.max() + exchange_seconds
        else:
            bound = step - 1 - strategy.ahead
            begin = np.maximum(ended, all_ended[int(bound)]) if bound >= 0 else ended
            ended = begin + took + exchange_seconds
        all_ended.append(float(ended.max()))
        means.append(float(ended.mean()))
    rate = float((steps / ended).mean())  # of steps, by the mean rank
    each: NDArray[np.float64] = np.diff(means[:: strategy.every]) / strategy.every
    useful = 1 - strategy.backups / ranks.count
    return Steps(
        1 / rate,
        float(each.std(ddof=1)) / math.sqrt(len(each)),
        useful * ranks.compute_seconds * rate,
    )
