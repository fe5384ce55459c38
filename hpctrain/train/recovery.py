"""What happens when a rank is lost, or wants to join, whatever engine noticed it.

A run is a few stages, one after the other, and every rank goes through all of them. A loss is an
ordinary event in any of them: it is raised as :class:`PeerLost`, on some ranks sooner and on others
later, perhaps in the next stage. Those that are left form a new world, tell each other how far they
have come, and all begin again with the stage of the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hpctrain.elastic.membership import Meeting, Progress, Regroup
from hpctrain.errors import PeerLost
from hpctrain.strategies.base import Recovery

Stage = Callable[[Meeting | None], None]
"""Does its work from the start, or, after a meeting, does it again or goes on with it."""


def outlive(
    recovery: Recovery | None,
    stages: Sequence[Stage],
    progress: Callable[[int], Progress],
    *,
    begin: int = 0,
    joins: bool = False,
) -> None:
    """Go through the stages of a run, whoever is lost meanwhile.

    Args:
        recovery: Forms the world anew; None: a loss ends the run.
        stages: What to do, in order. Each can be done again from its start.
        progress: How far this rank has come, being in the stage of that number.
        begin: The stage to begin with.
        joins: Whether the others are there already, so that this rank has to meet them first.

    Raises:
        PeerLost: A rank was lost, and the others cannot go on.
    """
    stage = begin
    meeting: Meeting | None = None
    if joins and recovery is not None:
        meeting = recovery.meet(progress(stage))
        stage = min(each.stage for each in meeting.progress)
    while stage < len(stages):
        try:
            stages[stage](meeting)
        except (PeerLost, Regroup):
            if recovery is None:
                raise
            meeting = recovery.meet(progress(stage))
            stage = min(each.stage for each in meeting.progress)
        else:
            stage, meeting = stage + 1, None
