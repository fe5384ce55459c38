"""The digits, with a fault on one rank at a step of it."""

import os
import signal
import time
from dataclasses import dataclass

from hpctrain.launcher import detect
from hpctrain.tasks.digits import Digits


@dataclass
class Faulty(Digits):
    """Digits that fail.

    Attributes:
        fault: ``error``, ``kill``, ``hang`` or nothing.
        rank: Whose.
        at: After so many batches.
        pause: Seconds that each batch takes besides.
    """

    fault: str = ""
    rank: int = 1
    at: int = 30
    pause: float = 0.0

    def loss(self, model, batch):
        self.at -= 1
        time.sleep(self.pause)
        if self.at == 0 and detect().rank == self.rank:
            if self.fault == "error":
                raise ValueError("a bad sample")
            if self.fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(model, batch)
