"""The training step over slow links: compressed gradients beside DDP and DDP's own hooks.

    python -m benchmarks.slow_network --out results

Trains a perceptron of 25 million parameters (32 vectors a rank) on two emulated hosts, one rank
each, with links of 100 Mbit/s and of 1 Gbit/s (see ps_hosts.py; needs root). Each host has its
share of this host's cores.

- horovod: hpctrain's all-reduce; horovod_C: with that compression
- ddp: PyTorch's DistributedDataParallel, by gloo; ddp_C: with its own hook

Cases and processes are those of peers.py. A step's time is the median of a process's steps on its
slowest rank, after those that the hooks make dense. A ratio is one of two times within a round:
above 1, the case is faster than ddp. Shown are the median over rounds, the least and the largest.
Compressed cases come to other parameters; what that costs is a matter of training, not of steps.

Prints a table; --out gets slow_network.json, slow_network.csv and plots (PNG, SVG).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.output import plots, spread, spread_of, table, write
from benchmarks.peers import RANKS, network, run_case
from benchmarks.peers_cases import CASES
from hpctrain.errors import Error

Result = dict[str, Any]
MODEL = "mlp_25M"
BASE = "ddp"
COMPARED = (
    "ddp,ddp_fp16,ddp_powersgd:1,ddp_powersgd:4,"
    "horovod,horovod_fp16,horovod_powersgd:1,horovod_powersgd:4"
)
TARGETS: Mapping[tuple[str, str], float] = {
    ("1000", "horovod_fp16"): 1.6,
    ("1000", "horovod_powersgd:1"): 4.0,
    ("1000", "horovod_powersgd:4"): 2.0,
}
"""Least speed over ddp, by network and case."""


def measure_on(name: str, options: argparse.Namespace) -> list[Result]:
    """Run all cases on one network, in one order and then in the other."""
    rounds: list[dict[str, Result]] = []
    with network(name) as (start, own_cores):
        for number in range(options.rounds):
            found = {}
            for case in options.cases[:: -1 if number % 2 else 1]:
                began = time.perf_counter()
                steps = (options.steps, options.timeout)
                found[case] = run_case(start, own_cores, case, [MODEL], *steps)[MODEL]
                took, step = time.perf_counter() - began, found[case].get("step_ms", 0)
                line = f"{name}: round {number + 1}: {case}: {step:.1f} ms a step ({took:.0f} s)"
                print(line, file=sys.stderr, flush=True)
            rounds.append(found)
    return [record_of(name, case, rounds) for case in options.cases]


def record_of(name: str, case: str, rounds: Sequence[Mapping[str, Result]]) -> Result:
    """Return a case's record: independent variables, then medians, the least and the largest.

    Args:
        name: Of the network.
        case: Whose.
        rounds: What all cases gave in each.
    """
    group = f"{MODEL}, {RANKS} hosts, {float(name):g} Mbit/s"
    record: Result = {"group": group, "network": name, "case": case, "ranks": RANKS}
    good = [each for each in rounds if "failed" not in each[case]]
    record |= spread_of("step_ms", [each[case]["step_ms"] for each in good])
    ratios = [
        each[BASE]["step_ms"] / each[case]["step_ms"]
        for each in good
        if "step_ms" in each.get(BASE, {})
    ]
    record |= spread_of("speed_over_ddp", ratios)
    failed = [each[case]["failed"] for each in rounds if "failed" in each[case]]
    return {**record, "failed": failed} if failed else record


def verdicts(records: Sequence[Result]) -> list[Result]:
    """Return what was to be reached, and whether it was."""
    found = []
    for record in records:
        target = TARGETS.get((record["network"], record["case"]))
        if target is not None and ("speed_over_ddp" in record or "failed" in record):
            value = record.get("speed_over_ddp", 0.0)
            found.append(
                {"group": record["group"], "case": record["case"],
                 "speed_over_ddp": round(value, 3), "target": f">= {target:g}",
                 "met": value >= target}
            )  # fmt: skip
    return found


def show(records: Sequence[Result]) -> str:
    """Return a table for each network."""
    parts = []
    for group in dict.fromkeys(record["group"] for record in records):
        rows = [[group, "step ms", "speed over ddp"]]
        for record in (each for each in records if each["group"] == group):
            cells = [spread(record, key) for key in ("step_ms", "speed_over_ddp")]
            rows.append([record["case"], *cells])
        parts.append(table(rows))
    return "\n\n".join(parts)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--cases", type=lambda text: text.split(","), default=COMPARED, help=", ".join(CASES)
    )
    parser.add_argument(
        "--networks", type=lambda text: text.split(","), default="100,1000",
        help="Mbit/s between emulated hosts",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=1, help="of processes")
    parser.add_argument("--steps", type=int, default=2, help="timed in each process")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each process")
    parser.add_argument("--out", type=Path, help="folder for JSON, CSV and plots")
    options = parser.parse_args()
    if unknown := {*options.cases} - {*CASES}:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    try:
        records = [record for name in options.networks for record in measure_on(name, options)]
    except Error as error:
        parser.error(str(error))
    targets = verdicts(records)
    print(show(records))
    for each in targets:
        print(*each.values())
    if options.out is not None:
        write(options.out, "slow_network", records, targets=targets, steps=options.steps)
        plots(options.out, "slow_network")


if __name__ == "__main__":
    main()
