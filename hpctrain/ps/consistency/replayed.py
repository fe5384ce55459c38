"""The schedule of a replay: what a recorded run did, whatever its consistency."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hpctrain.errors import Error
from hpctrain.ps.consistency.base import Action, Grant, Schedule

SAME_STEPS = "replay with the number of steps and the settings of the recorded run."


class Replayed(Schedule):
    """The updates of a recorded run in their order, and each answer between the same two of them.

    A slice stays at a version until everybody has been answered who was answered there, and goes on
    with the pushes that came then. So whatever the recorded run did can be repeated without anybody
    waiting for what comes later.

    Args:
        workers: Who takes part.
        pushes: Version, worker, clock and version read of each push that was applied, by version.
        answers: Version, worker and clock of its last push, of each answer, in their order.
    """

    def __init__(
        self,
        workers: Iterable[int],
        pushes: Sequence[tuple[int, int, int, int]],
        answers: Sequence[tuple[int, int, int]],
    ) -> None:
        super().__init__(workers)
        # Some updates are of no push: rounds that all workers with backup had left behind.
        last = max((version for version, *_ in answers), default=0)
        self._updates: list[list[tuple[int, int]]] = [[] for _ in range(last)]
        self._answers: list[list[tuple[int, int]]] = [[] for _ in range(last + 1)]
        for version, worker, clock, _ in pushes:
            self._updates[version].append((worker, clock))
        for version, worker, clock in answers:
            self._answers[version].append((worker, clock))
        self._missing = {(worker, clock) for _, worker, clock in answers if clock >= 0}

    def push(self, worker: int, clock: int, round_: int) -> None:
        """Take in a gradient that also came in the recorded run.

        Args:
            worker: Whose.
            clock: The worker's step.
            round_: The update it is meant for.

        Raises:
            Error: It did not in the recorded run.
        """
        if (worker, clock) not in self._missing:
            raise Error(
                f"step {clock} of worker {worker} is none of the recorded run's.", hint=SAME_STEPS
            )
        self._missing.remove((worker, clock))
        super().push(worker, clock, round_)

    def leave(self, worker: int) -> None:
        """Wait no longer for a worker that is done, as it was in the recorded run.

        Raises:
            Error: It was not in the recorded run.
        """
        if any(other == worker for due in self._answers[self.version :] for other, _ in due):
            raise Error(f"worker {worker} ends before it did in the recorded run.", hint=SAME_STEPS)
        super().leave(worker)

    def next(self) -> Action | None:
        """Answer whom the recorded run answered at this version, then apply what it applied."""
        for worker in self._unanswered:
            if worker not in self.applied:  # it pushes nothing more
                del self._unanswered[worker]
                return Grant(worker)
        due = self._answers[self.version]
        for worker, clock in due:
            applied = worker in self._unanswered and self.applied.get(worker) == clock + 1
            if applied or self._waiting.get(worker, (None, 0))[0] == clock:
                due.remove((worker, clock))
                if applied:
                    del self._unanswered[worker]
                else:
                    self._count(worker)
                return Grant(worker, late=not applied)
        if not due and self.version < len(self._updates):
            update = self._updates[self.version]
            if all(self._waiting.get(worker, (None, 0))[0] == clock for worker, clock in update):
                return self._apply([worker for worker, _ in update])
        return None
