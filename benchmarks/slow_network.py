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

import time
from functools import partial

from benchmarks.harness.bars import at_least
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, words, words_of
from benchmarks.harness.rounds import Record, Round, compared, in_turn, record_of
from benchmarks.harness.tables import by_group, say, table_of
from benchmarks.peers import RANKS, network, run_case
from benchmarks.peers_cases import CASES
from benchmarks.peers_models import MODELS

MODEL = "mlp_25M"
BASE = "ddp"
COMPARED = (
    "ddp,ddp_fp16,ddp_powersgd:1,ddp_powersgd:4,"
    "horovod,horovod_fp16,horovod_powersgd:1,horovod_powersgd:4"
)
BARS = (
    at_least("speed_over_ddp", 1.6, network="1000", model=MODEL, case="horovod_fp16"),
    at_least("speed_over_ddp", 4.0, network="1000", model=MODEL, case="horovod_powersgd:1"),
    at_least("speed_over_ddp", 2.0, network="1000", model=MODEL, case="horovod_powersgd:4"),
)


def measure_on(name: str, arguments: Arguments) -> list[Record]:
    """Run all cases on one network, in one order and then in the other."""

    def told(number: int, case: str, result: Round) -> None:
        step, took = result.get("step_ms", 0), time.perf_counter() - began
        say(f"{name}: round {number + 1}: {case}: {step:.1f} ms a step ({took:.0f} s since start)")

    began = time.perf_counter()
    with network(name) as (start, own_cores):

        def step_of(case: str) -> Round:
            how = (arguments.steps, arguments.timeout)
            model = arguments.model
            found = run_case(start, own_cores, case, [model], *how)[model]
            return {key: found[key] for key in ("step_ms", "failed") if key in found}

        runs = {case: partial(step_of, case) for case in arguments.cases}
        results = in_turn(runs, arguments.rounds, turn_back=True, tell=told)
    group = f"{arguments.model}, {RANKS} hosts, {float(name):g} Mbit/s"
    base = results.get(BASE, [{"failed": "not run"}] * arguments.rounds)
    return [
        record_of(
            {
                "group": group,
                "network": name,
                "model": arguments.model,
                "case": case,
                "ranks": RANKS,
            },
            compared(
                rounds, base, "speed_over_ddp", lambda one, ddp: ddp["step_ms"] / one["step_ms"]
            ),
        )
        for case, rounds in results.items()
    ]


def measure(arguments: Arguments) -> Report:
    """Measure all cases on all networks."""
    records = [record for name in arguments.networks for record in measure_on(name, arguments)]
    fields = ("step_ms", "speed_over_ddp")
    tables = [table_of(group, some, "case", fields) for group, some in by_group(records)]
    return Report(records, "\n\n".join(tables))


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--cases", type=words_of(CASES), default=COMPARED, help=", ".join(CASES))
    add("--networks", type=words, default="100,1000", help="Mbit/s between emulated hosts")
    add("--model", choices=tuple(MODELS), default=MODEL, help="the bars are of the default's")
    add("--rounds", type=count, default=1, help="of processes")
    add("--steps", type=count, default=2, help="timed in each process")
    add("--timeout", type=float, default=120, help="seconds for each process")


QUICK = {"networks": "1000", "cases": "ddp,horovod,horovod_fp16", "steps": 1}
BENCHMARK = Benchmark("slow_network", __doc__, measure, options=options, bars=BARS, quick=QUICK)

if __name__ == "__main__":
    BENCHMARK.run()
