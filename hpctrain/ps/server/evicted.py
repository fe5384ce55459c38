"""Workers that were given up though they live: they are told when they are heard again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpctrain.ps.protocol import messages
from hpctrain.ps.protocol.link import Link


class Evicted:
    """Keeps the links with workers that a server went on without."""

    def __init__(self) -> None:
        self._links: dict[int, tuple[Link, str]] = {}

    def add(self, link: Link, reason: str) -> None:
        """Remember a worker that was given up.

        Args:
            link: The link with it.
            reason: What it will be told.
        """
        self._links[link.peer] = (link, reason)

    def poll(self) -> None:
        """Tell those that are heard again that they were evicted."""
        for peer, (link, reason) in list(self._links.items()):
            if link.poll(_Deaf()):
                link.send(messages.Evicted(reason))
            if link.failed is not None:
                del self._links[peer]


class _Deaf:
    """Hears that something comes, and nothing else."""

    def buffers(self, link: Link, message: messages.Message) -> Sequence[torch.Tensor]:
        sizes = getattr(message, "sizes", ())
        return [torch.empty(size, dtype=torch.uint8) for size in sizes]

    def payload(
        self, link: Link, message: messages.Message, number: int, buffer: torch.Tensor
    ) -> None:
        pass

    def message(self, link: Link, message: messages.Message) -> None:
        pass
