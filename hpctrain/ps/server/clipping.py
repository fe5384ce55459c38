"""Clipping by the norm of the whole gradient, whose slices lie with several servers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterator

from hpctrain.ps.protocol import messages
from hpctrain.ps.server.peers import Peers
from hpctrain.ps.server.slice_state import Pushed, SliceState
from hpctrain.ps.server.store import Store


class Clipping:
    """One server's part in clipping: an update waits until the norms of all slices are known.

    Args:
        store: What this server holds.
        peers: Whose servers are told.
        go_on: Called with a slice and its pushes, clipped.
    """

    def __init__(
        self,
        store: Store,
        peers: Peers,
        go_on: Callable[[SliceState, list[Pushed]], None],
    ) -> None:
        self._store = store
        self._peers = peers
        self._go_on = go_on
        self._squares: defaultdict[int, dict[int, float]] = defaultdict(dict)
        self._waiting: dict[int, list[Pushed]] = {}

    def wait(self, held: SliceState, pushes: list[Pushed]) -> None:
        """Clip pushes, of which the first is their mean, when the norm of their round is known.

        Args:
            held: The slice, which is blocked until then.
            pushes: What its update is made of.
        """
        held.blocked = True
        self._waiting[held.piece.number] = pushes
        self.tell(held, float(pushes[0].gradient.double().square().sum()))

    def tell(self, held: SliceState, square: float) -> None:
        """Tell all servers the square of a slice's norm in this round.

        Args:
            held: The slice.
            square: The squared norm; 0 where nobody has a gradient.
        """
        index, round_ = held.piece.number, held.schedule.version - 1
        self._squares[round_][index] = square
        for link in self._peers.servers.values():
            link.send(messages.Norms(round_, [index], [square]))
        self._clip(round_)

    def told(self, message: messages.Norms) -> None:
        """Take in what another server has told of its slices."""
        self._squares[message.round].update(zip(message.slices, message.squares, strict=True))
        self._clip(message.round)

    def tell_again(self) -> None:
        """Pass on known norms after a failover: a lost server may not have told all."""
        for round_, squares in self._squares.items():
            for link in self._peers.servers.values():
                link.send(messages.Norms(round_, list(squares), list(squares.values())))

    def orphans(self, workers: Container[int]) -> Iterator[tuple[SliceState, list[Pushed]]]:
        """Yield lost workers' pushes that wait for norms of a round nobody else takes part in.

        Its other slices will not be pushed. These wait no longer.
        """
        for index, pushes in list(self._waiting.items()):
            if all(push.worker not in workers for push in pushes):
                held = self._store.held[index]
                del self._waiting[index]
                held.blocked = False
                yield held, pushes

    def _clip(self, round_: int) -> None:
        store = self._store
        assert store.layout is not None and store.clip_norm is not None
        squares = self._squares[round_]
        if len(squares) < len(store.layout.slices):
            return
        # Added up by slice, so that the norm does not depend on who holds which.
        norm = sum(squares[index] for index in sorted(squares)) ** 0.5
        scale = min(1.0, store.clip_norm / (norm + 1e-6))
        ready = [i for i in self._waiting if store.held[i].schedule.version - 1 == round_]
        for index in ready:
            held, pushes = store.held[index], self._waiting.pop(index)
            pushes[0].gradient *= scale
            held.norm = norm
            self._go_on(held, pushes)
        self._squares.pop(round_ - 2, None)
