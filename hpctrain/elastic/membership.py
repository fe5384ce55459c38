"""Membership: who takes part in a run, how a loss is found out, and how the world is formed anew.

An engine of this kind is one class behind :class:`Membership`. What happens after a loss is the
same with all of them, and stands in :mod:`hpctrain.train.recovery`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

MEET_SECONDS = 30.0
"""Longest time to form a new world in; who takes longer ends, and is lost to the others."""


class Member(NamedTuple):
    """A process of the run.

    Attributes:
        number: Its own, for good: its first rank, or the next free number if it came later.
        host: Its host's name.
    """

    number: int
    host: str


class Welcome(NamedTuple):
    """The first message to a process that joins a run under way.

    Attributes:
        number: Its own.
        out: The run folder.
    """

    number: int
    out: str


class Progress(NamedTuple):
    """A rank's progress, which ranks tell each other when they meet anew.

    Attributes:
        stage: The stage of the run it is in.
        step: Steps that it has taken; -1: it has nothing yet.
        attended: The last step after which it did all that was due (validating, saving, ...).
    """

    stage: int
    step: int
    attended: int


class Meeting(NamedTuple):
    """The outcome of forming the world anew: who is there, who was lost, who joined.

    Attributes:
        generation: How often that has happened in this run; the same on every rank.
        progress: Of each rank, by its new number.
        lost: Who is no longer there.
        joined: Who came.
    """

    generation: int
    progress: list[Progress]
    lost: list[Member]
    joined: list[Member]

    @property
    def newest(self) -> int:
        """The step of the rank that has come farthest; -1: nobody has begun."""
        return max(each.step for each in self.progress)


class Membership(Protocol):
    """An engine of fault tolerance: it knows who takes part, and forms the world anew.

    Attributes:
        name: Of the engine.
        number: Of this process, for good.
        generation: How often the world was formed anew.
        members: Who takes part, by rank.
        lost_hosts: Where processes were lost.
        welcome: What a process that joins a run under way was told; None: it began with the run.
        comm: What Horovod is started on; None: what the environment says.
    """

    name: str
    number: int
    generation: int
    members: list[Member]
    lost_hosts: set[str]
    welcome: Welcome | None
    comm: Any

    def connect(self, begin: Callable[[], None]) -> None:
        """Start Horovod on the first world, by calling ``begin``."""

    def meet(self, progress: Progress, begin: Callable[[], None]) -> Meeting:
        """Form a new world of those that are alive, and of those that want to join.

        Every rank calls this: after a loss, or when all have agreed that somebody may join.

        Args:
            progress: How far this rank has come.
            begin: Starts Horovod on the new world.

        Raises:
            PeerLost: This rank cannot go on: it was cut off from most of the others, or nobody
                could be reached in time.
        """

    def begin(self, out: Path, wanted: int | None) -> None:
        """Take note that training begins.

        Args:
            out: The run folder.
            wanted: How many ranks to have: new ones are started where there are fewer.
        """

    def waiting(self) -> bool:
        """Whether somebody wants to join, as far as this rank knows."""

    def watch(self) -> None:
        """Look for losses; called now and then while waiting for others.

        Raises:
            PeerLost: One of them is known to be lost.
        """

    def leave(self) -> None:
        """End this rank's part in good order."""

    def abort(self, code: int) -> None:
        """End all ranks, with that exit code: this one has failed."""


class Regroup(Exception):  # noqa: N818 - an event, not a mistake
    """Raised where all ranks have agreed to form the world anew, because somebody wants to join."""
