"""The metrics of a run: what was computed in each step, and how fast, over all ranks."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from hpctrain.data.loader import Loader
from hpctrain.mesh.passes import Computed
from hpctrain.strategies.base import DistributedOptimizer, Strategy
from hpctrain.train.metrics import Meter, total
from hpctrain.train.recorder import Recorder
from hpctrain.train.state import TrainState
from hpctrain.train.step_timer import PARTS, StepTimer


class _Mark(NamedTuple):
    """The state of things at a log line, from which the next one counts."""

    seconds: float
    step: int
    samples: int
    input_wait_seconds: float
    lost: int
    parts: dict[str, float]


class RunMetrics:
    """Adds up what the steps of a run compute, and records it now and then.

    Args:
        strategy: Connected.
        state: What is trained.
        timer: Knows where the time of steps went.

    Attributes:
        train: Means over the training samples since the last log line.
        validation: Means over the validation samples.
        consumed: Training samples of this rank.
        start: What a rank has to know that joins later, besides what the metrics are called.
    """

    def __init__(self, strategy: Strategy, state: TrainState, timer: StepTimer) -> None:
        self._strategy = strategy
        self._world = strategy.world
        self._state = state
        self._timer = timer
        self.train = Meter()
        self.validation = Meter()
        self.consumed = 0
        self.start: dict[str, Any] = {}
        self._lost = 0  # samples of all ranks whose shards cannot be read
        self._mark = _Mark(0.0, 0, 0, 0.0, 0, {})
        self._next_mark: _Mark | None = None

    @property
    def names(self) -> list[list[str]]:
        """What the metrics of training and of validation are called, as far as is known."""
        return [self.train.names, self.validation.names]

    @names.setter
    def names(self, names: list[list[str]]) -> None:
        self.train.names, self.validation.names = names

    def begin(self) -> None:
        """Begin to time steps: from here the first log line counts."""
        self._mark = self._now()

    def count(self, computed: list[Computed]) -> None:
        """Count a step in: add its metrics, after dropping those that were logged already.

        Args:
            computed: Means and weights, of each pass of the step.
        """
        self.train.settle()
        self._mark, self._next_mark = self._next_mark or self._mark, None
        for each in computed:
            self.train.add(each.means, each.weight)
            self.consumed += each.samples

    def remember(self) -> None:
        """Have the world keep what a rank has to know that joins later."""
        if self._world.leads:
            self._world.comm.remember({**self.start, "metrics": self.names})

    def log(self, optimizer: DistributedOptimizer, recorder: Recorder, epochs: float) -> None:
        """Record the train metrics since the last time, over all ranks.

        Args:
            optimizer: The wrapped one.
            recorder: Takes them.
            epochs: Passes over the samples done so far.
        """
        counters = self._state.counters
        in_step = self._strategy.agreement.in_step
        known = self.names
        metrics = self.train.read(self._world.comm, in_step=in_step)
        if self.names != known:
            self.remember()
        counters.metrics |= {f"train_{name}": value for name, value in metrics.items()}
        for name in ("nonfinite_losses", "skipped_steps"):
            if count := getattr(counters, name):
                counters.metrics[name] = count
        now, before = self._now(), self._mark
        self._next_mark = now
        seconds, steps = now.seconds - before.seconds, now.step - before.step
        sums = total(
            self._world.comm,
            {
                "input_wait_seconds": now.input_wait_seconds - before.input_wait_seconds,
                "samples": float(now.samples - before.samples),
                "lost_samples": float(now.lost - before.lost),
                "steps": float(steps),
                **{part: now.parts[part] - before.parts[part] for part in PARTS},
            },
            in_step=in_step,
        )
        statistics = optimizer.statistics()
        if not sums:  # another rank has them
            return
        waited = sums["input_wait_seconds"]
        values: dict[str, Any] = {"epoch": round(epochs, 3), **metrics}
        values |= rates_of(optimizer)
        for name in ("nonfinite_losses", "skipped_steps"):
            if name in counters.metrics:
                values[name] = counters.metrics[name]
        if counters.loss_scale:
            values["loss_scale"] = counters.loss_scale
        if optimizer.grad_norm is not None:
            values["grad_norm"] = float(optimizer.grad_norm)
        values["samples_per_second"] = sums["samples"] / seconds
        # Means over ranks: how long a step stood still for its batch.
        values["input_wait_ms"] = 1e3 * waited / sums["steps"]
        values["input_wait_share"] = waited / self._world.comm.size / seconds
        self._lost += int(sums["lost_samples"])
        if self._lost:
            values["lost_samples"] = self._lost
            counters.metrics["lost_samples"] = self._lost
        recorder.write("train", counters.step, values)
        # Means over the steps of all ranks.
        timing = {f"{part}_ms": 1e3 * sums[part] / sums["steps"] for part in PARTS}
        recorder.write("timing", counters.step, timing)
        if statistics:
            recorder.write("exchange", counters.step, statistics)

    def _now(self) -> _Mark:
        loader: Loader = self._state.loader
        step = self._state.counters.step
        parts = self._timer.read()
        return _Mark(time.monotonic(), step, self.consumed, loader.wait_seconds, loader.lost, parts)


def rates_of(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rates of an optimizer, as they are recorded.

    Args:
        optimizer: Of one parameter group or several.

    Returns:
        ``lr`` of the first group; where others have another, ``lr_1``, ``lr_2``, ... of those.
    """
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if len(set(rates)) == 1:
        return {"lr": rates[0]}
    return {"lr": rates[0], **{f"lr_{n}": rate for n, rate in enumerate(rates) if n}}
