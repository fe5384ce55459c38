"""Where a worker's weights and gradients lie, and how servers of its host reach them.

A worker's memory holds the gradients of all flats, then the weights. Servers of the host map it
(an MPI shared window), so that nothing has to be sent. Where all workers take each step together,
they and the servers of a host use one set of weights, updated in place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hpctrain.ps.partition.layout import Layout, Slice

ALIGNMENT = 64


def region_bytes(layout: Layout) -> int:
    """Return the bytes of the flats of one kind (gradients, or weights)."""
    return sum(
        -(-flat.elements * flat.torch_dtype.itemsize // ALIGNMENT) * ALIGNMENT
        for flat in layout.flats
    )


def flats_in(memory: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """Return the flats as 1-D views of a region of bytes.

    Args:
        memory: The region.
        layout: What lies in it.
    """
    flats = []
    start = 0
    for flat in layout.flats:
        size = flat.elements * flat.torch_dtype.itemsize
        flats.append(memory[start : start + size].view(flat.torch_dtype))
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return flats


class Regions:
    """The memory of this host's workers, as bytes until it is known what they hold.

    Args:
        memory: By worker: gradients, then weights (or no weights, where another's are used).
        common: The worker whose weights all workers of this host use; None: each has its own.
    """

    def __init__(
        self, memory: Mapping[int, torch.Tensor] | None = None, common: int | None = None
    ) -> None:
        self._memory = dict(memory or {})
        self._owner = common
        self._common: list[torch.Tensor] | None = None
        self._gradients: dict[int, list[torch.Tensor]] = {}
        self._weights: dict[int, list[torch.Tensor]] = {}
        # Views of slices, made once: making one costs as much as a small update.
        self._views: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def lay_out(self, layout: Layout) -> None:
        """Find the flats in the memory.

        What servers work with counts its changes by itself (``.data``): a worker takes a change of
        its gradients for one that the user made, and a server in its process averages in them, and
        updates weights in the memory that they are a part of.
        """
        size = region_bytes(layout)
        if self._owner is not None:
            whole = self._memory[self._owner].data
            self._common = [flat.data for flat in flats_in(whole[size:], layout)]
        for worker, memory in self._memory.items():
            self._gradients[worker] = flats_in(memory[:size], layout)
            self._weights[worker] = self._common or flats_in(memory[size:], layout)
            for piece in layout.slices:
                part = slice(piece.start, piece.stop)
                self._views[worker, piece.number] = (
                    self._gradients[worker][piece.flat].data[part],
                    self._weights[worker][piece.flat].data[part],
                )

    def has(self, worker: int) -> bool:
        """Return whether a worker's memory is within reach."""
        return worker in self._memory

    def flats(self, worker: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return a worker's weights and gradients."""
        return self._weights[worker], self._gradients[worker]

    def common(self, piece: Slice) -> torch.Tensor | None:
        """Return the weights that all workers of this host use, or None."""
        return None if self._common is None else self._common[piece.flat][piece.start : piece.stop]

    def gradient(self, worker: int, piece: Slice) -> torch.Tensor:
        """Return a worker's gradient of a slice, in its own memory.

        Args:
            worker: Whose.
            piece: The slice.
        """
        return self._views[worker, piece.number][0]

    def put(self, worker: int, piece: Slice, weights: torch.Tensor) -> None:
        """Give a worker new weights of a slice, unless it has the very same memory.

        Args:
            worker: Who gets them.
            piece: The slice.
            weights: Its new weights.
        """
        if self._common is None:
            self._views[worker, piece.number][1].copy_(weights)
