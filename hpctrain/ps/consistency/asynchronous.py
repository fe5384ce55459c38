"""Asynchronous training: nobody waits for anybody (Dean et al., NIPS 2012)."""

from __future__ import annotations

import math
from collections.abc import Iterable

from hpctrain.ps.consistency.base import Consistency, Schedule
from hpctrain.ps.consistency.schedules import Bounded


class Asynchronous(Consistency):
    """``async``: each push is applied when it comes, and answered at once."""

    name = example = "async"
    lr_by_delay = True
    advised = True

    @property
    def staleness(self) -> float:
        """The bound on staleness: none."""
        return math.inf

    def schedule(self, workers: Iterable[int]) -> Schedule:
        """Return a schedule that updates with single pushes, without a bound."""
        return Bounded(workers)
