"""All-reduce side by side: Horovod, MPI by mpi4py, and torch.distributed; latency and bandwidth.

    mpirun -np 2 --bind-to none python -m benchmarks.allreduce --out results
    horovodrun --gloo -np 2 python -m benchmarks.allreduce --out results

All cases run in the same processes: for each size the rounds go over all cases in turn, so that
whatever else the machine does falls on all alike. A round is a few all-reduces in place, in
float32, between barriers; its time is that of the slowest rank. What comes out is checked.

- horovod: MPI operations under MPI, Gloo's under horovodrun --gloo, NCCL's on GPUs
- mpi: ``MPI.COMM_WORLD.Allreduce`` of mpi4py (CPU, under MPI)
- torch: ``torch.distributed.all_reduce`` by gloo, or by nccl on GPUs

Shown are the median over rounds and its quartiles; algbw is bytes / time, busbw that times
2 (n - 1) / n, what each link carries, as nccl-tests have it. Ratios to mpi are of the same round.
``*``: more ranks than cores here.
"""

from __future__ import annotations

import math
import os
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import hpctrain
from benchmarks.harness.bars import at_most
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count
from benchmarks.harness.rounds import in_turn, quartiles, spread_of
from benchmarks.harness.tables import FOOTNOTE, table
from hpctrain.process import cores
from hpctrain.strategies.horovod import Horovod
from hpctrain.world.broadcast import broadcast_json
from hpctrain.world.world import World

SIZES = tuple(2**power for power in range(3, 27, 2))  # bytes
BUDGET_SECONDS = 0.05  # of a case's round: so many all-reduces as fit, one at least
MOST = 200
WARM_UP = 2

Case = Callable[[torch.Tensor], None]
BARS = (
    # What waits for small buckets is Horovod's own thread, and not the exchange.
    at_most("time_us", 120, case="horovod", ranks=2, bytes=lambda size: size <= 2**17),
    at_most("over_mpi", 1.1, case="horovod", bytes=lambda size: size >= 2**21),
)


def connect(world: World, how: Horovod) -> dict[str, Case]:
    """Return the cases that there are here, ready to use."""
    hvd = how._hvd
    gpu = world.device.type == "cuda"
    found: dict[str, Case] = {
        "horovod": lambda tensor: hvd.allreduce_(tensor, op=hvd.Sum, name="benchmark")
    }
    if world.launch.name != "horovodrun" and not gpu:
        from mpi4py import MPI

        found["mpi"] = lambda tensor: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, tensor.numpy())
    with socket.socket() as probe:
        probe.bind(("", 0))
        address = [socket.gethostname(), probe.getsockname()[1]]
    host, port = broadcast_json(world.comm, address)
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    dist.init_process_group("nccl" if gpu else "gloo", rank=world.rank, world_size=world.size)
    found["torch"] = dist.all_reduce
    return found


def wait(device: torch.device) -> None:
    """Wait for whatever a GPU still does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_round(case: Case, tensor: torch.Tensor, count: int, world: World) -> float:
    """Return the seconds of an all-reduce on the slowest rank; the result is checked."""
    tensor.fill_(1.0)
    world.comm.barrier()
    wait(world.device)
    began = time.perf_counter()
    for _ in range(count):
        case(tensor)
    wait(world.device)
    seconds = (time.perf_counter() - began) / count
    expected = float(world.size) ** count
    if not torch.allclose(tensor, torch.full_like(tensor, expected), rtol=1e-4):
        raise AssertionError(f"{tensor.numel() * 4} bytes: {tensor.max()} is not {expected}")
    times = torch.zeros(world.size, dtype=torch.float64)
    times[world.rank] = seconds
    world.comm.all_reduce(times)
    return float(times.max())


def measured(world: World, cases: dict[str, Case], rounds: int) -> list[dict[str, Any]]:
    """Return a record for each case at each size.

    Args:
        world: Whose ranks call this together.
        cases: To be measured in turn.
        rounds: Of each size.
    """
    records = []
    for size in SIZES:
        tensor = torch.ones(size // 4, device=world.device)
        # A sum of sums is a power of the world's size, and must stay below float32's largest.
        exact = int(120 / max(1.0, math.log2(world.size)))
        runs = {}
        for name, case in cases.items():
            probe = statistics.median(one_round(case, tensor, 1, world) for _ in range(3))
            some = max(1, min(MOST, exact, int(BUDGET_SECONDS / probe)))
            runs[name] = partial(one_round, case, tensor, some, world)
        times = in_turn(runs, rounds, warm_up=WARM_UP)
        for name, seconds in times.items():
            lower, median, upper = quartiles(seconds)
            algbw = size / median / 1e9
            ratios = [one / mpi for one, mpi in zip(seconds, times.get("mpi", []), strict=False)]
            records.append(
                {
                    "operation": "allreduce",
                    "case": name,
                    "bytes": size,
                    "ranks": world.size,
                    "oversubscribed": world.launch.local_size > cores(),
                    "time_us": round(1e6 * median, 2),
                    "lower_us": round(1e6 * lower, 2),
                    "upper_us": round(1e6 * upper, 2),
                    "algbw_GBps": round(algbw, 4),
                    "busbw_GBps": round(algbw * 2 * (world.size - 1) / world.size, 4),
                    "rounds": rounds,
                    **spread_of("over_mpi", ratios),
                }
            )
    return records


def show(records: list[dict[str, Any]]) -> str:
    """Return a table with a line for each case and size."""
    rows = [["bytes", "case", "median us", "quartiles us", "busbw GB/s", "of mpi's time"]]
    for record in records:
        star = "*" if record["oversubscribed"] else ""
        spread = f"{record['lower_us']:.1f}-{record['upper_us']:.1f}"
        ratio = f"{record['over_mpi']:.2f}" if "over_mpi" in record else ""
        rows.append(
            [str(record["bytes"]), record["case"], f"{record['time_us']:.1f}{star}", spread,
             f"{record['busbw_GBps']:.3f}", ratio]
        )  # fmt: skip
    return f"{table(rows)}\n{FOOTNOTE}"


def measure(arguments: Arguments) -> Report | None:
    """Measure on every rank; rank 0 reports."""
    world = hpctrain.init()
    how = Horovod(world)
    records = measured(world, connect(world, how), arguments.rounds)
    more = {"launcher": world.launch.name}
    report = None if world.rank else Report(records, show(records), more)
    dist.destroy_process_group()
    world.comm.close()
    return report


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--rounds", type=count, default=9)


BENCHMARK = Benchmark(
    "allreduce", __doc__, measure, options=options, bars=BARS, quick={"rounds": 2}
)

if __name__ == "__main__":
    BENCHMARK.run()
