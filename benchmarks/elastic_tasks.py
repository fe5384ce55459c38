"""What elastic_hosts.py trains: ready tasks, whose processes write when steps end."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from hpctrain.config import DataConfig, OptimizerConfig
from hpctrain.data.source import Source
from hpctrain.tasks import cifar10, digits
from hpctrain.world.launcher import detect

FOLDER = "times"


class Times:
    """A process's file of times: first who it is, then a line for each step that has ended.

    The clock is that of the machine, the same for all of its processes and hosts in namespaces.

    Args:
        run: The run folder.
        rank: Of this process, when it starts.
    """

    def __init__(self, run: Path, rank: int) -> None:
        folder = run / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        host = os.uname().nodename
        self._file = (folder / f"{host}-{os.getpid()}.jsonl").open("a", buffering=1)
        self._file.write(json.dumps({"host": host, "rank": rank}) + "\n")

    def step(self) -> None:
        """Write that a step has ended."""
        self._file.write(f"{time.monotonic()}\n")


class Process(NamedTuple):
    """What a process wrote: its host, its first rank, and when its steps ended, in seconds."""

    host: str
    rank: int
    ends: list[float]


def read(run: Path) -> list[Process]:
    """Return what all processes of a run have written so far."""
    processes = []
    for path in sorted((run / FOLDER).glob("*.jsonl")):
        head, *lines = path.read_text().split("\n")[:-1] or [""]
        if head:
            processes.append(Process(**json.loads(head), ends=[float(line) for line in lines]))
    return processes


@dataclass
class Timed:
    """A task whose steps are written down.

    Attributes:
        times: The run folder.
    """

    times: str = ""

    def optimizer(self, model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        """Return the task's own optimizer, with a hook after each step."""
        optimizer: torch.optim.Optimizer = super().optimizer(model, config)  # type: ignore[misc]
        times = Times(Path(self.times), detect().rank)

        def ended(*arguments: Any) -> None:
            times.step()

        optimizer.register_step_post_hook(ended)
        return optimizer

    def data(self, config: DataConfig) -> dict[str, Source]:
        """Return the task's samples to train on alone; there is no validation to wait for."""
        return {"train": super().data(config)["train"]}  # type: ignore[misc]


@dataclass
class Digits(Timed, digits.Digits):
    """The ready task `digits`."""


@dataclass
class Cifar10(Timed, cifar10.Cifar10):
    """The ready task `cifar10`."""
