"""Stale synchronous parallel: a bound on staleness (Ho et al., NIPS 2013)."""

from __future__ import annotations

from collections.abc import Iterable

from hpctrain.ps.consistency.base import Consistency, Schedule
from hpctrain.ps.consistency.schedules import Bounded


class BoundedStaleness(Consistency):
    """``ssp:S``: each push is applied when it comes; nobody gets more than S clocks ahead.

    Without shares by speed all would, once S clocks ahead, go at the slowest worker's pace.
    """

    name = "ssp"
    example = "ssp:3"
    takes_number = True
    shares = "speed"
    lr_by_delay = True
    advised = True

    @property
    def staleness(self) -> float:
        """The bound on staleness: S clocks."""
        return self.number

    def schedule(self, workers: Iterable[int]) -> Schedule:
        """Return a schedule that updates with single pushes, within a bound."""
        return Bounded(workers, self.number)
