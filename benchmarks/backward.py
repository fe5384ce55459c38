"""What waiting for the average at the end of backward() costs, against waiting in step().

    mpirun -np 2 --bind-to none python -m benchmarks.backward

Steps of one model in turn, in the same processes, so that what else the machine does falls on
both alike: as they are (exchanged while ``backward()`` computes, awaited at its end), and with the
pass within ``no_sync()``, so that all is exchanged and awaited in ``step()``. Shown is the median
of the ratio of neighbouring steps, and its quartiles; below 1, waiting at the end is the faster.
"""

from __future__ import annotations

import contextlib
import time

import torch
from torch import nn

import hpctrain
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count
from benchmarks.harness.rounds import in_turn, quartiles
from hpctrain.process import cores

WARM_UP = 3


def measure(arguments: Arguments) -> Report | None:
    """Measure on every rank; rank 0 reports."""
    width = arguments.width
    world = hpctrain.init()
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*layers)
    optimizer = hpctrain.strategy("horovod", world).wrap(
        model, torch.optim.SGD(model.parameters(), lr=1e-3)
    )
    x = torch.randn(128, width)

    def seconds(*, in_step: bool) -> float:
        world.comm.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        with optimizer.no_sync() if in_step else contextlib.nullcontext():
            model(x).square().mean().backward()
        optimizer.step()
        return time.perf_counter() - start

    cases = {"at_end": lambda: seconds(in_step=False), "later": lambda: seconds(in_step=True)}
    times = in_turn(cases, arguments.pairs, warm_up=WARM_UP)
    ratios = [one / other for one, other in zip(times["at_end"], times["later"], strict=True)]
    low, median, high = quartiles(ratios)
    record = {
        "width": width,
        "ranks": world.size,
        "oversubscribed": world.launch.local_size > cores(),
        "pairs": arguments.pairs,
        "ratio_median": median,
        "ratio_quartiles": [low, high],
    }
    text = f"{world.size} ranks, {arguments.pairs} pairs: {median:.3f} ({low:.3f} to {high:.3f})"
    report = None if world.rank else Report([record], text)
    world.comm.close()
    return report


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--pairs", type=count, default=30)
    add("--width", type=count, default=512, help="of the model's layers")


BENCHMARK = Benchmark("backward", __doc__, measure, options=options, quick={"pairs": 5})

if __name__ == "__main__":
    BENCHMARK.run()
