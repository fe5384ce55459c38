"""Synchronous data parallel training: every update is the mean over all workers."""

from __future__ import annotations

from collections.abc import Iterable

from hpctrain.ps.consistency.base import Consistency, Schedule
from hpctrain.ps.consistency.schedules import Rounds


class Sync(Consistency):
    """``sync``: each step waits for every worker, the straggler too."""

    name = example = "sync"
    rounds = True
    synchronous = True

    def schedule(self, workers: Iterable[int]) -> Schedule:
        """Return a schedule of rounds of all workers."""
        return Rounds(workers)
