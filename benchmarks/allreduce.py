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
2 (n - 1) / n, what each link carries, as nccl-tests have it. ``*``: more ranks than cores here.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import hpctrain
from benchmarks.output import table, write
from hpctrain.process import cores
from hpctrain.strategies.horovod import Horovod
from hpctrain.world.broadcast import broadcast_json
from hpctrain.world.world import World

SIZES = tuple(2**power for power in range(3, 27, 2))  # bytes
BUDGET_SECONDS = 0.05  # of a case's round: so many all-reduces as fit, one at least
MOST = 200
WARM_UP = 2

Case = Callable[[torch.Tensor], None]


def connect(world: World, how: Horovod) -> dict[str, Case]:
    """The cases that there are here, ready to use."""
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
    """For whatever a GPU still does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_round(case: Case, tensor: torch.Tensor, count: int, world: World) -> float:
    """Seconds of an all-reduce, on the slowest rank; the result is checked."""
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


def measure(world: World, cases: dict[str, Case], rounds: int) -> list[dict[str, Any]]:
    """All cases at all sizes: a record each."""
    records = []
    for size in SIZES:
        tensor = torch.ones(size // 4, device=world.device)
        # A sum of sums is a power of the world's size, and must stay below float32's largest.
        exact = int(120 / max(1.0, math.log2(world.size)))
        counts, times = {}, {name: [] for name in cases}
        for name, case in cases.items():
            probe = statistics.median(one_round(case, tensor, 1, world) for _ in range(3))
            counts[name] = max(1, min(MOST, exact, int(BUDGET_SECONDS / probe)))
        for number in range(rounds + WARM_UP):
            for name, case in cases.items():
                seconds = one_round(case, tensor, counts[name], world)
                if number >= WARM_UP:
                    times[name].append(seconds)
        for name, seconds in times.items():
            lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
            algbw = size / median / 1e9
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
                }
            )
    return records


def show(records: list[dict[str, Any]]) -> str:
    """A line for each case and size."""
    rows = [["bytes", "case", "median us", "quartiles us", "busbw GB/s"]]
    for record in records:
        star = "*" if record["oversubscribed"] else ""
        spread = f"{record['lower_us']:.1f}-{record['upper_us']:.1f}"
        rows.append(
            [str(record["bytes"]), record["case"], f"{record['time_us']:.1f}{star}", spread,
             f"{record['busbw_GBps']:.3f}"]
        )  # fmt: skip
    return table(rows)


def main() -> None:
    """Measure; rank 0 prints and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="folder for allreduce.json and allreduce.csv")
    options = parser.parse_args()
    world = hpctrain.init()
    how = Horovod(world)
    records = measure(world, connect(world, how), options.rounds)
    if world.rank == 0:
        print(show(records))
        if options.out is not None:
            write(options.out, "allreduce", records, launcher=world.launch.name)
    dist.destroy_process_group()
    world.comm.close()


if __name__ == "__main__":
    main()
