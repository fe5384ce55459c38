"""Simulated ranks and nodes against sequential oracles and formulas that are exact."""

import math

import numpy as np
import pytest

from benchmarks.simulate import expected_slowest
from benchmarks.simulation import failures, stragglers
from hpctrain.costmodel.strategies import StrategyCost
from hpctrain.errors import Error

SYNC = StrategyCost(kind="horovod")
MINUTE, DAY = 60.0, 86400.0


def ps(**how):
    return StrategyCost(kind="ps", servers=1, **how)


@pytest.mark.parametrize("count", [2, 10, 1000])
def test_a_synchronous_step_is_the_expected_maximum(count):
    found = stragglers.simulate(stragglers.Ranks(count, 0.5, 0.2), SYNC, 2000, 0.1, seed=1)
    expected = expected_slowest(count, 0.5, 0.2) + 0.1
    assert abs(found.step_seconds - expected) < 4 * found.error_seconds
    assert found.efficiency == pytest.approx(0.5 / found.step_seconds)


def test_expected_maximum_of_two():
    # For two independent lognormal times: E max = 2 m Phi(sigma / sqrt 2).
    sigma = math.sqrt(math.log1p(0.3**2))
    assert expected_slowest(2, 1.0, 0.3) == pytest.approx(1 + math.erf(sigma / 2))


def oracle(ahead, count, steps, jitter, seed):
    """Bounded staleness, one worker's one step after the other."""
    rng = np.random.default_rng(seed)
    variance = math.log1p(jitter**2)
    took = [rng.lognormal(-variance / 2, math.sqrt(variance), count) for _ in range(steps)]
    ended = [[0.0] * count]
    for step in range(steps):
        row = []
        for worker in range(count):
            begin = ended[-1][worker]
            if step >= ahead + 1:
                begin = max(begin, *ended[int(step - ahead)])
            row.append(begin + took[step][worker])
        ended.append(row)
    return count / sum(steps / end for end in ended[-1])


@pytest.mark.parametrize("ahead", [0, 1, 3, math.inf])
def test_bounded_staleness_against_one_worker_after_the_other(ahead):
    found = stragglers.simulate(stragglers.Ranks(7, 1.0, 0.4), ps(ahead=ahead), 60, 0.0, seed=5)
    assert found.step_seconds == pytest.approx(oracle(ahead, 7, 60, 0.4, 5))


def test_a_slow_rank_holds_back_those_that_wait_for_it():
    ranks = stragglers.Ranks(20, 1.0, 0.01, slow=1, slow_factor=3.0)

    def step(strategy):
        return stragglers.simulate(ranks, strategy, 200, 0.0).step_seconds

    assert step(SYNC) == pytest.approx(3, rel=0.02)
    assert step(ps(ahead=3)) == pytest.approx(3, rel=0.05)
    assert step(StrategyCost(kind="averaging", every=8)) == pytest.approx(3, rel=0.02)
    assert step(ps(backups=1)) == pytest.approx(1.02, rel=0.02)
    assert step(ps(ahead=math.inf)) == pytest.approx(20 / (19 + 1 / 3), rel=0.02)


def test_what_cannot_be_simulated():
    ranks = stragglers.Ranks(2, 1.0)
    with pytest.raises(Error, match="backups"):
        stragglers.simulate(ranks, ps(backups=2), 10, 0.0)
    with pytest.raises(Error, match="spread"):
        stragglers.simulate(ranks, StrategyCost(kind="averaging", every=8), 10, 0.0)


CLUSTER = failures.Cluster(nodes=8, node_mtbf_seconds=8 * 5 * 3600.0, checkpoint_seconds=60.0)
RESTART = failures.Recovery("restart", 600.0)


def goodput(interval, recovery=RESTART, runs=20):
    found = [
        failures.simulate(CLUSTER, recovery, interval, 60 * DAY, seed).goodput
        for seed in range(runs)
    ]
    return np.mean(found), np.std(found, ddof=1) / math.sqrt(runs)


def test_the_best_interval_is_near_youngs_and_dalys():
    mtbf = CLUSTER.mtbf_seconds
    young = failures.young(60.0, mtbf)
    assert young == pytest.approx(math.sqrt(2 * 60 * 5 * 3600))
    assert failures.daly(60.0, mtbf) == pytest.approx(young, rel=0.05)
    factors = [0.25, 0.5, 1.0, 2.0, 4.0]
    found = {factor: goodput(factor * young) for factor in factors}
    assert max(found, key=lambda factor: found[factor][0]) == 1.0
    for factor, (mean, error) in found.items():
        expected = failures.expected_goodput(factor * young, 60.0, 600.0, mtbf)
        assert abs(mean - expected) < 4 * error, factor


def test_dalys_interval_is_the_best_of_his_formula():
    for cost, mtbf in ((10.0, 1e5), (60.0, 1.8e4), (300.0, 3600.0)):
        grid = np.geomspace(cost / 10, 10 * mtbf, 20000)
        best = max(grid, key=lambda tau: failures.expected_goodput(tau, cost, 0.0, mtbf))
        assert failures.daly(cost, mtbf) == pytest.approx(best, rel=0.02)
    assert failures.daly(300.0, 100.0) == 100.0


def test_without_failures_only_checkpoints_cost():
    cluster = failures.Cluster(1, 1e12, 60.0)
    found = failures.simulate(cluster, RESTART, 540.0, 5400.0)
    assert found.failures == 0 and found.checkpoint_seconds == 9 * 60.0
    assert found.goodput == pytest.approx(5400 / 5940)


def test_going_on_in_place_beats_restarts_and_costs_the_lost_nodes_share():
    elastic = failures.Recovery("elastic", 5.0, lost_seconds=0.5, repair_seconds=3600.0)
    mean, _ = goodput(6000.0, elastic, runs=5)
    # By hand: checkpoints, 5 s a failure, and an eighth of the speed for an hour.
    lost = 60 / 6000 + (5 + 0.5 + 3600 / 8) / CLUSTER.mtbf_seconds
    assert 1 / mean == pytest.approx(1 + lost, abs=0.01)
    assert mean > goodput(failures.young(60.0, CLUSTER.mtbf_seconds), runs=5)[0]


def test_time_is_accounted_for():
    found = failures.simulate(CLUSTER, RESTART, 1500.0, 30 * DAY, seed=3)
    whole = 30 * DAY / found.goodput
    spent = 30 * DAY + found.lost_seconds + found.checkpoint_seconds + found.down_seconds
    assert whole == pytest.approx(spent)
