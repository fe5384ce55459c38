"""The update of a slice: with which rate, from which gradient, made here and by its replicas."""

from __future__ import annotations

from collections import Counter

from hpctrain.config import PsConfig
from hpctrain.ps.server.gradients import Gradients
from hpctrain.ps.server.replicas import Replicas
from hpctrain.ps.server.slice_state import Pushed, SliceState
from hpctrain.ps.server.store import Store


class Updates:
    """Updates the slices that a server is the primary of.

    Args:
        store: What the server holds.
        config: The same on every rank.
        gradients: Whose memory is used again.
        replicas: Make the same updates.

    Attributes:
        delays: How many pushes were applied to weights so many updates newer than those they were
            computed with.
    """

    def __init__(
        self, store: Store, config: PsConfig, gradients: Gradients, replicas: Replicas
    ) -> None:
        self.delays: Counter[int] = Counter()
        self._store = store
        self._order = store.order
        self._gradients = gradients
        self._replicas = replicas
        self._delay_compensation = config.delay_compensation
        by_default = store.consistency.lr_by_delay
        self._lr_by_delay = by_default if config.lr_by_delay is None else config.lr_by_delay

    def make(self, held: SliceState, pushes: list[Pushed]) -> None:
        """Make a slice's next update.

        Args:
            held: The slice.
            pushes: Of which the update is made; the gradient of the first stands for all.
        """
        version = held.schedule.version - 1
        first = pushes[0]
        lr_factor = self._count(held, version, pushes)
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

    def pass_over(self, held: SliceState) -> None:
        """Count a round that goes by without an update of this slice."""
        self._replicas.pass_over(held)

    def _count(self, held: SliceState, version: int, pushes: list[Pushed]) -> float:
        """Count the pushes of an update; return the factor that their delays put on the rate."""
        lr_factor = 1.0
        for push in pushes:
            delay = version - push.read
            self.delays[delay] += 1
            if self._order.keeps:
                held.log.append((version, push.worker, push.clock, push.read))
            if self._lr_by_delay and delay > 1:
                lr_factor = 1.0 / delay
        return lr_factor
