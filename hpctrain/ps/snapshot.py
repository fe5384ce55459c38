"""Consistent snapshots of all slices, while training goes on.

The coordinator asks every server what it has begun; the snapshot is to hold the union of that
(Chandy and Lamport's cut, in two phases). Until a slice has been brought there and copied, what
lies beyond is held back: as long as it takes a worker to push the rest of one step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from hpctrain.ps import wire

if TYPE_CHECKING:
    from hpctrain.ps.link import Link
    from hpctrain.ps.server import Held, Server


class Snapshots:
    """One server's part in snapshots, and the coordinator's."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._begun: dict[int, int] = {}
        self._number: int | None = None
        self._cut = False
        self._clocks: dict[int, int] = {}
        self._version = 0
        self._copies: dict[int, tuple[list[torch.Tensor], int]] = {}
        self._later: list[Callable[[], None]] = []
        # The coordinator's.
        self._question: tuple[int, wire.Ask] | None = None
        self._frozen: dict[int, wire.Frozen] = {}
        self._kept: set[int] = set()
        self._last = 0
        self._seen = 0
        # Which version of each slice each snapshot holds; in a replay, is to hold.
        self.versions: dict[int, dict[int, int]] = {}
        self._recorded = server.order.snapshots

    @property
    def active(self) -> bool:
        """Whether a snapshot is being made, or must not be missed."""
        return self._number is not None or self._recorded is not None

    # The coordinator's part.

    def ask(self, worker: int, question: wire.Ask) -> None:
        """A worker wants a snapshot."""
        self._question = (worker, question)
        # Numbers of different coordinators must differ.
        self._last = max(self._last + 1, (self._number or 0) + 1)
        self._frozen, self._kept = {}, set()
        for link in self._server.servers.values():
            link.send(wire.Freeze(self._last))
        self._gather(self._server.me, self._freeze(self._last))

    def server_lost(self) -> None:
        """Begin again without it, if a snapshot is being made."""
        if self._question is not None:
            self.ask(*self._question)

    def message(self, link: Link, message: wire.Message) -> None:
        """Of another server, or a worker that fetches."""
        match message:
            case wire.Freeze():
                link.send(self._freeze(message.snapshot))
            case wire.Frozen() if message.snapshot == self._last:
                self._gather(link.peer, message)
            case wire.Cut() if message.snapshot == self._number:
                self._cut_at(message)
            case wire.Kept() if message.snapshot == self._last:
                self._count_kept(link.peer)
            case wire.Fetch():
                self._send(link, message.snapshot)

    def _gather(self, server: int, frozen: wire.Frozen) -> None:
        self._frozen[server] = frozen
        everyone = {self._server.me, *self._server.servers}
        if everyone - set(self._frozen):
            return
        parts = [self._frozen[server] for server in everyone]
        clocks: dict[int, int] = {}
        for part in parts:
            for worker, clock in part.clocks.items():
                clocks[worker] = max(clock, clocks.get(worker, 0))
        if self._question is not None:
            worker = self._question[0]
            version = max(part.version for part in parts)
            self._server.order.asked(self._last, worker, clocks.get(worker, version))
        cut = wire.Cut(self._last, clocks, max(part.version for part in parts))
        for link in self._server.servers.values():
            link.send(cut)
        self._cut_at(cut)

    def _count_kept(self, server: int) -> None:
        self._kept.add(server)
        if self._question is not None and self._kept >= {self._server.me, *self._server.servers}:
            worker, question = self._question
            self._question = None
            if worker in self._server.workers:
                self._server.workers[worker].send(wire.Answer(question.number, self._last))

    # Every server's part.

    def holds_back(self, held: Held, worker: int, clock: int) -> bool:
        """Whether a push must wait because it lies beyond the snapshot being made."""
        if self._recorded is not None:
            self._check_asked(worker, clock)
            return False
        within = self._clocks.get(worker, 0)
        if self._number is not None and not self._server.consistency.rounds and clock >= within:
            return True
        self._begun[worker] = max(clock + 1, self._begun.get(worker, 0))
        return False

    def later(self, action: Callable[[], None]) -> None:
        """Do it once the snapshot is kept."""
        self._later.append(action)

    def keeps_still(self, held: Held) -> bool:
        """Whether a slice may not be updated now: where updates go by rounds, or are replayed."""
        if self._recorded is not None:
            index, version = held.piece.number, held.schedule.version
            coming = [taken[index] for number, taken in self._recorded.items()
                      if index in taken and index not in self.versions.get(number, ())]  # fmt: skip
            return bool(coming) and version >= min(coming)
        return (
            self._server.consistency.rounds
            and held.piece.number not in self._copies
            and held.schedule.version >= self._version
        )

    def moved(self, held: Held) -> None:
        """A slice was updated: is it at the cut?"""
        if self._number is None or not self._cut or held.blocked:
            return
        index = held.piece.number
        if index in self._copies or not self._server.primary(index):
            return
        assert self._number is not None
        if self._recorded is not None:
            recorded = self._recorded.get(self._number, {}).get(index, held.schedule.version)
            there = held.schedule.version == recorded
        elif self._server.consistency.rounds:
            there = held.schedule.version == self._version
        else:
            applied = held.schedule.applied
            there = all(applied[worker] >= self._clocks.get(worker, 0) for worker in applied)
        if there:
            tensors = [held.weights.clone(), *(tensor.clone() for tensor in held.state.values())]
            self._copies[index] = (tensors, held.steps)
            self.versions.setdefault(self._number, {})[index] = held.schedule.version
            self._finish()

    def left(self, worker: int) -> None:
        """A worker is done or lost; nothing more will come of it."""
        self._begun.pop(worker, None)
        if self.active:
            for held in list(self._server.held.values()):
                self.moved(held)

    def _check_asked(self, worker: int, clock: int) -> None:
        """In a replay: a snapshot that the recorded run took must be asked for here too."""
        asked = self._server.order.asked_at
        due = [n for n, (who, when) in asked.items() if who == worker and when <= clock]
        if due and max(due) > self._seen:
            self._server.abort(
                "the recorded run made a snapshot where this one does not: replay with its "
                "validation and checkpoint settings"
            )

    def _freeze(self, number: int) -> wire.Frozen:
        self._release()
        self._seen = max(self._seen, number)
        self._number, self._cut, self._copies = number, False, {}
        self._clocks = dict(self._begun)
        versions = [
            held.schedule.version
            for held in self._server.held.values()
            if self._server.primary(held.piece.number)
        ]
        self._version = max(versions, default=0)
        return wire.Frozen(number, self._clocks, self._version)

    def _cut_at(self, cut: wire.Cut) -> None:
        self._cut, self._clocks, self._version = True, cut.clocks, cut.version
        allowed, self._later = self._later, []
        for action in allowed:  # some of it may lie within the cut
            action()
        for held in list(self._server.held.values()):
            if self._server.primary(held.piece.number):
                self._server.run(held)
        self._finish()

    def _finish(self) -> None:
        server = self._server
        if self._number is None or not self._cut:
            return
        if any(server.primary(index) and index not in self._copies for index in server.held):
            return
        number, self._number = self._number, None
        coordinator = min([server.me, *server.servers])
        if coordinator == server.me:
            self._count_kept(server.me)
        else:
            server.servers[coordinator].send(wire.Kept(number))
        self._release()

    def _release(self) -> None:
        self._number = None
        later, self._later = self._later, []
        for action in later:
            action()
        for held in list(self._server.held.values()):
            if self._server.primary(held.piece.number):
                self._server.run(held)

    def _send(self, link: Link, number: int) -> None:
        copies, self._copies = self._copies, {}
        indices = sorted(copies)
        payloads = [tensor for index in indices for tensor in copies[index][0]]
        steps = [copies[index][1] for index in indices]
        link.send(wire.Part(number, indices, steps), payloads)
