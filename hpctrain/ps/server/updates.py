"""What becomes of pushes: scheduled, applied to a server's slices, and answered."""

from __future__ import annotations

from collections import Counter

import torch

from hpctrain.config import PsConfig
from hpctrain.ps.consistency.base import Apply
from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import Link
from hpctrain.ps.server.clipping import Clipping
from hpctrain.ps.server.gradients import Gradients
from hpctrain.ps.server.replicas import Replicas
from hpctrain.ps.server.replies import Replies
from hpctrain.ps.server.slice_state import Pushed, SliceState
from hpctrain.ps.server.snapshots import Snapshots
from hpctrain.ps.server.store import Store


class Updates:
    """Updates the slices that a server is the primary of.

    Args:
        store: What the server holds.
        workers: Links with those who take part, also later when that has changed.
        servers: Likewise with the other servers.
        config: The same on every rank.
        snapshots: Which may hold updates back.
        gradients: Read what is pushed.
        replicas: Make the same updates.
        answers: To workers.

    Attributes:
        clipping: By the norm of the whole gradient.
        delays: How many pushes were applied to weights so many updates newer than those they were
            computed with.
    """

    def __init__(
        self,
        store: Store,
        workers: dict[int, Link],
        servers: dict[int, Link],
        config: PsConfig,
        snapshots: Snapshots,
        gradients: Gradients,
        replicas: Replicas,
        answers: Replies,
    ) -> None:
        self.clipping = Clipping(store, servers, self._update_clipped)
        self.delays: Counter[int] = Counter()
        self._store = store
        self._order = store.order
        self._rounds = store.consistency.rounds
        self._workers = workers
        self._snapshots = snapshots
        self._gradients = gradients
        self._replicas = replicas
        self._answers = answers
        self._delay_compensation = config.delay_compensation
        self._lr_by_delay = (
            store.consistency.lr_by_delay if config.lr_by_delay is None else config.lr_by_delay
        )

    def push(
        self,
        held: SliceState,
        worker: int,
        push: messages.Push,
        number: int,
        buffer: torch.Tensor | None,
    ) -> None:
        """A worker has pushed a slice.

        Args:
            held: The slice.
            worker: Who.
            push: With others.
            number: Its place among them.
            buffer: The gradient as it was sent; None: it lies in the worker's memory.
        """
        held.wants[worker] = push.pull
        held.reads[worker] = push.reads[number]
        if push.clock < held.schedule.applied[worker]:
            held.schedule.pull(worker)
            self._gradients.recycle(buffer)
            self.run(held)
            return
        if buffer is None:
            gradient, rows = self._store.regions.gradient(worker, held.piece), None
        else:
            gradient, rows = self._gradients.decode(held, buffer)
        held.pushes[worker] = Pushed(
            worker, push.clock, push.reads[number], push.weight, push.hyper[held.group],
            gradient, rows, buffer is None, frozenset(push.absent.get(held.piece.number, ())),
        )  # fmt: skip
        self._schedule(held, worker, push)

    def _schedule(self, held: SliceState, worker: int, push: messages.Push) -> None:
        if worker not in self._workers:
            return
        if self._snapshots.holds_back(held, worker, push.clock):
            self._snapshots.later(lambda: self._schedule(held, worker, push))
        else:
            held.schedule.push(worker, push.clock, push.round)
            self.run(held)

    def run(self, held: SliceState) -> None:
        """Do with a slice what its schedule says, until it says to wait."""
        snapshots, schedule = self._snapshots, held.schedule
        if snapshots.active:
            snapshots.moved(held)
        while not held.blocked and not (snapshots.active and snapshots.keeps_still(held)):
            action = schedule.next()
            if action is None:
                break
            if isinstance(action, Apply):
                if action.workers:
                    self._apply(held, [held.pushes.pop(worker) for worker in action.workers])
                else:
                    self._pass_over(held)
                if snapshots.active:
                    snapshots.moved(held)
            else:
                if action.late and (dropped := held.pushes.pop(action.worker, None)):
                    self._gradients.free(dropped)
                self._answers.grant(held, action.worker)

    def drop_orphans(self) -> None:
        """Let a round go by for the slices of which only lost workers' pushes wait for its norm."""
        for held, pushes in self.clipping.orphans(self._workers):
            for push in pushes:
                self._gradients.free(push)
            self._pass_over(held)

    def _apply(self, held: SliceState, pushes: list[Pushed]) -> None:
        held.take_put(push.worker for push in pushes)
        absent = frozenset.intersection(*(push.absent for push in pushes))
        if held.replicas:
            self._gradients.own(held, pushes[0])
        if self._rounds or len(pushes) > 1:
            self._gradients.aggregate(held, pushes)
            pushes[0].absent = absent
            if self._rounds and self._store.clip_norm is not None:
                self.clipping.wait(held, pushes)
                return
        self._update(held, pushes)

    def _pass_over(self, held: SliceState) -> None:
        """A round goes by without an update of this slice."""
        self._replicas.pass_over(held)
        if self._store.clip_norm is not None:
            self.clipping.tell(held, 0.0)

    def _update_clipped(self, held: SliceState, pushes: list[Pushed]) -> None:
        self._update(held, pushes)
        held.blocked = False
        self.run(held)

    def _update(self, held: SliceState, pushes: list[Pushed]) -> None:
        version = held.schedule.version - 1
        first = pushes[0]
        lr_factor = 1.0
        for push in pushes:
            delay = version - push.read
            self.delays[delay] += 1
            if self._order.keeps:
                held.log.append((version, push.worker, push.clock, push.read))
            if self._lr_by_delay and delay > 1:
                lr_factor = 1.0 / delay
        if self._delay_compensation and first.rows is None and first.worker in held.sent:
            drift = held.weights - held.sent[first.worker]
            first.gradient += self._delay_compensation * first.gradient.square() * drift
        made = any(push.weight > 0 for push in pushes)  # else nobody had a sample
        if held.replicas:
            self._replicas.send(held, first, lr_factor, pushes, made)
        if made:
            if self._order.watches:
                rows = [first.rows] if first.rows is not None else []
                tensors = [held.weights, first.gradient, *rows]
                self._order.updated(held.piece.number, [*first.hyper, lr_factor], tensors)
            held.update(self._store.rule, first, lr_factor, version + 1)
        for push in pushes:
            self._gradients.free(push)
