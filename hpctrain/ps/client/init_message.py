"""How a worker tells the servers what is trained, and what to start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hpctrain.ps.partition.layout import Layout
from hpctrain.ps.partition.placement import Placement
from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import Link
from hpctrain.ps.update_rules import Rule


@dataclass(frozen=True)
class InitMessage:
    """What the servers are told.

    Attributes:
        layout: The same on every worker.
        rule: What the servers do with gradients.
        weights: Flats to start from.
        state: Of the update rule, by name, as flats; None: as at the very start.
        steps: Updates the state has had, by slice.
        missed: Likewise, by part of the slice, those without a gradient of it.
        clip_norm: Largest norm of the aggregated gradient.
    """

    layout: Layout
    rule: Rule
    weights: Sequence[torch.Tensor]
    state: Mapping[str, Sequence[torch.Tensor]] | None
    steps: Sequence[int] | None
    missed: Sequence[Mapping[int, int]] | None
    clip_norm: float | None

    def send(self, servers: Mapping[int, Link], placement: Placement) -> None:
        """Tell each server what is trained, with the slices that it holds.

        Args:
            servers: Links with them, by number.
            placement: For each slice its holders.
        """
        layout, steps = self.layout, self.steps
        flats = [self.weights, *(self.state.values() if self.state else ())]
        for server, link in servers.items():
            indices = [i for i, holders in enumerate(placement) if server in holders]
            updates = [steps[i] if steps else 0 for i in indices]
            payloads = []
            for index, done in zip(indices, updates, strict=True):
                piece = layout.slices[index]
                for kind in flats if done else flats[:1]:
                    payloads.append(kind[piece.flat][piece.start : piece.stop].clone())
            link.send(
                messages.Open(
                    list(layout.flats), layout.slice_bytes, layout.whole, self.rule.name,
                    indices, updates,
                    [dict(self.missed[i]) if self.missed else {} for i in indices],
                    self.clip_norm,
                ),
                payloads,
            )  # fmt: skip
