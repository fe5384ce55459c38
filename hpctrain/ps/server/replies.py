"""A server's answers to workers: what they read, several slices in one message."""

from __future__ import annotations

from collections import Counter, defaultdict

from hpctrain.config import PsConfig
from hpctrain.ps.protocol import messages
from hpctrain.ps.server.peers import Peers
from hpctrain.ps.server.slice_state import SliceState
from hpctrain.ps.server.store import Store

ANSWER_BYTES = 2**21
"""Answers are sent as soon as so many bytes of weights are ready for a worker."""


class Replies:
    """Answers workers, when replicas have what they are answered with.

    Args:
        store: What the server holds.
        peers: Who takes part.
        config: The same on every rank.
    """

    def __init__(self, store: Store, peers: Peers, config: PsConfig) -> None:
        self._store = store
        self._peers = peers
        self._compensates = bool(config.delay_compensation)
        self._ready: defaultdict[int, list[tuple[SliceState, int, bool]]] = defaultdict(list)
        self._ready_bytes: Counter[int] = Counter()

    def grant(self, held: SliceState, worker: int) -> None:
        """Answer a worker as soon as no failover can take back what it reads.

        Args:
            held: The slice.
            worker: Who is answered.
        """
        newest = held.schedule.version
        if not held.replicas or all(done >= newest for done in held.acknowledged.values()):
            if worker in held.schedule.applied:
                clock = held.schedule.applied[worker] - 1
                self._store.order.answered(held.piece.number, newest, worker, clock)
            self.answer(held, worker)
        else:
            held.delayed.append(worker)

    def grant_delayed(self, held: SliceState) -> None:
        """Try again to answer workers: a replica has acknowledged an update."""
        delayed, held.delayed = held.delayed, []
        for worker in delayed:
            self.grant(held, worker)

    def answer(self, held: SliceState, worker: int) -> None:
        """Answer a worker soon, together with other slices.

        Args:
            held: The slice.
            worker: Who is answered.
        """
        if worker not in self._peers.workers:
            return
        pull = held.wants[worker]
        # The version of now: there may be updates before the answer is sent.
        self._ready[worker].append((held, held.schedule.version, pull))
        self._ready_bytes[worker] += held.weights.nbytes
        regions = self._store.regions
        near = regions.has(worker)
        if pull and near:
            regions.put(worker, held.piece, held.weights)
        if pull and (not near or self._compensates):
            self._keep_for(held, worker)
        if self._ready_bytes[worker] >= ANSWER_BYTES:
            self._send(worker)

    def send_all(self) -> None:
        """Send all answers that are ready."""
        for worker in [worker for worker, answers in self._ready.items() if answers]:
            self._send(worker)

    def forget(self, worker: int) -> None:
        """Drop the answers for a worker that is done or lost."""
        self._ready.pop(worker, None)

    def _keep_for(self, held: SliceState, worker: int) -> None:
        """Copy the weights where the next update would change them while they are being sent."""
        if held.width:
            held.sent[worker] = held.news(worker)
        elif self._store.consistency.same_weights:
            held.sent[worker] = held.weights
        elif worker in held.sent:
            held.sent[worker].copy_(held.weights)
        else:
            held.sent[worker] = held.weights.clone()

    def _send(self, worker: int) -> None:
        answers = self._ready.pop(worker)
        del self._ready_bytes[worker]
        for pull in (True, False):
            some = [(held, version) for held, version, wanted in answers if wanted == pull]
            if not some:
                continue
            first = some[0][0]
            lead = first.schedule.applied.get(worker, 0) - first.schedule.slowest
            payloads = []
            if pull and not self._store.regions.has(worker):
                payloads = [held.sent[worker] for held, _ in some]
            self._peers.workers[worker].send(
                messages.Weights(
                    [held.piece.number for held, _ in some],
                    [version for _, version in some],
                    [payload.nbytes for payload in payloads],
                    lead,
                    first.norm,
                    pull,
                    max(held.schedule.applied.get(worker, 0) for held, _ in some),
                ),
                payloads,
            )
