"""How a worker brings a snapshot of all slices together from the servers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hpctrain.ps.partition.layout import Layout
from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import Link
from hpctrain.ps.update_rules import Rule


@dataclass
class ServerSnapshot:
    """All slices at one point of the training.

    Attributes:
        weights: The flats.
        state: The flats of each tensor of the update rule, by name.
        steps: Updates the state has had, by slice.
        missed: Likewise, by part of the slice, those without a gradient of it.
    """

    weights: list[torch.Tensor]
    state: dict[str, list[torch.Tensor]]
    steps: list[int]
    missed: list[dict[int, int]]


class SnapshotFetch:
    """Fetches one snapshot at a time.

    Args:
        servers: Links with the servers that are left.

    Attributes:
        snapshot: The last one.
    """

    def __init__(self, servers: dict[int, Link]) -> None:
        self.snapshot: ServerSnapshot | None = None
        self._servers = servers
        self._parts: dict[int, messages.Part] = {}
        self._event: threading.Event | None = None

    @property
    def busy(self) -> bool:
        """Whether servers are yet to send their parts."""
        return self._event is not None

    @property
    def complete(self) -> bool:
        """Whether every slice has come; not so where a server was lost meanwhile."""
        found = sum(len(part.slices) for part in self._parts.values())
        return found == len(self._layout.slices)

    def open(self, layout: Layout, rule: Rule) -> None:
        """Say of which layout and update rule snapshots are.

        Args:
            layout: The same on every worker.
            rule: Whose state is part of a snapshot.
        """
        self._layout, self._rule = layout, rule

    def fetch(self, number: int, event: threading.Event) -> None:
        """Fetch a snapshot from all servers.

        Args:
            number: The coordinator's number of it.
            event: Set when all servers have sent their parts.
        """
        self._parts = {}
        self._event = event
        layout = self._layout
        kinds = [
            [torch.zeros(f.elements, dtype=f.torch_dtype) for f in layout.flats]
            for _ in range(1 + len(self._rule.state_names))
        ]
        state = dict(zip(self._rule.state_names, kinds[1:], strict=True))
        count = len(layout.slices)
        self.snapshot = ServerSnapshot(kinds[0], state, [0] * count, [{} for _ in range(count)])
        for link in self._servers.values():
            link.send(messages.Fetch(number))

    def buffers(self, message: messages.Part) -> Sequence[torch.Tensor]:
        """Return the memory that a server's part of the snapshot belongs to."""
        assert self.snapshot is not None
        kinds = [self.snapshot.weights, *self.snapshot.state.values()]
        pieces = [self._layout.slices[index] for index in message.slices]
        return [kind[p.flat][p.start : p.stop] for p in pieces for kind in kinds]

    def part(self, server: int, message: messages.Part) -> None:
        """Take in a server's part of the snapshot.

        Args:
            server: Whose part it is.
            message: Which slices it holds; their tensors have come already.
        """
        assert self.snapshot is not None and self._event is not None
        for index, steps, missed in zip(message.slices, message.steps, message.missed, strict=True):
            self.snapshot.steps[index], self.snapshot.missed[index] = steps, missed
        self._parts[server] = message
        self.count()

    def count(self) -> None:
        """Wake whoever waits if no server that is left is waited for any more."""
        if self._event is not None and set(self._parts) >= set(self._servers):
            event, self._event = self._event, None
            event.set()

    def fail(self) -> None:
        """Wake whoever waits: no more will come."""
        if self._event is not None:
            self._event.set()
