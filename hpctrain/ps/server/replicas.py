"""Replicas of slices: kept up to date, copied anew, and promoted where their primary is lost."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpctrain.ps.partition.placement import Placement
from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import Link
from hpctrain.ps.server.gradients import Gradients
from hpctrain.ps.server.peers import Peers
from hpctrain.ps.server.slice_state import Pushed, SliceState, encoded_rows
from hpctrain.ps.server.store import Store


class Replicas:
    """One server's replicas: others' of its slices, and its own of others' slices.

    Args:
        store: What this server holds.
        peers: Whose servers have them.
        gradients: Whose memory is used again.
    """

    def __init__(self, store: Store, peers: Peers, gradients: Gradients) -> None:
        self._store = store
        self._peers = peers
        self._gradients = gradients

    # A primary's part.

    def send(
        self, held: SliceState, push: Pushed, lr_factor: float, pushes: list[Pushed], made: bool
    ) -> None:
        """Have replicas make an update, or only count it where none is made.

        Args:
            held: The slice.
            push: The gradient that the update is made of.
            lr_factor: On the learning rate.
            pushes: All that the gradient is the mean of.
            made: Whether there is an update: somebody had samples.
        """
        # A copy: the update may use the gradient's memory.
        payloads = []
        if made and push.rows is not None:
            payloads = [encoded_rows(push.rows, push.gradient)]
        elif made:
            payloads = [push.gradient.clone()]
        message = messages.Replicate(
            held.piece.number, held.schedule.version - 1, push.hyper, lr_factor,
            [(p.worker, p.clock, p.read) for p in pushes],
            payloads[0].nbytes if payloads else None, sorted(push.absent),
        )  # fmt: skip
        for replica in held.replicas:
            self._peers.servers[replica].send(message, payloads)

    def pass_over(self, held: SliceState) -> None:
        """Have replicas count a round that goes by without an update of this slice."""
        message = messages.Replicate(
            held.piece.number, held.schedule.version - 1, [], 1.0, [], None
        )
        for replica in held.replicas:
            self._peers.servers[replica].send(message)

    def promote(self, held: SliceState, before: Placement) -> None:
        """Become the primary of a slice, after a failover, and send copies to new replicas.

        Args:
            held: The slice.
            before: The placement before the loss.
        """
        store, index = self._store, held.piece.number
        held.replicas = list(store.placement[index][1:])
        common = store.regions.common(held.piece) if store.consistency.same_weights else None
        if common is not None:  # which may hold an update that the lost server had just begun
            held.weights = common.copy_(held.weights)
        known = held.acknowledged
        held.acknowledged = {}
        for replica in held.replicas:
            if replica in before[index] and replica in known:
                held.acknowledged[replica] = known[replica]
            elif replica in self._peers.servers:
                held.acknowledged[replica] = 0
                copies = [tensor.clone() for tensor in (held.weights, *held.state.values())]
                self._peers.servers[replica].send(
                    messages.Copy(
                        index, held.schedule.version, held.steps, dict(held.schedule.applied),
                        held.log, [tensor.nbytes for tensor in copies], held.missed,
                    ),
                    copies,
                )  # fmt: skip

    # A replica's part.

    def update(self, message: messages.Replicate, buffer: torch.Tensor) -> None:
        """Make an update that the primary has made.

        Args:
            message: The update.
            buffer: The gradient as the primary applied it.
        """
        held = self._store.held[message.slice]
        push = Pushed(0, 0, 0, 1.0, message.hyper, *held.read(buffer))
        push.absent = frozenset(message.absent)
        held.update(self._store.rule, push, message.lr_factor, message.version + 1)
        if push.rows is None:
            self._gradients.recycle(buffer)

    def updated(self, link: Link, message: messages.Replicate) -> None:
        """Count an update of a replica, and acknowledge it.

        Args:
            link: With the primary.
            message: The update.
        """
        held = self._store.held[message.slice]
        held.schedule.version = message.version + 1
        for worker, clock, read in message.pushes:
            if self._store.order.keeps:
                held.log.append((message.version, worker, clock, read))
            if worker in held.schedule.applied:
                held.schedule.applied[worker] = clock + 1
        link.send(messages.Replicated(message.slice, message.version + 1))

    def copied(self, link: Link, message: messages.Copy, buffers: Sequence[torch.Tensor]) -> None:
        """Hold a copy of a slice that its primary has sent.

        Args:
            link: With the primary.
            message: Which slice, and what it has been through.
            buffers: Its weights and state.
        """
        held = self._store.hold(message.slice, message.version)
        held.steps, held.missed = message.steps, dict(message.missed)
        held.log = list(message.log)
        held.schedule.applied = dict(message.applied)
        for tensor, buffer in zip([held.weights, *held.state.values()], buffers, strict=True):
            tensor.copy_(buffer.view(tensor.dtype))
            self._gradients.recycle(buffer)
        link.send(messages.Replicated(message.slice, message.version))
