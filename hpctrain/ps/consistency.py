"""When a push is applied, and when a worker may go on: the consistency of one slice, without MPI.

A slice's server asks its schedule what to do next after everything that happens to the slice.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hpctrain.config import PsConfig
from hpctrain.errors import Error, nearest


class Apply(NamedTuple):
    """Update the slice with these workers' pushes, added up in this order; maybe with none."""

    workers: tuple[int, ...]


class Grant(NamedTuple):
    """Answer a worker's push: it may go on. ``late`` where its push was not applied."""

    worker: int
    late: bool = False


Action = Apply | Grant

SAME_STEPS = "replay with the number of steps and the settings of the recorded run."


class Consistency(NamedTuple):
    """What was asked for by name.

    Attributes:
        mode: ``sync``, ``async``, ``ssp`` or ``backup``.
        number: Staleness bound of ``ssp``, workers not waited for of ``backup``.
        fresh: Whether workers pull new weights for every step.
    """

    mode: str
    number: int = 0
    fresh: bool = True

    @property
    def rounds(self) -> bool:
        """Whether updates are made of many workers' pushes."""
        return self.mode in ("sync", "backup")

    @property
    def lockstep(self) -> bool:
        """Whether all workers take each step together, from the same weights."""
        return self.mode == "sync" and self.fresh

    def schedule(self, workers: Iterable[int]) -> Schedule:
        """A new slice's."""
        if self.rounds:
            return Rounds(workers, self.number)
        return Bounded(workers, self.number if self.mode == "ssp" else math.inf)


def consistency_of(config: PsConfig) -> Consistency:
    """What is asked for.

    Raises:
        Error: There is no such consistency.
    """
    every = config.pull_every if isinstance(config.pull_every, list) else [config.pull_every]
    return parse(config.consistency)._replace(fresh=max(every) == 1)


def parse(text: str) -> Consistency:
    """``sync``, ``async``, ``ssp:S`` (at most S clocks ahead) or ``backup:B`` (B not waited for).

    Raises:
        Error: It is none of these.
    """
    match = re.fullmatch(r"(sync|async)|(ssp|backup):(\d+)", text)
    if match is None:
        raise Error(
            f"there is no consistency '{text}'.",
            hint=nearest(text, ["sync", "async", "ssp:3", "backup:1"]),
        )
    return Consistency(match[1] or match[2], int(match[3] or 0))


class Schedule(ABC):
    """The order of one slice's updates and answers.

    Attributes:
        applied: For each live worker its clock: how many steps it has pushed.
        version: Updates so far.
    """

    def __init__(self, workers: Iterable[int]) -> None:
        self.applied = dict.fromkeys(workers, 0)
        self.version = 0
        # Pushes that wait to be applied (clock, and round meant), and applied ones that wait for
        # an answer, both in the order in which they came.
        self._waiting: dict[int, tuple[int, int]] = {}
        self._unanswered: dict[int, None] = {}

    @property
    def slowest(self) -> int:
        """The clock of the slowest live worker."""
        return min(self.applied.values(), default=0)

    def push(self, worker: int, clock: int, round_: int) -> None:
        """A gradient came: the worker's step ``clock``, meant for update ``round_``."""
        self._waiting[worker] = (clock, round_)

    def pull(self, worker: int) -> None:
        """An answer is wanted, and nothing is to be applied that was not before."""
        self._unanswered[worker] = None

    @abstractmethod
    def next(self) -> Action | None:
        """What to do now; it counts as done. None: wait for something to happen."""

    def leave(self, worker: int) -> None:
        """A worker is done, or lost: nobody waits for it any more."""
        self.applied.pop(worker, None)
        self._waiting.pop(worker, None)
        self._unanswered.pop(worker, None)

    def join(self, worker: int) -> None:
        """A worker comes, at the clock of the slowest."""
        self.applied[worker] = self.slowest
        self._waiting.pop(worker, None)
        self._unanswered.pop(worker, None)

    def _apply(self, workers: Sequence[int]) -> Apply:
        for worker in workers:
            self._count(worker)
            self._unanswered[worker] = None
        self.version += 1
        return Apply(tuple(workers))

    def _count(self, worker: int) -> None:
        clock, _ = self._waiting.pop(worker)
        self.applied[worker] = clock + 1


class Rounds(Schedule):
    """Each update is the mean of a round's pushes: of all workers, or of all but the slowest few.

    With backup workers a push that comes after its round was closed is dropped (Chen et al.,
    "Revisiting Distributed Synchronous SGD", 2016). Pushes are added up in the order of the
    workers' numbers, so that sums do not depend on who was faster.

    Args:
        workers: Who takes part.
        backup: How many pushes of a round need not be waited for.
    """

    def __init__(self, workers: Iterable[int], backup: int = 0) -> None:
        super().__init__(workers)
        self._backup = backup

    def next(self) -> Action | None:
        """Drop what is late, close the round if it is full, or answer."""
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
    """

    def __init__(self, workers: Iterable[int], bound: float = math.inf) -> None:
        super().__init__(workers)
        self._bound = bound

    def next(self) -> Action | None:
        """Apply in order of arrival, then answer whoever may go on."""
        if self._waiting:
            return self._apply([next(iter(self._waiting))])
        slowest = self.slowest
        for worker in self._unanswered:
            if self.applied.get(worker, slowest) - slowest <= self._bound:
                del self._unanswered[worker]
                return Grant(worker)
        return None


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
        """A gradient came.

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
        """A worker is done.

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
