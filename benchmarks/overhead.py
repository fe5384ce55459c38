"""What `hpctrain train` costs over the barest Horovod loop: same model, batch, and data in memory.

    python -m benchmarks.overhead --pairs 7

Each pair starts both under mpirun, one after the other (which is first alternates), and compares
seconds a step between two marks well after the start. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hpctrain import Batch, Task
from hpctrain.config import DataConfig, OptimizerConfig
from hpctrain.data.source import ArraySource, Source
from hpctrain.process import mpirun, run

SAMPLES = 4096
BATCH = {"convnet": 128, "perceptron": 128}
LR = 0.01
WARM = 50


def arrays(kind: str) -> dict[str, np.ndarray]:
    """Random samples in memory."""
    rng = np.random.default_rng(0)
    shape = (SAMPLES, 3, 32, 32) if kind == "convnet" else (SAMPLES, 256)
    x = rng.normal(size=shape).astype(np.float32)
    return {"x": x, "y": rng.integers(0, 10, SAMPLES)}


def build(kind: str) -> nn.Module:
    """CIFAR-10's network, of tens of milliseconds a step, or a perceptron of about one."""
    torch.manual_seed(0)
    if kind == "convnet":
        from hpctrain.tasks.cifar10 import Cifar10

        # Horovod's own broadcast refuses the channels-last layout that the task likes best.
        return Cifar10().model().to(memory_format=torch.contiguous_format)
    return nn.Sequential(
        nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The same for both."""
    return nn.functional.cross_entropy(model(x), y)


@dataclass
class Overhead(Task):
    """The task that `hpctrain train` is given."""

    kind: str = "convnet"

    def model(self) -> nn.Module:
        """See build."""
        return build(self.kind)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """See loss_of."""
        return loss_of(model, batch["x"], batch["y"])

    def optimizer(self, model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        """The bare loop's."""
        return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)

    def data(self, config: DataConfig) -> dict[str, Source]:
        """In memory."""
        return {"train": ArraySource(arrays(self.kind))}


def bare(kind: str, steps: int) -> None:
    """The barest hand-written loop, as Horovod's documentation has it."""
    import horovod.torch as hvd

    hvd.init()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // hvd.local_size()))
    data = arrays(kind)
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])
    model = build(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    per_rank = BATCH[kind] // hvd.size()
    mark = time.time()
    for step in range(1, WARM + steps + 1):
        if (step - 1) % (SAMPLES // BATCH[kind]) == 0:
            order = torch.randperm(SAMPLES)[hvd.rank() :: hvd.size()]
        start = (step - 1) % (SAMPLES // BATCH[kind]) * per_rank
        indices = order[start : start + per_rank]
        optimizer.zero_grad()
        loss_of(model, x[indices], y[indices]).backward()
        optimizer.step()
        if step == WARM:
            mark = time.time()
    if hvd.rank() == 0:
        print(json.dumps({"step_seconds": (time.time() - mark) / steps}))


def time_bare(kind: str, steps: int, ranks: int) -> float:
    """Seconds a step of the bare loop."""
    here = [sys.executable, "-m", "benchmarks.overhead", "--bare", "--model", kind]
    result = run([*mpirun(ranks), *here, "--steps", str(steps)], timeout_seconds=600)
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode != 0 or not lines:
        sys.exit(result.stdout)
    return float(json.loads(lines[-1])["step_seconds"])


def time_hpctrain(kind: str, steps: int, ranks: int) -> float:
    """Seconds a step of `hpctrain train`, by the times it records itself."""
    with tempfile.TemporaryDirectory() as folder:
        result = run(
            [
                *[*mpirun(ranks), "hpctrain", "train", "benchmarks/overhead.py:Overhead"],
                *["--steps", str(WARM + steps), "--batch-size", str(BATCH[kind])],
                *["--set", f"options.kind={kind}", "--out", f"{folder}/run"],
                *["--set", "checkpoint.every_steps=1000000", "--set", "schedule.name=constant"],
            ],
            timeout_seconds=600,
        )
        if result.returncode != 0:
            sys.exit(result.stdout)
        text = (Path(folder) / "run" / "metrics.jsonl").read_text()
    times = {
        line["step"]: line["time"]
        for line in map(json.loads, text.splitlines())
        if line["kind"] == "train"
    }
    return float(times[WARM + steps] - times[WARM]) / steps


def main() -> None:
    """Run the pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", choices=list(BATCH), default="convnet")
    parser.add_argument("--bare", action="store_true", help="(one rank of the bare loop)")
    arguments = parser.parse_args()
    steps = arguments.steps or {"convnet": 150, "perceptron": 2000}[arguments.model]
    if arguments.bare:
        bare(arguments.model, steps)
        return
    # Both build the same model on the same cores; MPI gives its core away when it waits, because
    # a rank computes and communicates on one (hpctrain sets this by itself).
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    ratios, hpctrain_ms, bare_ms = [], [], []
    for pair in range(arguments.pairs):
        order = [time_bare, time_hpctrain] if pair % 2 == 0 else [time_hpctrain, time_bare]
        seconds = {f: f(arguments.model, steps, arguments.ranks) for f in order}
        ours, theirs = seconds[time_hpctrain], seconds[time_bare]
        ratios.append(ours / theirs)
        hpctrain_ms.append(ours * 1e3)
        bare_ms.append(theirs * 1e3)
        print(f"pair {pair}: {ours * 1e3:.2f} ms / {theirs * 1e3:.2f} ms = {ratios[-1]:.4f}")
    print(
        json.dumps(
            {
                "schema": 1,
                "benchmark": "overhead",
                "model": arguments.model,
                "ranks": arguments.ranks,
                "global_batch": BATCH[arguments.model],
                "steps": steps,
                "pairs": arguments.pairs,
                "ratio_median": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "hpctrain_step_ms_median": statistics.median(hpctrain_ms),
                "bare_step_ms_median": statistics.median(bare_ms),
                "oversubscribed": arguments.ranks > (os.cpu_count() or 1),
                "torch": torch.__version__,
                "machine": platform.machine(),
                "cores": os.cpu_count(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
