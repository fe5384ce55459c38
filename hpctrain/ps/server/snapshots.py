"""Consistent snapshots of all slices, while training goes on.

The coordinator asks every server what it has begun; the snapshot is to hold the union of that
(Chandy and Lamport's cut, in two phases). Until a slice has been brought there and copied, what
lies beyond is held back: as long as it takes a worker to push the rest of one step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch

from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import Link
from hpctrain.ps.server.peers import Peers
from hpctrain.ps.server.slice_state import SliceState
from hpctrain.ps.server.store import Store

Copied = tuple[list[torch.Tensor], int, dict[int, int]]
Copies = dict[int, Copied]
"""By slice: its weights and state, and the updates that these have had."""


class Snapshots:
    """One server's part in snapshots, and the coordinator's.

    Args:
        store: What the server holds.
        peers: The other servers, and who asks.
        resume: Called when what was held back may go on.
    """

    def __init__(self, store: Store, peers: Peers, resume: Callable[[], None]) -> None:
        self._store = store
        self._peers = peers
        self._resume = resume
        self._begun: dict[int, int] = {}
        self._number: int | None = None
        self._cut = False
        self._clocks: dict[int, int] = {}
        self._version = 0
        self._copies: Copies = {}
        self._later: list[Callable[[], None]] = []
        # The coordinator's.
        self._question: tuple[int, messages.Ask] | None = None
        self._frozen: dict[int, messages.Frozen] = {}
        self._kept: set[int] = set()
        self._last = 0

    @property
    def active(self) -> bool:
        """Whether slices are to be looked at as they move."""
        return self._number is not None

    # The coordinator's part.

    def ask(self, worker: int, question: messages.Ask) -> None:
        """Make a snapshot that a worker wants.

        Args:
            worker: Who wants it.
            question: Answered when all servers have their parts.
        """
        self._question = (worker, question)
        self._last += 1  # of all coordinators' snapshots that this server has heard of
        self._frozen, self._kept = {}, set()
        for link in self._peers.servers.values():
            link.send(messages.Freeze(self._last))
        self._gather(self._peers.me, self._freeze(self._last))

    def server_lost(self) -> None:
        """Begin again without a lost server; what it had, others have now."""
        if self._question is not None and self._peers.coordinates:
            self.ask(*self._question)
        elif self._number is not None:
            self._release()  # the coordinator begins again, or its successor is asked again

    def message(self, link: Link, message: messages.Message) -> None:
        """Take in a message of another server, or of a worker that fetches.

        Args:
            link: Where it comes from.
            message: What has come.
        """
        match message:
            case messages.Freeze():
                link.send(self._freeze(message.snapshot))
            case messages.Frozen() if message.snapshot == self._last:
                self._gather(link.peer, message)
            case messages.Cut() if message.snapshot == self._number:
                self._cut_at(message)
            case messages.Kept() if message.snapshot == self._last:
                self._count_kept(link.peer)
            case messages.Fetch():
                copies, self._copies = self._copies, {}
                _send(link, message.snapshot, copies)

    def _gather(self, server: int, frozen: messages.Frozen) -> None:
        self._frozen[server] = frozen
        everyone = {self._peers.me, *self._peers.servers}
        if everyone - set(self._frozen):
            return
        parts = [self._frozen[server] for server in everyone]
        clocks: dict[int, int] = {}
        for part in parts:
            for worker, clock in part.clocks.items():
                clocks[worker] = max(clock, clocks.get(worker, 0))
        cut = messages.Cut(self._last, clocks, max(part.version for part in parts))
        for link in self._peers.servers.values():
            link.send(cut)
        self._cut_at(cut)

    def _count_kept(self, server: int) -> None:
        self._kept.add(server)
        if self._question is not None and self._kept >= {self._peers.me, *self._peers.servers}:
            worker, question = self._question
            self._question = None
            if worker in self._peers.workers:
                self._peers.workers[worker].send(messages.Answer(question.number, self._last))

    # Every server's part.

    def holds_back(self, held: SliceState, worker: int, clock: int) -> bool:
        """Return whether a push must wait because it lies beyond the snapshot being made.

        Args:
            held: The slice.
            worker: Who has pushed.
            clock: The worker's step.
        """
        within = self._clocks.get(worker, 0)
        if self._number is not None and not self._store.consistency.rounds and clock >= within:
            return True
        self._begun[worker] = max(clock + 1, self._begun.get(worker, 0))
        return False

    def later(self, action: Callable[[], None]) -> None:
        """Do something once the snapshot is kept."""
        self._later.append(action)

    def keeps_still(self, held: SliceState) -> bool:
        """Return whether a slice may not be updated now: where updates go by rounds."""
        return (
            self._store.consistency.rounds
            and held.piece.number not in self._copies
            and held.schedule.version >= self._version
        )

    def moved(self, held: SliceState) -> None:
        """Copy a slice that was updated if it is at the cut now."""
        # Who asks pushes nothing meanwhile. Where nobody else does, a round stays as it is.
        alone = len(held.schedule.applied) <= 1
        if self._number is None or not self._cut or (held.blocked and not alone):
            return
        index = held.piece.number
        if index in self._copies or not self._store.primary(index):
            return
        if self._store.consistency.rounds:
            there = alone or held.schedule.version >= self._version
        else:
            applied = held.schedule.applied
            there = all(applied[worker] >= self._clocks.get(worker, 0) for worker in applied)
        if there:
            self._copies[index] = _copy(self._store, held, self._number)
            self._finish()

    def left(self, worker: int) -> None:
        """Expect nothing more of a worker that is done or lost."""
        self._begun.pop(worker, None)
        if self.active:
            for held in list(self._store.held.values()):
                self.moved(held)

    def _freeze(self, number: int) -> messages.Frozen:
        self._release()
        self._last = max(self._last, number)
        self._number, self._cut, self._copies = number, False, {}
        self._clocks = dict(self._begun)
        versions = [
            held.schedule.version
            for held in self._store.held.values()
            if self._store.primary(held.piece.number)
        ]
        self._version = max(versions, default=0)
        return messages.Frozen(number, self._clocks, self._version)

    def _cut_at(self, cut: messages.Cut) -> None:
        self._cut, self._clocks, self._version = True, cut.clocks, cut.version
        allowed, self._later = self._later, []
        for action in allowed:  # some of it may lie within the cut
            action()
        self._resume()
        self._finish()

    def _finish(self) -> None:
        store, peers = self._store, self._peers
        if self._number is None or not self._cut:
            return
        if any(store.primary(index) and index not in self._copies for index in store.held):
            return
        number, self._number = self._number, None
        if peers.coordinates:
            self._count_kept(peers.me)
        else:
            peers.servers[peers.coordinator].send(messages.Kept(number))
        self._release()

    def _release(self) -> None:
        self._number = None
        later, self._later = self._later, []
        for action in later:
            action()
        self._resume()


class ReplayedSnapshots(Snapshots):
    """Snapshots in a replay: each slice is copied as it passes the version recorded for it.

    Nothing is held back and nothing stands still, and servers need not agree on anything: where the
    snapshot lies is known. It is sent when the last slice has passed.
    """

    def __init__(self, store: Store, peers: Peers, resume: Callable[[], None]) -> None:
        super().__init__(store, peers, resume)
        self._passed: defaultdict[int, Copies] = defaultdict(dict)
        # Of each slice, by version the numbers of the snapshots that hold it.
        self._coming: dict[int, defaultdict[int, list[int]]] = {}
        self._fetches: list[tuple[Link, int]] = []
        self._mine = 0

    @property
    def active(self) -> bool:
        """Whether slices are to be looked at: always, no version may be missed."""
        return True

    def ask(self, worker: int, question: messages.Ask) -> None:
        """Answer a worker that wants the next snapshot.

        Args:
            worker: Who wants it.
            question: What is answered.
        """
        self._last += 1
        self._peers.workers[worker].send(messages.Answer(question.number, self._last))

    def message(self, link: Link, message: messages.Message) -> None:
        """Take in that a worker fetches a snapshot.

        Args:
            link: With the worker.
            message: Which snapshot.
        """
        assert isinstance(message, messages.Fetch)
        self._fetches.append((link, message.snapshot))
        self._mine = sum(self._store.primary(index) for index in self._store.held)
        for held in self._store.held.values():
            self.moved(held)
        self._send_ready()

    def holds_back(self, held: SliceState, worker: int, clock: int) -> bool:
        """Return False: no push has to wait.

        Args:
            held: The slice.
            worker: Who has pushed.
            clock: The worker's step.
        """
        return False

    def keeps_still(self, held: SliceState) -> bool:
        """Return False: no slice has to stand still."""
        return False

    def moved(self, held: SliceState) -> None:
        """Copy a slice that was updated if a recorded snapshot holds this version."""
        index = held.piece.number
        if held.blocked or not self._store.primary(index):
            return
        if index not in self._coming:
            recorded = self._store.order.recorded(index)
            assert recorded is not None
            coming = self._coming[index] = defaultdict(list)
            for number, (version, _) in recorded.copies.items():
                coming[version].append(number)
        numbers = self._coming[index].pop(held.schedule.version, [])
        for number in numbers:
            self._passed[number][index] = _copy(self._store, held, number)
        if numbers:
            self._send_ready()

    def left(self, worker: int) -> None:
        """Do nothing: no snapshot depends on who is there."""

    def _send_ready(self) -> None:
        for link, number in list(self._fetches):
            if len(self._passed[number]) == self._mine:
                self._fetches.remove((link, number))
                _send(link, number, self._passed.pop(number))


def _copy(store: Store, held: SliceState, number: int) -> Copied:
    tensors = [held.weights.clone(), *(tensor.clone() for tensor in held.state.values())]
    store.order.copied(held.piece.number, number, held.schedule.version, tensors)
    return tensors, held.steps, dict(held.missed)


def _send(link: Link, number: int, copies: Copies) -> None:
    indices = sorted(copies)
    payloads = [tensor for index in indices for tensor in copies[index][0]]
    steps = [copies[index][1] for index in indices]
    missed = [copies[index][2] for index in indices]
    link.send(messages.Part(number, indices, steps, missed), payloads)
