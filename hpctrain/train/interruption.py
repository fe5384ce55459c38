"""Asking a run to stop: by a signal, as schedulers do before they take nodes away, or by a file.

Some rank hears of it; all have to stop at the same step. They look at it together, a small sum over
ranks every ``LOOK_SECONDS`` or so; how many steps that is they agree on at the look before.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from hpctrain.errors import Error
from hpctrain.run_folder import STOP
from hpctrain.world.world import Communicator

LOOK_SECONDS = 1.0


class Look(NamedTuple):
    """What all ranks have seen together.

    Attributes:
        stop: Whether to stop after this step.
        waiting: Whether somebody waits to join.
        ends: Whether a callback wants the run to end early, completed.
    """

    stop: bool
    waiting: bool
    ends: bool


class Interruption:
    """Whether this run is to stop early.

    Args:
        folder: The run folder; None: no file is looked for.
        name: Of the signal, such as ``USR1``; None: none is listened to.
        every_steps: Steps between looks; None: about a second's. Ranks that may join later cannot
            know what the others agreed on.

    Raises:
        Error: There is no such signal.
    """

    def __init__(
        self,
        folder: Path | None = None,
        name: str | None = None,
        every_steps: int | None = None,
    ) -> None:
        number = number_of(name) if name is not None else None
        self._file = folder / STOP if folder is not None else None
        self._heard = False
        self._began = time.monotonic()
        self._looked = 0  # the step of the last look
        self._every = every_steps
        self._next = 1  # the step of the next one
        # A second signal, such as one while the checkpoint is being saved, changes nothing.
        if number is not None:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True

    def heard(self) -> bool:
        """Whether this rank knows of it."""
        return self._heard or (self._file is not None and self._file.exists())

    def look(
        self,
        comm: Communicator,
        step: int,
        waiting: Callable[[], bool] = lambda: False,
        *,
        ends: bool = False,
    ) -> Look:
        """Look together, if it is time to; every rank asks, after every step.

        Args:
            comm: Of the ranks.
            step: Steps done, the same on all ranks.
            waiting: Whether somebody waits to join, as far as this rank knows.
            ends: Whether a callback of this rank wants the run to end early.
        """
        if comm.size == 1 and ends:  # whom else to wait for?
            return Look(self.heard(), waiting(), True)
        if step < self._next if self._every is None else step % self._every:
            return Look(False, False, False)
        now = time.monotonic()
        speed = (step - self._looked) / max(now - self._began, 1e-6)
        seen = [float(self.heard()), float(waiting()), speed, 1.0, float(ends)]
        told = torch.tensor(seen, dtype=torch.float64)
        comm.all_reduce(told)
        # A few fast steps say little: the next ones may take long.
        most = 2 * (step - self._looked)
        self._looked, self._began = step, now
        self._next = step + max(1, min(most, int(LOOK_SECONDS * float(told[2] / told[3]))))
        return Look(bool(told[0] > 0), bool(told[1] > 0), bool(told[4] > 0))

    def restart(self, step: int) -> None:
        """Look again after this step, as do all ranks of a world that was formed anew."""
        self._looked, self._began, self._next = step, time.monotonic(), step

    def noticed(self) -> bool:
        """Whether this rank knows of it, asked after each step; it looks now and then."""
        now = time.monotonic()
        if not self._heard and now - self._began < LOOK_SECONDS:
            return False
        self._began = now
        return self.heard()


def number_of(name: str) -> int:
    """Return a signal's number.

    Args:
        name: With or without ``SIG``, in any case: ``USR1``, ``sigterm``.

    Raises:
        Error: There is no such signal.
    """
    try:
        return signal.Signals["SIG" + name.upper().removeprefix("SIG")].value
    except KeyError:
        raise Error(
            f"there is no signal {name}.", hint="USR1, USR2, TERM and HUP are usual."
        ) from None
