"""The slices that a server holds, and who holds which besides: no message is sent here."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpctrain.config import PsConfig
from hpctrain.errors import PeerLost
from hpctrain.ps.consistency import consistency_of
from hpctrain.ps.consistency.base import Schedule
from hpctrain.ps.consistency.replayed import Replayed
from hpctrain.ps.huge_pages import zeros
from hpctrain.ps.partition.layout import Layout
from hpctrain.ps.partition.placement import Placement, place, without
from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.regions import Regions
from hpctrain.ps.server.order_log import OrderLog
from hpctrain.ps.server.peers import Peers
from hpctrain.ps.server.slice_state import SliceState
from hpctrain.ps.update_rules import Rule, rule_named


class Store:
    """What one server holds.

    Args:
        peers: This server's number, who takes part, and who served at the beginning.
        config: The same on every rank.
        order: The order of updates, where it is recorded or replayed.
        regions: Memory shared with the workers of this host.

    Attributes:
        held: The slices, by number.
        layout: None until a worker has told.
        sizes: Bytes of each slice.
        placement: For each slice its holders, this server or not.
        rule: What is done with gradients.
        clip_norm: Largest norm of the aggregated gradient.
    """

    rule: Rule
    placement: Placement

    def __init__(self, peers: Peers, config: PsConfig, order: OrderLog, regions: Regions) -> None:
        self.consistency = consistency_of(config)
        self.order = order
        self.regions = regions
        self.held: dict[int, SliceState] = {}
        self.layout: Layout | None = None
        self.sizes: list[int] = []
        self.clip_norm: float | None = None
        self._peers = peers
        self._config = config

    def open(self, message: messages.Open) -> list[torch.Tensor]:
        """Learn what is trained; return the memory for the slices that this server is sent."""
        self.layout = Layout(message.flats, message.slice_bytes, whole=message.whole)
        self.rule = rule_named(message.rule)
        self.clip_norm = message.clip_norm
        self.sizes = self.layout.sizes()
        self.placement = place(
            self.sizes, self._peers.initial_servers, method=self._config.placement,
            replicas=self._config.replicas,
        )  # fmt: skip
        self.order.open(self.layout)
        self.regions.lay_out(self.layout)
        buffers = []
        for index, steps, missed in zip(message.slices, message.steps, message.missed, strict=True):
            held = self.hold(index, 0)
            held.steps, held.missed = steps, dict(missed)
            if self.placement[index][0] == self._peers.me:
                held.replicas = list(self.placement[index][1:])
                held.acknowledged = dict.fromkeys(held.replicas, 0)
            buffers += [held.weights, *(held.state.values() if steps else ())]
        return buffers

    def share(self, regions: Regions) -> None:
        """Reach the memory of this host's workers from now on.

        It may come late: a worker of another host may have told before what is trained.
        """
        self.regions = regions
        if self.layout is None:
            return
        regions.lay_out(self.layout)
        for held in self.held.values() if self.consistency.same_weights else ():
            common = regions.common(held.piece) if self.primary(held.piece.number) else None
            if common is not None:
                held.weights = common.copy_(held.weights)

    def open_again(self, message: messages.Open) -> list[torch.Tensor]:
        """Return memory for slices that are known already, and not needed."""
        sizes = [
            size
            for index, steps in zip(message.slices, message.steps, strict=True)
            for size in [self.sizes[index]] * (1 + (len(self.rule.state_names) if steps else 0))
        ]
        return [torch.empty(size, dtype=torch.uint8) for size in sizes]

    def hold(self, index: int, version: int) -> SliceState:
        """Hold a slice; its weights and state are yet to be filled in.

        Args:
            index: Which.
            version: Updates that it has had.
        """
        assert self.layout is not None
        piece = self.layout.slices[index]
        flat = self.layout.flats[piece.flat]
        weights = None
        if self.consistency.same_weights and self.placement[index][0] == self._peers.me:
            weights = self.regions.common(piece)
        if weights is None:
            weights = zeros(self.sizes[index]).view(flat.torch_dtype)
        state = self.rule.new_state(weights)
        schedule: Schedule
        recorded = self.order.recorded(index)
        if recorded is not None:
            schedule = Replayed(self._peers.workers, recorded.pushes, recorded.answers)
        else:
            schedule = self.consistency.schedule(self._peers.workers)
        schedule.version = version
        held = SliceState(piece, flat.group, flat.width, weights, state, schedule)
        if flat.width:
            # Whoever read an older version than a copy's gets every row.
            held.row_versions = torch.full((piece.elements // flat.width,), version)
        self.held[index] = held
        return held

    def primary(self, index: int) -> bool:
        """Return whether this server is the one that updates a slice."""
        return index in self.held and self.placement[index][0] == self._peers.me

    def inherit(self, lost: int, survivors: Sequence[int]) -> None:
        """Work out who holds what after the loss of a server: the failover.

        Args:
            lost: The server that is gone.
            survivors: The others.

        Raises:
            PeerLost: The slices, or one of them, are lost.
        """
        self.placement = without(self.placement, self.sizes, lost, survivors)
        mine = {i for i, holders in enumerate(self.placement) if holders[0] == self._peers.me}
        # Another server may have been lost just before, and some were yet to be copied.
        if missing := mine - set(self.held):
            raise PeerLost(
                f"server {lost} is lost, and with it the only whole copy of {len(missing)} "
                "slices of the parameters.",
                hint="more ps.replicas survive more losses at a time; now, go on from a "
                "checkpoint.",
            )
