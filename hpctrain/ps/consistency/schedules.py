"""The schedules of hpctrain's own modes: updates by rounds, and updates of single pushes."""

from __future__ import annotations

import math
from collections.abc import Iterable

from hpctrain.ps.consistency.base import Action, Grant, Schedule


class Rounds(Schedule):
    """Each update is the mean of a round's pushes: of all workers, or of a quorum of them.

    With backup workers the quorum is all but the stragglers: a push that comes after its round was
    closed is dropped (Chen et al., "Revisiting Distributed Synchronous SGD", 2016). Pushes are
    added up in the order of the workers' numbers, so that sums do not depend on who was faster.

    Args:
        workers: Who takes part.
        backup: How many pushes of a round need not be waited for.
    """

    def __init__(self, workers: Iterable[int], backup: int = 0) -> None:
        super().__init__(workers)
        self._backup = backup

    def next(self) -> Action | None:
        """Drop what is late, close the round if it is full, or answer a worker."""
        if self._unanswered:
            worker = next(iter(self._unanswered))
            del self._unanswered[worker]
            return Grant(worker)
        for worker, (_, meant) in self._waiting.items():
            if meant < self.version:
                self._count(worker)
                return Grant(worker, late=True)
        # Who waits with a push of a later round (of other slices) has none for this one: a worker
        # that was lost half way may have closed this round elsewhere. It is closed empty then.
        if self._waiting and len(self._waiting) >= len(self.applied) - self._backup:
            ready = [w for w, (_, meant) in self._waiting.items() if meant == self.version]
            return self._apply(sorted(ready))
        return None


class Bounded(Schedule):
    """Each push is an update; a worker waits that is more than ``bound`` clocks ahead.

    Stale synchronous parallel (Ho et al., NIPS 2013): a worker may begin its step c where
    ``c - slowest <= bound``. Without a bound, asynchronous.

    Args:
        workers: Who takes part.
        bound: The most clocks ahead.

    Attributes:
        bound: The most clocks ahead, from now on.
    """

    def __init__(self, workers: Iterable[int], bound: float = math.inf) -> None:
        super().__init__(workers)
        self.bound = bound

    def next(self) -> Action | None:
        """Apply pushes in order of arrival, then answer workers within the bound."""
        if self._waiting:
            return self._apply([next(iter(self._waiting))])
        slowest = self.slowest
        for worker in self._unanswered:
            if self.applied.get(worker, slowest) - slowest <= self.bound:
                del self._unanswered[worker]
                return Grant(worker)
        return None
