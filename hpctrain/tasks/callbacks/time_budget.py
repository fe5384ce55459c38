"""A run that ends, completed, when its time is used up."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from hpctrain.tasks.callbacks.base import Callback, Run


@dataclass
class TimeBudget(Callback):
    """Ends the run early when it has trained for so long, over all its launches.

    The run is completed then: ``result.json`` says ``stopped_early``, and ``--resume`` does not go
    on with it.

    Args:
        minutes: From the first step on.
    """

    minutes: float
    _spent: float = field(default=0.0, init=False, repr=False)  # before this launch, in seconds
    _began: float | None = field(default=None, init=False, repr=False)

    def on_start(self, run: Run) -> None:
        """Begin to count the seconds of this process.

        Args:
            run: The run.
        """
        self._began = time.monotonic()

    def on_step(self, run: Run) -> None:
        """Look at the clock.

        Args:
            run: The run.
        """
        if self.seconds >= 60 * self.minutes:
            run.stop(f"the time budget of {self.minutes:g} minutes is used up")

    @property
    def seconds(self) -> float:
        """Spent on training so far."""
        return self._spent + (time.monotonic() - self._began if self._began is not None else 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds spent so far, over all of the run's processes in turn."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what has been spent.

        Args:
            state: As :meth:`state_dict` gave it.
        """
        self._spent = float(state["seconds"])
