"""Gradients as they come to a server: the memory they lie in, and what is read there."""

from __future__ import annotations

from collections import defaultdict

import torch

from hpctrain.compression.codec import Codec
from hpctrain.ps.huge_pages import zeros
from hpctrain.ps.protocol import messages
from hpctrain.ps.server.slice_state import Pushed, SliceState
from hpctrain.ps.server.store import Store


class Gradients:
    """Reads gradients, and uses their memory again.

    Args:
        store: What the server holds, and the memory it shares with workers.
        codec: How they are compressed.
    """

    def __init__(self, store: Store, codec: Codec | None) -> None:
        self._store = store
        self._codec = codec
        self._pool: defaultdict[int, list[torch.Tensor]] = defaultdict(list)

    def buffer(self, size: int) -> torch.Tensor:
        """Return so many bytes of memory, used before if there is any."""
        free = self._pool[size]
        return free.pop() if free else zeros(size)

    def recycle(self, buffer: torch.Tensor | None) -> None:
        """Take back memory that nobody needs any more."""
        if buffer is not None:
            raw = buffer.view(torch.uint8)
            self._pool[raw.nbytes].append(raw)

    def free(self, push: Pushed) -> None:
        """Take back the memory of a push that nobody needs any more."""
        if push.rows is None and not push.near:
            self.recycle(push.gradient)

    def pushed(
        self,
        held: SliceState,
        worker: int,
        push: messages.Push,
        number: int,
        buffer: torch.Tensor | None,
    ) -> Pushed:
        """Read a worker's push of a slice.

        Args:
            held: The slice.
            worker: Whose push.
            push: With those of other slices.
            number: The slice's place among them.
            buffer: The gradient as it was sent; None: it lies in the worker's memory.
        """
        if buffer is None:
            gradient, rows = self._store.regions.gradient(worker, held.piece), None
        else:
            gradient, rows = self._decode(held, buffer)
        return Pushed(
            worker, push.clock, push.reads[number], push.weight, push.hyper[held.group],
            gradient, rows, buffer is None, frozenset(push.absent.get(held.piece.number, ())),
        )  # fmt: skip

    def _decode(
        self, held: SliceState, buffer: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A gradient that was sent: its values, and their rows if not all."""
        if self._codec is None or held.row_versions is not None:
            return held.read(buffer)
        gradient = self.buffer(held.weights.nbytes).view(held.weights.dtype)
        self._codec.decode(buffer, gradient)
        self.recycle(buffer)
        return gradient, None

    def own(self, held: SliceState, push: Pushed) -> None:
        """Copy a gradient that lies in its worker's memory, which may have to push it again.

        Args:
            held: The slice.
            push: Whose gradient.
        """
        if push.near:
            copy = self.buffer(held.weights.nbytes).view(held.weights.dtype)
            push.gradient, push.near = copy.copy_(push.gradient), False
