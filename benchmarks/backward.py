"""What waiting for the average at the end of backward() costs, against waiting in step().

    mpirun -np 2 --bind-to none python -m benchmarks.backward

Steps of one model in turn, in the same processes, so that what else the machine does falls on
both alike: as they are (exchanged while ``backward()`` computes, awaited at its end), and with the
pass within ``no_sync()``, so that all is exchanged and awaited in ``step()``. Shown is the median
of the ratio of neighbouring steps, and its quartiles; below 1, waiting at the end is the faster.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time

import torch
from torch import nn

import hpctrain


def main() -> None:
    """Measure on every rank; rank 0 tells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--width", type=int, default=512)
    arguments = parser.parse_args()
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

    ratios = []
    for pair in range(arguments.pairs + 3):
        at_end, later = seconds(in_step=False), seconds(in_step=True)
        if pair >= 3:
            ratios.append(at_end / later)
    low, median, high = statistics.quantiles(ratios, n=4)
    if world.rank == 0:
        print(
            f"{world.size} ranks, {arguments.pairs} pairs: {median:.3f} ({low:.3f} to {high:.3f})"
        )
    world.comm.close()


if __name__ == "__main__":
    main()
