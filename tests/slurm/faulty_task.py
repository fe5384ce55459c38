"""The digits, with a fault on one rank at a step of it."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from hpctrain.tasks.digits import Digits
from hpctrain.world.launcher import detect

HOLD_SECONDS = 0.5


@dataclass
class Faulty(Digits):
    """Digits that fail.

    Attributes:
        fault: ``error``, ``kill``, ``hang`` or nothing.
        rank: Whose.
        at: After so many batches.
        pause: Seconds that each batch takes besides.
        hold: A file; after ``at`` batches each takes half a second, until the file is there and has
            ``key`` in it so many ``times``. So a run is not over before what is to happen to it.
    """

    fault: str = ""
    rank: int = 1
    at: int = 30
    pause: float = 0.0
    hold: str = ""
    key: str = ""
    times: int = 1

    def loss(self, model, batch):
        self.at -= 1
        time.sleep(self.pause)
        if self.hold and self.at < 0:
            self._hold()
        if self.at == 0 and detect().rank == self.rank:
            if self.fault == "error":
                raise ValueError("a bad sample")
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch)

    def _hold(self):
        until = time.monotonic() + HOLD_SECONDS
        while time.monotonic() < until:
            if self._told():
                self.hold = ""
                break
            time.sleep(0.02)

    def _told(self):
        file = Path(self.hold)
        if not file.exists():
            return False
        return not self.key or file.read_text().count(f'"{self.key}":') >= self.times
