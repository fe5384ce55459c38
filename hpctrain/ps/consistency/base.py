"""What a consistency mode says of itself, and what decides over the updates of one slice.

A slice's server asks its schedule what to do next after everything that happens to the slice. No
message is sent here, and nothing is known of MPI.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal, NamedTuple

from hpctrain.errors import Error


class Apply(NamedTuple):
    """Update the slice with the mean of these workers' pushes, added up in this order.

    Attributes:
        workers: Whose pushes; with none of them, a round goes by without an update.
    """

    workers: tuple[int, ...]


class Grant(NamedTuple):
    """Answer a worker's push: it may go on.

    Attributes:
        worker: Which.
        late: Whether its push was not applied.
    """

    worker: int
    late: bool = False


Action = Apply | Grant


class Schedule(ABC):
    """The order of one slice's updates and answers.

    Args:
        workers: Who takes part.

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
        """The clock of the slowest live worker: the straggler's."""
        return min(self.applied.values(), default=0)

    def push(self, worker: int, clock: int, round_: int) -> None:
        """Take in that a gradient came.

        Args:
            worker: Whose.
            clock: The worker's step.
            round_: The update it is meant for.
        """
        self._waiting[worker] = (clock, round_)

    def pull(self, worker: int) -> None:
        """Take in that a worker wants an answer, with nothing to apply that was not before."""
        self._unanswered[worker] = None

    @abstractmethod
    def next(self) -> Action | None:
        """Return what to do now; it counts as done. None: wait for something to happen."""

    def leave(self, worker: int) -> None:
        """Wait no longer for a worker that is done, or lost."""
        self.applied.pop(worker, None)
        self._waiting.pop(worker, None)
        self._unanswered.pop(worker, None)

    def join(self, worker: int) -> None:
        """Let a new worker take part, at the clock of the slowest."""
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


class Consistency(ABC):
    """When workers wait for one another: a consistency mode with its argument.

    A mode is a subclass in a file of its own, which nothing else has to know: its attributes say
    all that the servers, the workers, the configuration's defaults and the cost model ask.

    Args:
        argument: What follows the name's colon; empty where nothing does.
        fresh: Whether workers pull new weights for every step.

    Attributes:
        name: The mode's name, for messages.
        example: The mode as users type it, with an argument if it takes one.
        takes_number: Whether a whole number follows after a colon.
        rounds: Whether updates are made of many workers' pushes, one of each at most.
        synchronous: Whether all workers take each step together, as long as they pull new weights
            for each.
        shares: How samples are divided among workers unless ``ps.shares`` says so.
        lr_by_delay: Whether rates are divided by the updates that a push missed, unless
            ``ps.lr_by_delay`` says so.
        advised: Whether the cost model's advice compares it.
        number: The argument.
        staleness: The most clocks that a worker may be ahead of the slowest; the cost model's.
        backups: Workers that a step does not wait for; the cost model's.
        fresh: Whether workers pull new weights for every step.

    Raises:
        Error: The mode has no such argument.
    """

    name: ClassVar[str]
    example: ClassVar[str]
    takes_number: ClassVar[bool] = False
    rounds: ClassVar[bool] = False
    synchronous: ClassVar[bool] = False
    shares: ClassVar[Literal["equal", "speed"]] = "equal"
    lr_by_delay: ClassVar[bool] = False
    advised: ClassVar[bool] = False

    def __init__(self, argument: str = "", *, fresh: bool = True) -> None:
        fits = argument.isdecimal() if self.takes_number else not argument
        if not fits:
            given = f"{self.name}:{argument}" if argument else self.name
            raise Error(
                f"there is no consistency '{given}'.", hint=f"did you mean '{self.example}'?"
            )
        self.number = int(argument) if argument else 0
        self.fresh = fresh

    @property
    def same_weights(self) -> bool:
        """Whether all workers take each step together, from the same weights."""
        return self.synchronous and self.fresh

    @property
    def staleness(self) -> float:
        """The most clocks that a worker may be ahead of the slowest; infinite without a bound."""
        return 0

    @property
    def backups(self) -> int:
        """How many workers a step does not wait for."""
        return 0

    def check(self, workers: int) -> None:
        """Refuse a number of workers that the mode cannot do with.

        Raises:
            Error: There are too few: nobody would be waited for.
        """
        if self.backups >= workers:
            raise Error(
                f"{workers} workers cannot go on without {self.backups} of them.",
                hint=f"use {self.name}:{workers - 1} at most, or async.",
            )

    @abstractmethod
    def schedule(self, workers: Iterable[int]) -> Schedule:
        """Return the schedule of a new slice.

        Args:
            workers: Who takes part.
        """
