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
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np

from benchmarks import ps_hosts
from benchmarks.output import plots, spread, spread_of, table, write
from benchmarks.peers_cases import CASES
from benchmarks.peers_models import MODELS
from hpctrain.errors import Error
from hpctrain.process import cores, mpirun, run

ROOT = Path(__file__).parents[1]
RANKS = 2
HERE = "here"
TOLERANCE = 1e-4
BASE = "ddp"
TRAINED = "resnet18,mlp_25M"
COMPARED = "horovod,ps,ddp,stock_horovod,torch_rpc"
TARGET = 1.0
Result = dict[str, Any]
Start = Callable[[Sequence[str], float], CompletedProcess[str]]


@contextlib.contextmanager
def network(name: str) -> Iterator[tuple[Start, str]]:
    """What starts a command on all ranks, and whether each has cores of its own.

    Args:
        name: ``here``, or the Mbit/s of the links between emulated hosts.
    """
    if name == HERE:
        yield (
            lambda command, seconds: run(
                [*mpirun(RANKS), *command], timeout_seconds=seconds, cwd=ROOT
            ),
            "shared",
        )
        return
    with ps_hosts.hosts(RANKS, float(name)) as cluster:
        yield lambda command, seconds: cluster.mpirun([1] * RANKS, command, seconds), "own"


def run_case(
    start: Start, own_cores: str, case: str, models: Sequence[str], steps: int, seconds: float
) -> dict[str, Result]:
    """A case in processes of its own: by model, its step, losses, and how far parameters moved."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.peers_cases", case, ",".join(models)]
        done = start([*command, str(steps), folder, own_cores], seconds)
        found: dict[str, Result] = {}
        for model in models:
            files = [Path(folder) / f"{model}.{rank}" for rank in range(RANKS)]
            if not all(file.with_name(f"{file.name}.json").exists() for file in files):
                why = done.stdout.split("-" * 40)[0].strip()[-300:]  # without what mpirun says
                found[model] = {"failed": f"exit code {done.returncode}: {why}"}
                continue
            ranks = [json.loads(file.with_name(f"{file.name}.json").read_text()) for file in files]
            found[model] = {
                "step_ms": max(statistics.median(each["times_ms"]) for each in ranks),
                "losses": np.mean([each["losses"] for each in ranks], axis=0),
                "moved": np.stack([np.load(file.with_name(f"{file.name}.npy")) for file in files]),
            }
    return found


def check(results: dict[str, Result]) -> None:
    """Mark the cases that came to other parameters or losses than most did."""
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


def record_of(
    variables: dict[str, Any], rounds: Sequence[Result], base: Sequence[Result]
) -> Result:
    """Of a case: independent variables first; medians over rounds, least and largest."""
    record = {**variables, "oversubscribed": cores() < RANKS}
    failures = [each["failed"] for each in rounds if "failed" in each]
    good = [
        {**each, "speed_over_ddp": other["step_ms"] / each["step_ms"]}
        if "failed" not in other
        else each
        for each, other in zip(rounds, base, strict=True)
        if "failed" not in each
    ]
    record["rounds"] = len(good)
    for key in ("step_ms", "speed_over_ddp", "error", "loss_error"):
        record |= spread_of(key, [each[key] for each in good if key in each])
    return {**record, "failed": failures} if failures else record


def measure(options: argparse.Namespace) -> list[Result]:
    """All cases on all networks."""
    records = []
    for name in options.networks:
        rounds: list[dict[str, dict[str, Result]]] = []
        with network(name) as (start, own_cores):
            for number in range(options.rounds):
                found = {}
                for case in options.cases[:: -1 if number % 2 else 1]:
                    began = time.perf_counter()
                    found[case] = run_case(
                        start, own_cores, case, options.models, options.steps, options.timeout
                    )
                    shown = {m: round(r.get("step_ms", 0), 1) for m, r in found[case].items()}
                    took = time.perf_counter() - began
                    line = f"{name}: round {number + 1}: {case}: {shown} ms a step ({took:.0f} s)"
                    print(line, file=sys.stderr, flush=True)
                rounds.append(found)
        for model in options.models:
            by_case = [{case: found[case][model] for case in options.cases} for found in rounds]
            for each in by_case:
                check(each)
            where = "one host" if name == HERE else f"2 hosts, {float(name):g} Mbit/s"
            base = [each.get(BASE, {"failed": "not run"}) for each in by_case]
            for case in options.cases:
                variables = {"group": f"{model}, {where}", "case": case, "ranks": RANKS}
                records.append(record_of(variables, [each[case] for each in by_case], base))
    return records


def verdicts(records: Sequence[Result]) -> list[Result]:
    """Whether horovod is as fast as the fastest of ddp's cases."""
    found = []
    for record in records:
        if record["case"] == "horovod" and "speed_over_ddp" in record:
            value = record["speed_over_ddp"]
            found.append(
                {"group": record["group"], "case": "horovod", "speed_over_ddp": round(value, 3),
                 "target": f">= {TARGET:g}", "met": value >= TARGET}
            )  # fmt: skip
    return found


def show(records: Sequence[Result]) -> str:
    """A table for each model and network."""
    parts = []
    for group in dict.fromkeys(record["group"] for record in records):
        rows = [[group, "step ms", "speed over ddp", "error"]]
        for record in (each for each in records if each["group"] == group):
            star = "*" * record["oversubscribed"]
            cells = [spread(record, key) for key in ("step_ms", "speed_over_ddp", "error")]
            rows.append([record["case"] + star, *cells])
        parts.append(table(rows))
    return "\n\n".join(parts)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--cases", type=lambda text: text.split(","), default=COMPARED, help=", ".join(CASES)
    )
    parser.add_argument(
        "--models", type=lambda text: text.split(","), default=TRAINED, help=", ".join(MODELS)
    )
    parser.add_argument(
        "--networks", type=lambda text: text.split(","), default=f"{HERE},1000",
        help=f"'{HERE}', or Mbit/s between emulated hosts",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=2, help="of processes")
    parser.add_argument("--steps", type=int, default=4, help="timed in each process")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for each process")
    parser.add_argument("--out", type=Path, help="folder for JSON, CSV and plots")
    options = parser.parse_args()
    if unknown := {*options.cases} - {*CASES} | {*options.models} - {*MODELS}:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    if os.geteuid() != 0 and set(options.networks) - {HERE}:
        print("emulated hosts: skipped; they need root", flush=True)
        options.networks = [HERE]
    try:
        records = measure(options)
    except Error as error:
        parser.error(str(error))
    targets = verdicts(records)
    print(show(records))
    for each in targets:
        print(*each.values())
    if options.out is not None:
        write(options.out, "peers", records, targets=targets, steps=options.steps)
        plots(options.out, "peers")


if __name__ == "__main__":
    main()
