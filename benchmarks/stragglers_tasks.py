"""What stragglers.py trains: ready tasks whose steps take a given time, the more on one worker."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hpctrain.data.batch import Batch
from hpctrain.tasks import cifar10, digits
from hpctrain.tasks.task import Loss
from hpctrain.world.launcher import detect


@dataclass
class Emulated:
    """Emulates computing: a worker sleeps as long as its samples would take it.

    Few cores cannot compute for many workers at full speed; they can sleep for any number. In
    proportion to the samples, so that a slow worker with a smaller share is done sooner.
    Validation does not sleep.

    Attributes:
        sample_ms: What a training sample takes.
        slow_rank: The rank, as launched, that takes ``slow_factor`` times as long.
        begun: File to write the time of rank 0's first step to.
    """

    sample_ms: float = 0.0
    slow_rank: int = -1
    slow_factor: float = 1.0
    begun: str = ""

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the task's own loss, later."""
        if model.training:
            rank = detect().rank
            if rank == 0 and self.begun and not Path(self.begun).exists():
                Path(self.begun).write_text(repr(time.time()))
            factor = self.slow_factor if rank == self.slow_rank else 1.0
            time.sleep(batch.samples * self.sample_ms / 1e3 * factor)
        loss: Loss = super().loss(model, batch)  # type: ignore[misc]
        return loss


@dataclass
class Digits(Emulated, digits.Digits):
    """The ready task `digits`."""


@dataclass
class Cifar10(Emulated, cifar10.Cifar10):
    """The ready task `cifar10`."""
