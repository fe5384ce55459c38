"""Learning rates that one of torch's schedulers gives, as a part of the train state."""

from __future__ import annotations

import copy
import warnings
from typing import Any, cast

from hpctrain.errors import Error
from hpctrain.optim.named import PLATEAU, Scheduler

_RATES = {"initial_lr", "max_lr", "min_lr"}
"""What schedulers note in the groups when they are made, besides the bounds of momentum."""


class Scheduling:
    """Moves a scheduler on to where the run is, and applies its rates.

    The scheduler is not stepped once a step: it is moved to a *count*, which is a function of the
    step or the epoch. So it stands where the run stands on every rank, also where steps went by
    without it, or a step is taken anew.

    Args:
        scheduler: Of the plain optimizer, newly made.
        made: What it was made with; empty where the task has made it.
        every: ``step`` or ``epoch``.
        warmup: Steps of the warm-up, for which a scheduler that counts steps waits.
    """

    def __init__(
        self, scheduler: Scheduler, made: dict[str, Any], every: str = "step", warmup: int = 0
    ) -> None:
        self.scheduler = scheduler
        self._made = dict(sorted(made.items()))
        self._every = every
        self._warmup = warmup
        self._count = 0
        self._rates = self._read()
        self._before: tuple[int, dict[str, Any]] | None = None
        self._noted = [{k: v for k, v in group.items() if k != "params"} for group in self._groups]

    @property
    def by_metric(self) -> bool:
        """Whether it wants the monitored metric, after each validation."""
        return isinstance(self.scheduler, PLATEAU)

    def apply(self, step: int, epoch: int, scale: float = 1.0) -> None:
        """Give the optimizer the rates of a step.

        Args:
            step: The step to come, counted from 0.
            epoch: Epochs that are whole.
            scale: Multiplies the rates, where a world that has changed takes other batches.
        """
        if not self.by_metric:
            self._advance(epoch if self._every == "epoch" else step - self._warmup)
        scale *= min(1.0, (step + 1) / self._warmup) if self._warmup else 1.0
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate * scale

    def validated(self, metric: float, step: int) -> None:
        """Tell a scheduler that wants it the monitored metric.

        Args:
            metric: The same on every rank.
            step: After which it was measured. Measured once more, where a rank was lost meanwhile,
                the last value counts.
        """
        if not self.by_metric:
            return
        if self._before is not None and self._before[0] == step:
            self.load_state_dict(self._before[1])
        self._before = (step, copy.deepcopy(self.state_dict()))
        self._step(metric)

    def state_dict(self) -> dict[str, Any]:
        """Return the schedule's state as plain values, and what the scheduler's own is made of."""
        return {
            "name": type(self.scheduler).__name__,
            "made": self._made,
            "every": self._every,
            "count": self._count,
            "rates": list(self._rates),
            "scheduler": self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a state, where it is of such a scheduler; else it moves to where the run is.

        A scheduler of torch takes its options from a state. So where those have changed, as where
        a run is to be longer, the new ones count: its steps are made good.

        Args:
            state: Of a checkpoint; None: it has none.
        """
        if state is None or not self._goes_on_from(state):
            for group, noted in zip(self._groups, self._noted, strict=True):
                group.update({k: v for k, v in noted.items() if k in _RATES or k not in group})
            return
        self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
        self._count, self._rates = state["count"], list(state["rates"])

    def _goes_on_from(self, state: dict[str, Any]) -> bool:
        """Whether a state is of such a scheduler, made with the same."""
        if state["name"] != type(self.scheduler).__name__:
            return False
        return self.by_metric or (state["made"], state["every"]) == (self._made, self._every)

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.scheduler.optimizer.param_groups

    def _read(self) -> list[float]:
        return [float(group["lr"]) for group in self._groups]

    def _advance(self, count: int) -> None:
        while self._count < count:
            self._step()
            self._count += 1

    def _step(self, metric: float | None = None) -> None:
        for group, rate in zip(self._groups, self._rates, strict=True):
            group["lr"] = rate
        with warnings.catch_warnings():
            # Where servers update parameters, it sees no step of the optimizer.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            try:
                if metric is None:
                    self.scheduler.step()
                else:
                    cast(PLATEAU, self.scheduler).step(metric)
            except ValueError as error:  # OneCycleLR, after its last step
                raise Error(
                    f"scheduler {type(self.scheduler).__name__}: {error}.",
                    hint="have it reach to the end of the run.",
                ) from error
        self._rates = self._read()
