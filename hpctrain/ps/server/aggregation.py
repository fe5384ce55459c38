"""How the gradients of an update become one: their mean over samples, clipped by its norm."""

from __future__ import annotations

from collections.abc import Callable

from hpctrain.compression.codec import sum_rows
from hpctrain.ps.server.clipping import Clipping
from hpctrain.ps.server.gradients import Gradients
from hpctrain.ps.server.peers import Peers
from hpctrain.ps.server.slice_state import Pushed, SliceState
from hpctrain.ps.server.store import Store


class Aggregation:
    """Makes one gradient of the pushes that an update is made of.

    Args:
        store: What the server holds.
        peers: Who is told the norms of this server's slices.
        gradients: Whose memory is used.
        clipped: Called with a slice and its pushes, when the norm that they waited for is known.

    Attributes:
        clipping: By the norm of the whole gradient.
    """

    def __init__(
        self,
        store: Store,
        peers: Peers,
        gradients: Gradients,
        clipped: Callable[[SliceState, list[Pushed]], None],
    ) -> None:
        self.clipping = Clipping(store, peers, clipped)
        self._store = store
        self._gradients = gradients

    def combine(self, held: SliceState, pushes: list[Pushed]) -> bool:
        """Make one gradient of pushes, in the first of them.

        Args:
            held: The slice.
            pushes: What its next update is made of, in the order in which they are added up.

        Returns:
            Whether it is ready now; else it waits for norms of other slices, which block this one.

        Raises:
            Error: The pushes start from parameters that differ among workers.
        """
        rounds = self._store.consistency.rounds
        held.take_put(push.worker for push in pushes)
        if held.replicas:
            self._gradients.own(held, pushes[0])
        if rounds or len(pushes) > 1:
            absent = frozenset.intersection(*(push.absent for push in pushes))
            self._average(held, pushes)
            pushes[0].absent = absent
        if rounds and self._store.clip_norm is not None:
            self.clipping.wait(held, pushes)
            return False
        return True

    def pass_over(self, held: SliceState) -> None:
        """Let the other servers know that a slice has no gradient in this round."""
        if self._store.clip_norm is not None:
            self.clipping.tell(held, 0.0)

    def _average(self, held: SliceState, pushes: list[Pushed]) -> None:
        first = pushes[0]
        if len(pushes) == 1 and first.weight in (0.0, 1.0):
            return
        weight = sum(push.weight for push in pushes)
        self._gradients.own(held, first)
        if first.rows is not None:
            parts = [(p.rows, p.gradient) for p in pushes if p.rows is not None]
            first.rows, first.gradient = sum_rows(parts)
        else:
            for push in pushes[1:]:
                first.gradient += push.gradient
        if weight > 0:
            first.gradient /= weight
