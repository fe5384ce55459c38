"""The training step of hpctrain's strategies beside those of others.

    python -m benchmarks.peers --out results

Trains ResNet-18 for CIFAR (11 million parameters, 8 images a rank) and a perceptron of 25 million
(32 vectors a rank) on 2 ranks, from the same weights, on the same batches, with the same optimizer;
both on this host, and on two emulated hosts with links of 1 Gbit/s (see ps_hosts.py; needs root),
each of which has its share of this host's cores.

- horovod, ps: hpctrain's strategies; ps has a server in every worker's process
- ddp: PyTorch's DistributedDataParallel, by gloo (nccl on GPUs); ddp_NN: with buckets of NN MB,
  by --cases
- stock_horovod: ``hvd.DistributedOptimizer``
- torch_rpc: a parameter server of PyTorch's RPC

See peers_cases.py for how. Every case runs in processes of its own once a round, the rounds go over
all cases in turn, in one order and then in the other. A step's time is the median of a process's
steps on its slowest rank. A ratio is one of two times within a round: above 1, the case is faster
than ddp. Shown are the median over rounds, the least and the largest. All cases are synchronous, so
all must come to the same losses and parameters; that is checked.

Prints a table; --out gets peers.json, peers.csv and plots (PNG, SVG). ``*``: more ranks than cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from benchmarks import ps_hosts
from benchmarks.harness.bars import at_least
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count, words, words_of
from benchmarks.harness.processes import Start, module, on_ranks, scratch, why_failed
from benchmarks.harness.rounds import Record, Round, compared, in_turn, record_of
from benchmarks.harness.tables import FOOTNOTE, by_group, say, table_of
from benchmarks.peers_cases import CASES
from benchmarks.peers_models import MODELS
from hpctrain.process import cores

RANKS = 2
HERE = "here"
TOLERANCE = 1e-4
BASE = "ddp"
TRAINED = "resnet18,mlp_25M"
COMPARED = "horovod,ps,ddp,stock_horovod,torch_rpc"
FIELDS = ("step_ms", "speed_over_ddp", "error")
BARS = (
    at_least("speed_over_ddp", 1.0, case="horovod", network=HERE),
    # Between hosts, where all wait for the network, uncompressed.
    at_least("speed_over_ddp", 1.02, case="horovod", network=lambda name: name != HERE),
    at_least("speed_over_ddp", 1.0, case="ps", network=lambda name: name != HERE),
)


@contextlib.contextmanager
def network(name: str) -> Iterator[tuple[Start, str]]:
    """Give what starts a command on all ranks, and whether each has cores of its own.

    Args:
        name: ``here``, or the Mbit/s of the links between emulated hosts.
    """
    if name == HERE:
        yield on_ranks(RANKS), "shared"
        return
    with ps_hosts.hosts(RANKS, float(name)) as cluster:
        yield lambda command, seconds: cluster.mpirun([1] * RANKS, command, seconds), "own"


def run_case(
    start: Start, own_cores: str, case: str, models: Sequence[str], steps: int, seconds: float
) -> dict[str, Round]:
    """Run a case in processes of its own.

    Args:
        start: Starts a command on all ranks.
        own_cores: ``own`` or ``shared``.
        case: Of ``CASES``.
        models: Of ``MODELS``, to be trained one after the other.
        steps: To be timed.
        seconds: A limit.

    Returns:
        By model: its step, its losses, and how far parameters moved.
    """
    with scratch() as folder:
        command = module("peers_cases", case, ",".join(models), str(steps), str(folder), own_cores)
        done = start(command, seconds)
        found: dict[str, Round] = {}
        for model in models:
            files = [folder / f"{model}.{rank}" for rank in range(RANKS)]
            if not all(file.with_name(f"{file.name}.json").exists() for file in files):
                found[model] = {"failed": why_failed(done)}
                continue
            ranks = [json.loads(file.with_name(f"{file.name}.json").read_text()) for file in files]
            found[model] = {
                "step_ms": max(statistics.median(each["times_ms"]) for each in ranks),
                "losses": np.mean([each["losses"] for each in ranks], axis=0),
                "moved": np.stack([np.load(file.with_name(f"{file.name}.npy")) for file in files]),
            }
    return found


def check_round(results: dict[str, Round]) -> None:
    """Mark the cases that came to other parameters or losses than most did in a round."""
    good = {name: each for name, each in results.items() if "failed" not in each}
    if not good:
        return
    moved = np.median([each["moved"] for each in good.values()], axis=0)
    losses = np.median([each["losses"] for each in good.values()], axis=0)
    for each in good.values():
        norm = np.linalg.norm(moved)
        each["error"] = float(np.linalg.norm(each.pop("moved") - moved) / norm)
        each["loss_error"] = float(np.max(np.abs(each.pop("losses") / losses - 1)))
        if not max(each["error"], each["loss_error"]) < TOLERANCE:
            each["failed"] = f"other parameters ({each['error']:g}), losses {each['loss_error']:g}"


def beside_ddp(variables: Record, rounds: Sequence[Round], base: Sequence[Round]) -> Record:
    """Return the record of a case.

    Args:
        variables: What sets it apart.
        rounds: What it gave.
        base: What ddp gave in the same rounds.
    """
    ratio = partial(compared, rounds, base, "speed_over_ddp")
    variables = {**variables, "oversubscribed": cores() < RANKS}
    return record_of(variables, ratio(lambda one, ddp: ddp["step_ms"] / one["step_ms"]))


def measure_on(name: str, arguments: Arguments) -> list[Record]:
    """Return the records of all cases and models on a network."""

    def told(number: int, case: str, result: dict[str, Round]) -> None:
        shown = {model: round(each.get("step_ms", 0), 1) for model, each in result.items()}
        took = time.perf_counter() - began
        say(f"{name}: round {number + 1}: {case}: {shown} ms a step ({took:.0f} s since the start)")

    began = time.perf_counter()
    with network(name) as (start, own_cores):
        cases = {
            case: partial(
                run_case, start, own_cores, case, arguments.models, arguments.steps,
                arguments.timeout,
            )
            for case in arguments.cases
        }  # fmt: skip
        results = in_turn(cases, arguments.rounds, turn_back=True, tell=told)
    where = "one host" if name == HERE else f"2 hosts, {float(name):g} Mbit/s"
    records = []
    for model in arguments.models:
        by_round = [
            {case: results[case][number][model] for case in results}
            for number in range(arguments.rounds)
        ]
        for each in by_round:
            check_round(each)
        base = [each.get(BASE, {"failed": "not run"}) for each in by_round]
        for case in results:
            variables = {"group": f"{model}, {where}", "case": case, "network": name}
            rounds = [each[case] for each in by_round]
            records.append(beside_ddp({**variables, "ranks": RANKS}, rounds, base))
    return records


def measure(arguments: Arguments) -> Report:
    """Measure all cases on all networks."""
    records = [record for name in arguments.networks for record in measure_on(name, arguments)]
    parts = [table_of(group, some, "case", FIELDS) for group, some in by_group(records)]
    return Report(records, "\n\n".join([*parts, FOOTNOTE]))


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--cases", type=words_of(CASES), default=COMPARED, help=", ".join(CASES))
    add("--models", type=words_of(MODELS), default=TRAINED, help=", ".join(MODELS))
    add("--networks", type=words, default=f"{HERE},1000",
        help=f"'{HERE}', or Mbit/s between emulated hosts")  # fmt: skip
    add("--rounds", type=count, default=2, help="of processes")
    add("--steps", type=count, default=4, help="timed in each process")
    add("--timeout", type=float, default=120, help="seconds for each process")


def check(parser: argparse.ArgumentParser, arguments: Arguments) -> None:
    """Leave out what needs root where there is none."""
    if os.geteuid() != 0 and set(arguments.networks) - {HERE}:
        print("emulated hosts: skipped; they need root", flush=True)
        arguments.networks = [HERE]


QUICK = {"cases": "horovod,ps,ddp", "models": "mlp_2M", "rounds": 1, "steps": 2}
BENCHMARK = Benchmark(
    "peers", __doc__, measure, options=options, check=check, bars=BARS, quick=QUICK
)

if __name__ == "__main__":
    BENCHMARK.run()
