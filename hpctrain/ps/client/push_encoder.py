"""Gradients as a worker sends them: compressed, or the rows that a step has touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hpctrain.compression.codec import Codec, ErrorFeedback, encode_rows, rows_capacity
from hpctrain.ps.partition.layout import Flat, Layout, Slice


class PushEncoder:
    """Encodes gradients for their way to the servers.

    Args:
        codec: How they are compressed.
        layout: Of the flats.
        gradients: The flats.
    """

    def __init__(
        self, codec: Codec | None, layout: Layout, gradients: Sequence[torch.Tensor]
    ) -> None:
        self._codec = codec
        self._layout = layout
        self._gradients = gradients
        self._rows: dict[int, torch.Tensor] = {}
        self._by_rows = {p.number for p in layout.slices if layout.flats[p.flat].width}
        self._encoded: dict[int, torch.Tensor] = {}  # pushes that may have to be sent again
        self._feedback: dict[int, ErrorFeedback] = {}
        if codec is not None and codec.feedback:
            self._feedback = {
                piece.number: ErrorFeedback(
                    codec, piece.elements, layout.flats[piece.flat].torch_dtype
                )
                for piece in layout.slices
                if piece.number not in self._by_rows
            }

    def begin(self) -> None:
        """Begin a step, which has touched no rows yet."""
        self._rows = {}

    def touch(self, rows: Mapping[int, torch.Tensor]) -> None:
        """Note the rows that this step has touched, by flat."""
        self._rows.update(rows)

    def by_rows(self, index: int) -> bool:
        """Return whether a slice's gradient is sent as rows."""
        return index in self._by_rows

    def payload(self, index: int) -> torch.Tensor:
        """Return a slice's gradient as it is sent."""
        piece = self._layout.slices[index]
        flat = self._layout.flats[piece.flat]
        gradient = self._gradients[piece.flat][piece.start : piece.stop]
        if flat.width:
            return self._touched(piece, flat, gradient)
        if self._codec is None:
            return gradient
        if index in self._encoded:  # to encode it again would count what was left out twice
            return self._encoded[index]
        out = torch.empty(
            self._codec.capacity(piece.elements, gradient.itemsize), dtype=torch.uint8
        )
        encoder = self._feedback.get(index, self._codec)
        self._encoded[index] = out[: encoder.encode(gradient, out)]
        return self._encoded[index]

    def _touched(self, piece: Slice, flat: Flat, gradient: torch.Tensor) -> torch.Tensor:
        first = piece.start // flat.width
        rows = self._rows.get(piece.flat, torch.empty(0, dtype=torch.int64))
        rows = rows[(rows >= first) & (rows < piece.stop // flat.width)] - first
        values = gradient.view(-1, flat.width)[rows]
        capacity = rows_capacity(len(rows), flat.width, values.itemsize)
        out = torch.empty(capacity, dtype=torch.uint8)
        return out[: encode_rows(rows, values, out)]

    def answered(self, index: int) -> None:
        """Forget a push that need not be sent again."""
        self._encoded.pop(index, None)
