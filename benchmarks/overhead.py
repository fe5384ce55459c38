"""What `hpctrain train` costs over the barest Horovod loop: same model, batch, and data in memory.

    mpirun -np 2 --bind-to none python -m benchmarks.overhead

Both train in the same processes, a block of steps of the one and then of the other, so that
whatever else the machine does falls on both alike; each such pair of blocks gives a ratio. The
trainer runs as it does for `hpctrain train`, with loader, metrics and recorder. Rank 0 reports.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Horovod's own default, which the bare loop would have; hpctrain alone would set 0.
os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", str(64 * 2**20))

import numpy as np
import torch
from torch import nn

from benchmarks.harness.bars import at_most
from benchmarks.harness.command import Add, Arguments, Benchmark, Report, count
from benchmarks.harness.processes import scratch
from benchmarks.harness.rounds import quartiles
from benchmarks.harness.tables import table
from hpctrain import Batch, Task, init, strategy
from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.config import DataConfig, OptimizerConfig, read_environment, resolve
from hpctrain.data.source import ArraySource, Source
from hpctrain.process import cores
from hpctrain.train.loggers import loggers_of
from hpctrain.train.loop import Trainer
from hpctrain.train.recorder import RunRecorder, Silent

SAMPLES = 4096
BATCH = 128
LR = 0.01
BLOCK_STEPS = {"convnet": 10, "perceptron": 200}


def arrays(kind: str) -> dict[str, np.ndarray]:
    """Return random samples in memory."""
    rng = np.random.default_rng(0)
    shape = (SAMPLES, 3, 32, 32) if kind == "convnet" else (SAMPLES, 256)
    return {"x": rng.normal(size=shape).astype(np.float32), "y": rng.integers(0, 10, SAMPLES)}


def build(kind: str) -> nn.Module:
    """Return CIFAR-10's network, of some 100 ms a step, or a perceptron of a few."""
    torch.manual_seed(0)
    if kind == "convnet":
        from hpctrain.tasks.cifar10 import Cifar10

        # Horovod's own broadcast refuses the channels-last layout that the task likes best.
        return Cifar10().model().to(memory_format=torch.contiguous_format)
    return nn.Sequential(
        nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the loss, the same for both."""
    return nn.functional.cross_entropy(model(x), y)


@dataclass
class Overhead(Task):
    """The task that the trainer is given."""

    kind: str

    def model(self) -> nn.Module:
        """Return the model; see build."""
        return build(self.kind)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss; see loss_of."""
        return loss_of(model, batch["x"], batch["y"])

    def optimizer(self, model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        """Return the optimizer, the bare loop's."""
        return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)

    def data(self, config: DataConfig) -> dict[str, Source]:
        """Return the samples, in memory."""
        return {"train": ArraySource(arrays(self.kind))}


def bare(kind: str) -> Iterator[None]:
    """Run the barest hand-written loop, as Horovod's documentation has it; a step each time."""
    import horovod.torch as hvd

    data = arrays(kind)
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])
    model = build(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    per_rank = BATCH // hvd.size()
    while True:
        order = torch.randperm(SAMPLES)[hvd.rank() :: hvd.size()]
        for start in range(0, len(order) - per_rank + 1, per_rank):
            indices = order[start : start + per_rank]
            optimizer.zero_grad()
            loss_of(model, x[indices], y[indices]).backward()
            optimizer.step()
            yield


class Alternating:
    """A recorder that, after each block of the trainer's steps, runs one of the bare loop."""

    def __init__(self, recorder: Any, kind: str, block: int) -> None:
        self.recorder = recorder
        self.block = block
        self.bare = bare(kind)
        self.seconds: list[tuple[float, float]] = []
        self.mark = time.perf_counter()

    def advance(self, step: int) -> None:
        """Called after every step of the trainer."""
        self.recorder.advance(step)
        if step % self.block == 0:
            middle = time.perf_counter()
            for _ in itertools.islice(self.bare, self.block):
                pass
            end = time.perf_counter()
            self.seconds.append((middle - self.mark, end - middle))
            self.mark = time.perf_counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recorder, name)


def measure(arguments: Arguments) -> Report | None:
    """Run the pairs of blocks on every rank; rank 0 reports."""
    block = BLOCK_STEPS[arguments.model]
    config = resolve(
        [
            (
                "benchmark",
                {
                    "train": {"steps": block * (arguments.pairs + 1), "batch_size": BATCH},
                    "checkpoint": {"every_steps": 10**9},
                    "schedule": {"name": "constant"},
                },
            ),
            ("environment", read_environment()),
        ]
    )
    world = init()
    how = strategy("horovod", world)  # also where there is one rank
    with scratch() as folder:
        store = CheckpointStore(folder, keep=1)
        trainer = Trainer(config, Overhead(arguments.model), how, store)
        trainer.restore(None)
        loggers = loggers_of([], tensorboard=True)
        recorder = Silent() if world.rank else RunRecorder(folder, trainer.steps, loggers)
        alternating = Alternating(recorder, arguments.model, block)
        trainer.run(alternating)
    pairs = alternating.seconds[1:]  # the first warms up
    low, median, high = quartiles([ours / theirs for ours, theirs in pairs])
    record = {
        "model": arguments.model,
        "ranks": world.size,
        "global_batch": BATCH,
        "block_steps": block,
        "oversubscribed": world.launch.local_size > cores(),
        "pairs": len(pairs),
        "ratio_median": median,
        "ratio_quartiles": [low, high],
        "hpctrain_step_ms": 1e3 * statistics.median(p[0] for p in pairs) / block,
        "bare_step_ms": 1e3 * statistics.median(p[1] for p in pairs) / block,
    }
    rows = [[key.replace("_", " "), str(value)] for key, value in record.items()]
    report = None if world.rank else Report([record], table(rows))
    world.comm.close()
    return report


def options(add: Add) -> None:
    """Add the benchmark's own options."""
    add("--pairs", type=count, default=40)
    add("--model", choices=list(BLOCK_STEPS), default="convnet")


BARS = (at_most("ratio_median", 1.02, model="perceptron", ranks=(1, 2)),)
QUICK = {"pairs": 3, "model": "perceptron"}
BENCHMARK = Benchmark("overhead", __doc__, measure, options=options, bars=BARS, quick=QUICK)

if __name__ == "__main__":
    BENCHMARK.run()
