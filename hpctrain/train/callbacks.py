"""Callbacks told of a run's events: once each, on the ranks they are for; a failure names them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpctrain.config import RunConfig
from hpctrain.data.batch import Batch
from hpctrain.data.loader import Loader
from hpctrain.elastic.membership import Regroup
from hpctrain.errors import Error, PeerLost
from hpctrain.strategies.base import Strategy
from hpctrain.tasks.callbacks.base import Callback
from hpctrain.tasks.task import Task
from hpctrain.train.extent import Extent
from hpctrain.train.recorder import Recorder, Silent
from hpctrain.train.set_metrics import predicted
from hpctrain.train.setup import Setup
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World


class RunView:
    """What callbacks see of a run: see :class:`hpctrain.tasks.callbacks.base.Run`.

    Args:
        config: Resolved.
        task: The user's side.
        strategy: Connected.
        setup: What is trained.
        extent: How long the run is.
        folder: The run folder.

    Attributes:
        recorder: Takes what callbacks record.
        reason: Why a callback wants the run to end early; nothing: none does.
    """

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        strategy: Strategy,
        setup: Setup,
        extent: Extent,
        folder: Path,
    ) -> None:
        self.config = config
        self.task = task
        self.world = strategy.world
        self.folder = folder
        self.model = setup.state.model
        self.optimizer = setup.state.optimizer
        self.recorder: Recorder = Silent()
        self.reason = ""
        self._state = setup.state
        self._validation = setup.validation
        self._extent = extent

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._state.counters.step

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self._extent.steps

    @property
    def epochs(self) -> float:
        """Passes over the data done."""
        return self._extent.epochs

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last metrics."""
        return dict(self._state.counters.metrics)

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The best validation so far."""
        return self._state.counters.best

    def predictions(self, samples: int) -> tuple[Batch, dict[str, torch.Tensor]]:
        """Return the first validation samples, and what the task predicts of them, on the CPU.

        Args:
            samples: How many.

        Raises:
            Error: There are no validation samples, or ``predictions()`` is not defined.
        """
        known = self._validation
        if known is None:
            raise Error("there are no validation samples.", hint="have data() give some.")
        loader = Loader(
            known.source,
            min(samples, len(known.source)),
            world=World(ALONE),
            shuffle="none",
            transform=known.transform,
            workers=0,
        )
        batch = next(iter(loader))
        dtype = self.config.train.dtype
        return batch, predicted(self.task, self.model, batch, self.world.device, dtype)

    def record(self, values: Mapping[str, float], kind: str = "callback") -> None:
        """Have values recorded at this step.

        Args:
            values: Numbers by name.
            kind: Of the record.
        """
        self.recorder.write(kind, self.step, dict(values))

    def say(self, text: str) -> None:
        """Tell the person who watches.

        Args:
            text: A line.
        """
        self.recorder.say(text)

    def stop(self, reason: str) -> None:
        """Have the run end early, completed.

        Args:
            reason: Shown where rank 0 gives it.
        """
        self.reason = reason or "a callback asked for it"


class Callbacks:
    """A run's callbacks on this rank.

    An event is told once a step, though what is done after a step may be done again when a rank is
    lost: what was told is remembered, and goes with their state to a rank that joins.

    Args:
        callbacks: By name.
        run: What they see.
    """

    def __init__(self, callbacks: Mapping[str, Callback], run: RunView) -> None:
        self._callbacks = dict(callbacks)
        self.run = run
        self._started: set[str] = set()
        self._told: dict[str, int] = {}  # by event, the step

    @property
    def ends(self) -> str:
        """Why one wants the run to end early; nothing: none does."""
        return self.run.reason

    def start(self) -> None:
        """Tell this rank's callbacks that training begins."""
        for name in self._callbacks:
            self._start(name)

    def tell(self, event: str, model: nn.Module | None = None) -> None:
        """Tell of an event, once a step.

        Args:
            event: Its method.
            model: What ``run.model`` is meanwhile; None: the one that is trained.

        Raises:
            Error: A callback failed.
        """
        if not self._callbacks or self._told.get(event) == self.run.step:
            return
        self._told[event] = self.run.step
        trained, self.run.model = self.run.model, model or self.run.model
        try:
            for name in self._callbacks:
                self._start(name)  # this rank may be 0 only since another was lost
                self._call(name, event)
        finally:
            self.run.model = trained

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the callbacks that have one, by name."""
        return {
            name: callback.state_dict()
            for name, callback in self._callbacks.items()
            if hasattr(callback, "state_dict")
        }

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Go on from states; a callback without one in there begins anew.

        Args:
            states: As :meth:`state_dict` gave them, on rank 0.

        Raises:
            Error: One cannot be taken over.
        """
        for name, callback in self._callbacks.items():
            if name in states and hasattr(callback, "load_state_dict"):
                self._guarded(name, "load_state_dict", states[name])

    def share(self) -> dict[str, Any]:
        """Return what a rank that joins takes over: states, and which events were told."""
        return {"states": self.state_dict(), "told": dict(self._told)}

    def take_over(self, shared: Mapping[str, Any]) -> None:
        """Join where another rank is.

        Args:
            shared: As :meth:`share` gave it there.
        """
        self.load_state_dict(shared["states"])
        self._told = dict(shared["told"])

    def _start(self, name: str) -> None:
        if name not in self._started and self._is_told(name):
            self._started.add(name)
            self._call(name, "on_start")

    def _call(self, name: str, event: str) -> None:
        if self._is_told(name):
            self._guarded(name, event, self.run)

    def _is_told(self, name: str) -> bool:
        return self._callbacks[name].ranks == "all" or self.run.world.leads

    def _guarded(self, name: str, method: str, argument: Any) -> None:
        try:
            getattr(self._callbacks[name], method)(argument)
        except (PeerLost, Regroup):
            raise
        except Exception as error:
            what, hint = f"{type(error).__name__}: {error}", "its traceback is above."
            if isinstance(error, Error):
                what, hint = error.message, error.hint
            else:
                at = error.__traceback__
                shown = traceback.format_exception(type(error), error, at and at.tb_next)
                print("".join(shown), end="", file=sys.stderr, flush=True)
            raise Error(
                f"callback '{name}' failed in {method}() at step {self.run.step} on rank "
                f"{self.run.world.rank}: {what}",
                hint=hint,
            ) from error
