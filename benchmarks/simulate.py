"""Simulated, not measured: what slow ranks and lost nodes cost, on up to 10,000 ranks.

    python -m benchmarks.simulate --out results

- stragglers: the mean step of each strategy by number of ranks. Ranks take lognormal times; in the
  second half one of a thousand (one at least) is slow all the time. The exchange takes the same for
  all (--exchange-ms). `expected` is the mean of the largest of n such times, by integration.
- failures: the useful part of a run of --days on --nodes nodes, by checkpoint interval, for jobs
  that are started again from a checkpoint, and for those that go on in place without the lost node,
  which is back after --repair-minutes. `expected` is Daly's formula for restarts. Nodes fail as
  2048 of them did 419 times in 54 days (Grattafiori et al., "The Llama 3 herd of models",
  arXiv:2407.21783, section 3.3.4), or as --node-mtbf-days says.

Prints tables; --out gets simulate.json, simulate.csv and, where matplotlib is installed, plots of
efficiency and goodput.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import integrate, stats

from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, numbers, positive
from benchmarks.harness.tables import table
from benchmarks.simulation import failures, stragglers
from hpctrain.costmodel.strategies import Compression, strategy_of
from hpctrain.report.figures import Plot, Series

STRATEGIES = ("horovod", "ps:1+backup:B", "ps:1+ssp:3", "ps:1+async", "averaging:8")
BACKUP_SHARE = 0.02
SLOW_SHARE = 1e-3
FACTORS = (0.125, 0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0, 8.0)
LLAMA_3_DAYS = 54 * 2048 / 419
MINUTE, DAY = 60.0, 86400.0


def expected_slowest(count: int, mean: float, jitter: float) -> float:
    """Return the mean of the largest of so many lognormal times, which are independent."""
    sigma = math.sqrt(math.log1p(jitter**2))
    times = stats.lognorm(sigma, scale=math.exp(-(sigma**2) / 2))
    # E max = integral of P(max > t) over t >= 0; below some point it is 1.
    low, high = times.ppf(0.1 ** (15 / count)), times.ppf(1 - 1e-15)
    above, _ = integrate.quad(lambda t: -math.expm1(count * times.logcdf(t)), low, high, limit=500)
    return mean * (low + above)


def straggler_records(arguments: Arguments) -> list[dict[str, Any]]:
    """Return a record for each strategy and number of ranks, with slow ranks and without."""
    records = []
    compute, exchange = 1e-3 * arguments.compute_ms, 1e-3 * arguments.exchange_ms
    for slow_factor in (1.0, arguments.slow_factor):
        for size in arguments.ranks:
            slow = max(1, round(SLOW_SHARE * size)) if slow_factor > 1 else 0
            ranks = stragglers.Ranks(size, compute, arguments.jitter, slow, slow_factor)
            for name in STRATEGIES:
                backups = max(1, round(BACKUP_SHARE * size))
                label = name.replace(":B", f":{backups}")
                strategy = strategy_of(label, lambda codec: Compression(codec))
                found = stragglers.simulate(ranks, strategy, arguments.steps, exchange)
                record = {
                    "group": "stragglers",
                    "ranks": size,
                    "strategy": label,
                    "jitter": arguments.jitter,
                    "slow_ranks": slow,
                    "slow_factor": slow_factor,
                    "steps": arguments.steps,
                    **found._asdict(),
                }
                if name == "horovod" and not slow:
                    slowest = expected_slowest(size, compute, arguments.jitter)
                    record["expected_seconds"] = slowest + exchange
                records.append(record)
    return records


def failure_records(arguments: Arguments) -> list[dict[str, Any]]:
    """Return a record for each checkpoint interval and way of recovery."""
    cluster = failures.Cluster(
        arguments.nodes, DAY * arguments.node_mtbf_days, arguments.checkpoint_seconds
    )
    mtbf, cost = cluster.mtbf_seconds, cluster.checkpoint_seconds
    restart = failures.Recovery("restart", arguments.restart_seconds)
    elastic = failures.Recovery(
        "elastic",
        arguments.elastic_seconds,
        lost_seconds=1e-3 * arguments.compute_ms,
        repair_seconds=MINUTE * arguments.repair_minutes,
    )
    intervals = [factor * failures.young(cost, mtbf) for factor in FACTORS]
    records = []
    for interval in sorted([*intervals, failures.daly(cost, mtbf)]):
        for recovery in (restart, elastic):
            runs = [
                failures.simulate(cluster, recovery, interval, DAY * arguments.days, seed)
                for seed in range(arguments.seeds)
            ]
            goodputs = [run.goodput for run in runs]
            record = {
                "group": "failures",
                "nodes": cluster.nodes,
                "recovery": recovery.name,
                "interval_seconds": interval,
                "seeds": arguments.seeds,
                "goodput": statistics.mean(goodputs),
                "goodput_low": min(goodputs),
                "goodput_high": max(goodputs),
                "failures": statistics.mean(run.failures for run in runs),
            }
            if recovery is restart:
                record["expected_goodput"] = failures.expected_goodput(
                    interval, cost, restart.down_seconds, mtbf
                )
            records.append(record)
    return records


def shown(records: Sequence[dict[str, Any]], best: dict[str, float]) -> str:
    """Return the tables."""
    rows = [["ranks", "slow", "strategy", "step ms", "error", "expected", "efficiency"]]
    for each in (record for record in records if record["group"] == "stragglers"):
        expected = each.get("expected_seconds")
        rows.append(
            [
                str(each["ranks"]),
                str(each["slow_ranks"]),
                each["strategy"],
                f"{1e3 * each['step_seconds']:.1f}",
                f"{1e3 * each['error_seconds']:.1f}",
                f"{1e3 * expected:.1f}" if expected else "",
                f"{each['efficiency']:.1%}",
            ]
        )
    goodput = [["interval s", "recovery", "goodput", "least..largest", "expected", "failures"]]
    for each in (record for record in records if record["group"] == "failures"):
        expected = each.get("expected_goodput")
        goodput.append(
            [
                f"{each['interval_seconds']:.0f}",
                each["recovery"],
                f"{each['goodput']:.1%}",
                f"{each['goodput_low']:.1%}..{each['goodput_high']:.1%}",
                f"{expected:.1%}" if expected else "",
                f"{each['failures']:.0f}",
            ]
        )
    lines = [f"{name}: {value:.0f} s" for name, value in best.items()]
    return "\n".join([table(rows), "", table(goodput), *lines])


def best_of(records: Sequence[dict[str, Any]], arguments: Arguments) -> dict[str, float]:
    """Return the best simulated interval for restarts, and what the formulas say."""
    mtbf = DAY * arguments.node_mtbf_days / arguments.nodes
    restarts = [each for each in records if each.get("recovery") == "restart"]
    simulated = max(restarts, key=lambda each: float(each["goodput"]))
    return {
        "mean time between failures": mtbf,
        "best interval for restarts, simulated": simulated["interval_seconds"],
        "Young": failures.young(arguments.checkpoint_seconds, mtbf),
        "Daly": failures.daly(arguments.checkpoint_seconds, mtbf),
    }


def figures(records: Sequence[dict[str, Any]], best: dict[str, float]) -> list[Plot]:
    """Return plots of efficiency over ranks, and of goodput over checkpoint intervals."""
    lines = []
    for slow in (False, True):
        for look, name in enumerate(STRATEGIES):
            family = name.removesuffix("B")
            points = [
                each
                for each in records
                if each["group"] == "stragglers"
                and each["strategy"].startswith(family)
                and bool(each["slow_ranks"]) == slow
            ]
            label = family.removesuffix(":") + ", some slow" * slow
            x, y = [p["ranks"] for p in points], [p["efficiency"] for p in points]
            lines.append(Series(label, x, y, look=look, faint=slow))
    goodput = []
    for look, recovery in enumerate(("restart", "elastic")):
        points = [each for each in records if each.get("recovery") == recovery]
        x, y = [p["interval_seconds"] for p in points], [p["goodput"] for p in points]
        low, high = ([p[f"goodput_{end}"] for p in points] for end in ("low", "high"))
        goodput.append(Series(recovery, x, y, low, high, look=look))
        if recovery == "restart":
            y = [p["expected_goodput"] for p in points]
            goodput.append(Series("restart, by Daly's formula", x, y, look=look + 2, faint=True))
    return [
        Plot("simulate-efficiency", "Simulated: slow ranks", "ranks", "efficiency (simulated)",
             lines, log_x=True, from_zero=True),
        Plot("simulate-goodput", "Simulated: failures", "checkpoint interval, s",
             "goodput (simulated)", goodput, "The line is at Young's interval.",
             marks=[(best["Young"], 0)], log_x=True),
    ]  # fmt: skip


def measure(arguments: Arguments) -> Report:
    """Simulate slow ranks, and runs with failures."""
    records = [*straggler_records(arguments), *failure_records(arguments)]
    best = best_of(records, arguments)
    more = {"simulated": True, "best": best}
    return Report(records, shown(records, best), more, figures=figures(records, best))


def above_one(kind: type) -> Any:
    """Return what reads an option's number, above 1."""

    def read(text: str) -> Any:
        if not (found := kind(text)) > 1:
            raise argparse.ArgumentTypeError(f"{text} is not above 1")
        return found

    return read


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--ranks", type=numbers(above_one(int)), default="10,100,1000,10000",
        help="default: %(default)s")  # fmt: skip
    add("--steps", type=above_one(int), default=300, help="of each rank")
    add("--compute-ms", type=positive, default=500.0, help="of a step, mean")
    add("--exchange-ms", type=positive, default=20.0, help="that does not hide")
    add("--jitter", type=positive, default=0.05, help="standard deviation by mean")
    add("--slow-factor", type=above_one(float), default=1.5, help="of slow ranks' times")
    add("--nodes", type=above_one(int), default=1250, help="that may fail; 8 ranks each")
    add("--node-mtbf-days", type=positive, default=LLAMA_3_DAYS)
    add("--checkpoint-seconds", type=positive, default=60.0)
    add("--restart-seconds", type=positive, default=600.0)
    add("--elastic-seconds", type=positive, default=5.0)
    add("--repair-minutes", type=positive, default=60.0)
    add("--days", type=positive, default=30.0, help="of work in each run")
    add("--seeds", type=count, default=8, help="runs for each interval")


QUICK = {"ranks": "10,100", "steps": 40, "days": 2, "seeds": 2}
BENCHMARK = Benchmark("simulate", __doc__, measure, options=options, quick=QUICK)

if __name__ == "__main__":
    BENCHMARK.run()
