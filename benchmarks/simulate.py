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

Prints tables; --out gets simulate.json, simulate.csv and, where matplotlib is installed,
simulate.png.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import integrate, stats

from benchmarks.output import table, write
from hpctrain.costmodel import failures, stragglers
from hpctrain.costmodel.strategies import Compression, strategy_of
from hpctrain.errors import Error

STRATEGIES = ("horovod", "ps:1+backup:B", "ps:1+ssp:3", "ps:1+async", "averaging:8")
BACKUP_SHARE = 0.02
SLOW_SHARE = 1e-3
FACTORS = (0.125, 0.25, 0.5, 0.71, 1.0, 1.41, 2.0, 4.0, 8.0)
LLAMA_3_DAYS = 54 * 2048 / 419
MINUTE, DAY = 60.0, 86400.0


def expected_slowest(count: int, mean: float, jitter: float) -> float:
    """Mean of the largest of so many lognormal times, which are independent."""
    sigma = math.sqrt(math.log1p(jitter**2))
    times = stats.lognorm(sigma, scale=math.exp(-(sigma**2) / 2))
    # E max = integral of P(max > t) over t >= 0; below some point it is 1.
    low, high = times.ppf(0.1 ** (15 / count)), times.ppf(1 - 1e-15)
    above, _ = integrate.quad(lambda t: -math.expm1(count * times.logcdf(t)), low, high, limit=500)
    return mean * (low + above)


def straggler_records(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Of all strategies, with and without slow ranks."""
    records = []
    compute, exchange = 1e-3 * arguments.compute_ms, 1e-3 * arguments.exchange_ms
    for slow_factor in (1.0, arguments.slow_factor):
        for count in arguments.ranks:
            slow = max(1, round(SLOW_SHARE * count)) if slow_factor > 1 else 0
            ranks = stragglers.Ranks(count, compute, arguments.jitter, slow, slow_factor)
            for name in STRATEGIES:
                backups = max(1, round(BACKUP_SHARE * count))
                label = name.replace(":B", f":{backups}")
                strategy = strategy_of(label, lambda codec: Compression(codec))
                found = stragglers.simulate(ranks, strategy, arguments.steps, exchange)
                record = {
                    "group": "stragglers",
                    "ranks": count,
                    "strategy": label,
                    "jitter": arguments.jitter,
                    "slow_ranks": slow,
                    "slow_factor": slow_factor,
                    "steps": arguments.steps,
                    **found._asdict(),
                }
                if name == "horovod" and not slow:
                    slowest = expected_slowest(count, compute, arguments.jitter)
                    record["expected_seconds"] = slowest + exchange
                records.append(record)
    return records


def failure_records(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """By interval and way of recovery."""
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
    """The tables."""
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


def best_of(records: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, float]:
    """Intervals: the best simulated one for restarts, and what the formulas say."""
    mtbf = DAY * arguments.node_mtbf_days / arguments.nodes
    restarts = [each for each in records if each.get("recovery") == "restart"]
    simulated = max(restarts, key=lambda each: float(each["goodput"]))
    return {
        "mean time between failures": mtbf,
        "best interval for restarts, simulated": simulated["interval_seconds"],
        "Young": failures.young(arguments.checkpoint_seconds, mtbf),
        "Daly": failures.daly(arguments.checkpoint_seconds, mtbf),
    }


def plot(records: Sequence[dict[str, Any]], best: dict[str, float], file: Path) -> None:
    """Efficiency by ranks, and goodput by interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    steps = [each for each in records if each["group"] == "stragglers"]
    for color, name in enumerate(STRATEGIES):
        family = name.removesuffix("B")
        for slow, line in ((False, "o-"), (True, "o:")):
            points = [
                each
                for each in steps
                if each["strategy"].startswith(family) and bool(each["slow_ranks"]) == slow
            ]
            label = family.removesuffix(":") + (", some slow" if slow else "")
            x, y = [p["ranks"] for p in points], [p["efficiency"] for p in points]
            left.plot(x, y, line, color=f"C{color}", label=label)
    left.set(xscale="log", xlabel="ranks", ylabel="efficiency (simulated)", ylim=(0, 1))
    left.legend(fontsize=7)
    for recovery in ("restart", "elastic"):
        points = [each for each in records if each.get("recovery") == recovery]
        x, y = [p["interval_seconds"] for p in points], [p["goodput"] for p in points]
        ends = [[p["goodput"] - p["goodput_low"] for p in points]]
        ends.append([p["goodput_high"] - p["goodput"] for p in points])
        right.errorbar(x, y, yerr=ends, marker="o", label=recovery)
        if recovery == "restart":
            right.plot(x, [p["expected_goodput"] for p in points], "k--", label="Daly's formula")
    right.axvline(best["Young"], color="gray", linestyle=":", label="Young's interval")
    right.set(xscale="log", xlabel="checkpoint interval, s", ylabel="goodput (simulated)")
    right.legend(fontsize=8)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def arguments_of(command: Sequence[str] | None) -> argparse.Namespace:
    """As given, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", default="10,100,1000,10000", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="of each rank")
    parser.add_argument("--compute-ms", type=float, default=500.0, help="of a step, mean")
    parser.add_argument("--exchange-ms", type=float, default=20.0, help="that does not hide")
    parser.add_argument("--jitter", type=float, default=0.05, help="standard deviation by mean")
    parser.add_argument("--slow-factor", type=float, default=1.5, help="of slow ranks' times")
    parser.add_argument("--nodes", type=int, default=1250, help="that may fail; 8 ranks each")
    parser.add_argument("--node-mtbf-days", type=float, default=LLAMA_3_DAYS)
    parser.add_argument("--checkpoint-seconds", type=float, default=60.0)
    parser.add_argument("--restart-seconds", type=float, default=600.0)
    parser.add_argument("--elastic-seconds", type=float, default=5.0)
    parser.add_argument("--repair-minutes", type=float, default=60.0)
    parser.add_argument("--days", type=float, default=30.0, help="of work in each run")
    parser.add_argument("--seeds", type=int, default=8, help="runs for each interval")
    parser.add_argument("--out", type=Path, help="folder for JSON, CSV and a plot")
    arguments = parser.parse_args(command)
    counts = arguments.ranks.split(",")
    if not all(text.isdecimal() and int(text) > 1 for text in counts):
        parser.error("--ranks must be whole numbers above 1, with commas")
    arguments.ranks = [int(text) for text in counts]
    for name, value in vars(arguments).items():
        if isinstance(value, int | float) and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if arguments.steps < 2:
        parser.error("--steps must be 2 or more")
    if arguments.slow_factor <= 1:
        parser.error("--slow-factor must be above 1")
    return arguments


def main(command: Sequence[str] | None = None) -> None:
    """Simulate."""
    arguments = arguments_of(command)
    try:
        records = [*straggler_records(arguments), *failure_records(arguments)]
    except Error as error:
        raise SystemExit(str(error)) from error
    best = best_of(records, arguments)
    print(shown(records, best))
    if arguments.out:
        given = {k: v for k, v in vars(arguments).items() if k != "out"}
        write(arguments.out, "simulate", records, simulated=True, arguments=given, best=best)
        if importlib.util.find_spec("matplotlib") is not None:
            plot(records, best, arguments.out / "simulate.png")


if __name__ == "__main__":
    main()
