"""Who was lost and who joined: noted by every rank, and told by the first, whoever that is then."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from hpctrain.elastic.membership import Meeting
from hpctrain.strategies.base import Change
from hpctrain.train.recorder import Recorder
from hpctrain.train.state import Counters
from hpctrain.world.logs import logger
from hpctrain.world.world import World

LOG = logger(__name__)

TELLING_SECONDS = 30.0
"""So long after a loss was noticed it is told again, if rank 0 is lost, which may have told it."""


class _Note(NamedTuple):
    """A change that is still to be told: when it was noticed, after which step, and what it is."""

    seconds: float
    step: int
    values: dict[str, Any]


class MembershipLog:
    """The changes of a world during a run.

    Args:
        world: That world.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._stepped = 0.0  # when the last step, and what followed it, was over
        self._noted: list[Change] = []
        self._untold: list[_Note] = []

    def begin(self) -> None:
        """Begin to time steps: training begins now."""
        self._stepped = time.monotonic()

    def note(self, counters: Counters, changes: Iterable[Change]) -> None:
        """Take note of changes, to be told after the step that is under way.

        Args:
            counters: Of the run; they keep the world's sizes.
            changes: Which.
        """
        for change in changes:
            LOG.warning("%s", change)
            self._noted.append(change)
            size = {"size": self._world.size, "reason": str(change)}
            counters.world.append({"step": counters.step, **size})

    def note_meeting(self, counters: Counters, meeting: Meeting) -> None:
        """Take note of who is no longer there, and who came, when the world was formed anew.

        Args:
            counters: Of the run.
            meeting: Of the ranks that go on.
        """
        left = f"{self._world.size} ranks"
        lost = [Change(each.number, "worker", each.host, "ended", left) for each in meeting.lost]
        joined = [Change(each.number, "worker", each.host, None, left) for each in meeting.joined]
        self.note(counters, lost + joined)

    def tell(self, counters: Counters, recorder: Recorder) -> None:
        """Record what is new, on rank 0, with how long the step took in which it was noticed.

        Args:
            counters: Of the run; their step is what the records are of.
            recorder: Takes the records, on rank 0; elsewhere it is not used.
        """
        now = time.monotonic()
        step_ms = round(1e3 * (now - self._stepped), 3)
        self._stepped = now
        noted, self._noted = self._noted, []
        for change in noted:
            what = "joined" if change.lost is None else "lost"
            values = {
                "size": self._world.size,
                "reason": str(change),
                what: change.rank,
                "role": change.role,
                "host": change.host,
                "step_ms": step_ms,
            }
            self._untold.append(_Note(now, counters.step, values))
        if self._world.leads:
            for each in self._untold:
                recorder.write("event", each.step, each.values, each.values["reason"])
            self._untold.clear()
        elif self._untold:  # in case rank 0 is lost, too, and has not told
            self._untold = [each for each in self._untold if now - each.seconds < TELLING_SECONDS]

    def told(self) -> None:
        """Forget what rank 0 has told: all ranks have come to another step since."""
        if not self._world.leads:
            self._untold.clear()
