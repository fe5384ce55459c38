"""Which pushes are applied to a slice, when, and which worker may go on: a push's way to an update.

a push -> Scheduler -> Aggregation -> Updates -> the slice, and its replicas
|                                         |
+---------------- Replies <---------------+
"""

from __future__ import annotations

import torch

from hpctrain.ps.consistency.base import Apply
from hpctrain.ps.protocol import messages
from hpctrain.ps.server.aggregation import Aggregation
from hpctrain.ps.server.gradients import Gradients
from hpctrain.ps.server.peers import Peers
from hpctrain.ps.server.replies import Replies
from hpctrain.ps.server.slice_state import Pushed, SliceState
from hpctrain.ps.server.snapshots import ReplayedSnapshots, Snapshots
from hpctrain.ps.server.store import Store
from hpctrain.ps.server.updates import Updates


class Scheduler:
    """Does with the slices that a server is the primary of what their schedules say.

    Args:
        store: What the server holds.
        peers: Who takes part.
        gradients: Read what is pushed.
        updates: Of slices.
        replies: To workers.

    Attributes:
        aggregation: Of the gradients of an update.
        snapshots: May hold pushes and updates back.
    """

    def __init__(
        self, store: Store, peers: Peers, gradients: Gradients, updates: Updates, replies: Replies
    ) -> None:
        kind = Snapshots if store.order.replayed is None else ReplayedSnapshots
        self.aggregation = Aggregation(store, peers, gradients, self._clipped)
        self.snapshots = kind(store, peers, self.run_all)
        self._store = store
        self._peers = peers
        self._gradients = gradients
        self._updates = updates
        self._replies = replies

    # What workers want.

    def push(
        self,
        held: SliceState,
        worker: int,
        push: messages.Push,
        number: int,
        buffer: torch.Tensor | None,
    ) -> None:
        """Take in a worker's push of a slice.

        Args:
            held: The slice.
            worker: Whose push.
            push: With those of other slices.
            number: The slice's place among them.
            buffer: The gradient as it was sent; None: it lies in the worker's memory.
        """
        held.wants[worker] = push.pull
        held.reads[worker] = push.reads[number]
        if push.clock < held.schedule.applied[worker]:  # sent again, after a failover
            held.schedule.pull(worker)
            self._gradients.recycle(buffer)
            self.run(held)
            return
        held.pushes[worker] = self._gradients.pushed(held, worker, push, number, buffer)
        self._schedule(held, worker, push)

    def pull(self, held: SliceState, worker: int) -> None:
        """Take in that a worker wants a slice's weights, without a push.

        Args:
            held: The slice.
            worker: Who wants them.
        """
        held.wants[worker] = True
        held.reads.pop(worker, None)
        held.schedule.pull(worker)
        self.run(held)

    def _schedule(self, held: SliceState, worker: int, push: messages.Push) -> None:
        if worker not in self._peers.workers:
            return
        if self.snapshots.holds_back(held, worker, push.clock):
            self.snapshots.later(lambda: self._schedule(held, worker, push))
        else:
            held.schedule.push(worker, push.clock, push.round)
            self.run(held)

    # What is done about it.

    def run_all(self) -> None:
        """Do with every slice of this primary what its schedule says."""
        for held in list(self._store.held.values()):
            if self._store.primary(held.piece.number):
                self.run(held)

    def run(self, held: SliceState) -> None:
        """Do with a slice what its schedule says, until it says to wait."""
        snapshots, schedule = self.snapshots, held.schedule
        if snapshots.active:
            snapshots.moved(held)
        while not held.blocked and not (snapshots.active and snapshots.keeps_still(held)):
            action = schedule.next()
            if action is None:
                break
            if isinstance(action, Apply):
                self._apply(held, [held.pushes.pop(worker) for worker in action.workers])
                if snapshots.active:
                    snapshots.moved(held)
            else:
                if action.late and (dropped := held.pushes.pop(action.worker, None)):
                    self._gradients.free(dropped)
                self._replies.grant(held, action.worker)

    def _apply(self, held: SliceState, pushes: list[Pushed]) -> None:
        if not pushes:
            self._pass_over(held)
        elif self.aggregation.combine(held, pushes):
            self._updates.make(held, pushes)

    def _clipped(self, held: SliceState, pushes: list[Pushed]) -> None:
        self._updates.make(held, pushes)
        held.blocked = False
        self.run(held)

    def _pass_over(self, held: SliceState) -> None:
        self._updates.pass_over(held)
        self.aggregation.pass_over(held)

    # Who comes and goes.

    def join(self, worker: int) -> None:
        """Let a new worker take part, and send it the weights of this primary's slices."""
        for index, held in self._store.held.items():
            held.schedule.join(worker)
            if self._store.primary(index):
                held.wants[worker] = True
                self._replies.answer(held, worker)

    def leave(self, worker: int) -> None:
        """Wait no longer for a worker that pushes nothing more: it is done, or lost."""
        for held in self._store.held.values():
            held.forget(worker)
        # A round goes by for the slices of which only lost workers' pushes wait for its norm.
        for held, pushes in self.aggregation.clipping.orphans(self._peers.workers):
            for push in pushes:
                self._gradients.free(push)
            self._pass_over(held)
        self.snapshots.left(worker)
        self.run_all()
