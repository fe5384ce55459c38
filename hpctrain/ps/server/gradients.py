"""Gradients as they come to a server: the memory they lie in, decoded, and their mean."""

from __future__ import annotations

from collections import defaultdict

import torch

from hpctrain.compression.codec import Codec, sum_rows
from hpctrain.ps.huge_pages import zeros
from hpctrain.ps.server.slice_state import Pushed, SliceState


class Gradients:
    """Reads gradients, and uses their memory again.

    Args:
        codec: How they are compressed.
    """

    def __init__(self, codec: Codec | None) -> None:
        self._codec = codec
        self._pool: defaultdict[int, list[torch.Tensor]] = defaultdict(list)

    def buffer(self, size: int) -> torch.Tensor:
        """So many bytes of memory."""
        free = self._pool[size]
        return free.pop() if free else zeros(size)

    def recycle(self, buffer: torch.Tensor | None) -> None:
        """Nobody needs this memory any more."""
        if buffer is not None:
            raw = buffer.view(torch.uint8)
            self._pool[raw.nbytes].append(raw)

    def free(self, push: Pushed) -> None:
        """Nobody needs this push any more."""
        if push.rows is None and not push.near:
            self.recycle(push.gradient)

    def decode(
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
        """Leave it as it is in its worker's memory: the worker may have to push it again."""
        if push.near:
            copy = self.buffer(held.weights.nbytes).view(held.weights.dtype)
            push.gradient, push.near = copy.copy_(push.gradient), False

    def aggregate(self, held: SliceState, pushes: list[Pushed]) -> None:
        """The mean over samples of a round's gradients, in the first of their buffers."""
        first = pushes[0]
        if len(pushes) == 1 and first.weight in (0.0, 1.0):
            return
        weight = sum(push.weight for push in pushes)
        self.own(held, first)
        if first.rows is not None:
            parts = [(p.rows, p.gradient) for p in pushes if p.rows is not None]
            first.rows, first.gradient = sum_rows(parts)
        else:
            for push in pushes[1:]:
                first.gradient += push.gradient
        if weight > 0:
            first.gradient /= weight
