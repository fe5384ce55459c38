"""The training steps that model.py measures, on the ranks of an MPI job.

    mpirun -np 4 python -m benchmarks.model_steps '{"cases": ["horovod", "ps:1"], ...}'

Strategies take turns in the same processes. What is trained are layers of equal size, each of which
sleeps in forward and in backward instead of computing (emulated compute): so any number of ranks
computes at full speed on few cores, and gradients become ready layer by layer. Exchange and update
are hpctrain's own, and real. How long a rank sleeps differs from step to step as ``jitter`` says.

Every rank times its steps in windows; a window's time is the mean over steps and workers.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import hpctrain
from hpctrain.config import HorovodConfig, PsConfig
from hpctrain.costmodel.measure import codec
from hpctrain.costmodel.strategies import Compression, StrategyCost, strategy_of
from hpctrain.strategies.horovod import Horovod
from hpctrain.strategies.parameter_server import ParameterServer
from hpctrain.world import pmix
from hpctrain.world.world import Unconnected, World

WARM_UP = 2
WINDOWS = 3
ALONE = 20
TIMEOUT_SECONDS = 120.0


class Job(NamedTuple):
    """What is trained, and for how long it is measured.

    Attributes:
        cases: Strategies as they are typed.
        bytes: Of the gradients.
        layers: Of equal size.
        buckets: Of Horovod.
        forward_seconds: Of a step, emulated.
        backward_seconds: The same.
        jitter: Standard deviation of both, by their mean; lognormal.
        window_seconds: A window is of as many steps as take about so long.
        least_steps: But of so many at least.
        seed: Of the times.
    """

    cases: list[str]
    bytes: int
    layers: int
    buckets: int
    forward_seconds: float
    backward_seconds: float
    jitter: float
    window_seconds: float
    least_steps: int = 3
    seed: int = 0


class _Slept(torch.autograd.Function):
    """The identity, whose backward takes time."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, stack: Stack) -> torch.Tensor:
        ctx.stack = stack
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        stack = ctx.stack
        time.sleep(stack.pace * stack.job.backward_seconds / stack.job.layers)
        return gradient, None


class Stack(nn.Module):
    """Layers that sleep.

    Args:
        job: How many, how large, how long.
        seed: Of how long it takes this rank.
    """

    def __init__(self, job: Job, seed: int) -> None:
        super().__init__()
        self.job = job
        self.pace = 1.0
        self._random = random.Random(seed)
        size = job.bytes // 4 // job.layers
        self.layers = nn.ParameterList(nn.Parameter(torch.zeros(size)) for _ in range(job.layers))

    def forward(self) -> torch.Tensor:
        """Return a number that depends on all parameters."""
        variance = math.log1p(self.job.jitter**2)
        self.pace = self._random.lognormvariate(-variance / 2, math.sqrt(variance))
        time.sleep(self.pace * self.job.forward_seconds)
        value = torch.zeros(())
        for layer in self.layers:
            # In backward, a layer sleeps first; then its gradient is there.
            value = _Slept.apply(value + layer.mean(), self)
        return value


def connect(world: World, strategy: StrategyCost, job: Job) -> Horovod | ParameterServer:
    """Connect the strategy in hpctrain."""
    world.comm = Unconnected(world.launch)
    if strategy.kind == "horovod":
        buckets = HorovodConfig(bucket_bytes=job.bytes // job.buckets)
        return Horovod(world, buckets, timeout_seconds=TIMEOUT_SECONDS)
    config = PsConfig(
        servers=strategy.servers,
        colocate=strategy.colocated,
        consistency=strategy.consistency,
        compression=strategy.compression.name,
    )
    return ParameterServer(world, config, timeout_seconds=TIMEOUT_SECONDS)


def measure_alone(job: Job) -> dict[str, Any]:
    """Measure a rank's step without exchange, while the others do the same."""
    model = Stack(job, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    marks = []
    for _ in range(WARM_UP + ALONE):
        optimizer.zero_grad()
        moments = [time.perf_counter()]
        loss = model()
        moments.append(time.perf_counter())
        loss.backward()
        moments.append(time.perf_counter())
        optimizer.step()
        moments.append(time.perf_counter())
        marks.append([after - before for before, after in itertools.pairwise(moments)])
    forward, backward, update = map(statistics.mean, zip(*marks[WARM_UP:], strict=True))
    return {
        "strategy": "single",
        "forward_seconds": forward,
        "backward_seconds": backward,
        "update_seconds": update,
    }


def measure(world: World, name: str, job: Job) -> dict[str, Any]:
    """Measure steps by a strategy; the first rank that works returns what it has to say of them."""
    strategy = strategy_of(name, Compression)
    how = connect(world, strategy, job)
    if isinstance(how, ParameterServer) and how.serves:
        how.serve()
        return {}
    model = Stack(job, seed=1000 * job.seed + world.rank)
    optimizer = how.wrap(model, torch.optim.SGD(model.parameters(), lr=1e-3))

    def steps(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
        return (time.perf_counter() - began) / count

    mean = torch.tensor(steps(WARM_UP), dtype=torch.float64)
    world.comm.all_reduce(mean)
    mean /= world.comm.size
    count = max(job.least_steps, round(job.window_seconds / float(mean)))
    if not how.agreement.in_step:  # nor do they begin together
        time.sleep(random.Random(world.rank).random() * float(mean))
        steps(WARM_UP)
    optimizer.statistics()
    busy = _busy()
    windows = torch.tensor([steps(count) for _ in range(WINDOWS)], dtype=torch.float64)
    busy = tuple(after - before for after, before in zip(_busy(), busy, strict=True))
    optimizer.finish()
    world.comm.all_reduce(windows)
    windows /= world.comm.size
    comm, workers = world.comm, world.comm.size
    first = world.comm.rank == 0
    seconds = windows.tolist()
    comm.close()
    if not first:
        return {}
    return {
        "strategy": name,
        "workers": workers,
        "seconds": statistics.median(seconds),
        "seconds_low": min(seconds),
        "seconds_high": max(seconds),
        "steps": WINDOWS * count,
        "cores_busy": busy[0] / sum(busy),
        **codec_of(strategy.compression.name, job),
    }


def codec_of(name: str, job: Job) -> dict[str, float]:
    """Measure what a codec does to a layer's gradients, on this rank while the others wait."""
    if name == "none":
        return {}
    found = codec(name, job.bytes / job.layers)
    return {
        "compression_ratio": found.ratio,
        "encode_seconds_per_byte": found.encode_seconds_per_byte,
        "decode_seconds_per_byte": found.decode_seconds_per_byte,
    }


def _busy() -> tuple[float, float]:
    """Return all cores' jiffies of work and of idling, since the machine was started."""
    line, *_ = Path("/proc/stat").read_text(encoding="ascii").splitlines()
    user, nice, system, idle, wait, *other = map(float, line.split()[1:9])
    return user + nice + system + sum(other), idle + wait


def main() -> None:
    """Measure all cases; rank 0 of each prints a line of JSON."""
    from mpi4py import MPI  # not before: strategies have settings that MPI reads at its start

    job = Job(**json.loads(sys.argv[1]))
    world = hpctrain.init()
    torch.set_num_threads(1)
    pmix.fence(TIMEOUT_SECONDS)
    alone = measure_alone(job)
    if world.launch.rank == 0:
        print(json.dumps(alone), flush=True)
    for name in job.cases:
        MPI.COMM_WORLD.Barrier()
        if result := measure(world, name, job):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
