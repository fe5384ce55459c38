"""Plan who reads what: which samples of which batches fall to a rank."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.order import Order, portion
from hpctrain.data.random import Integers
from hpctrain.world.world import Part

# A plan is for so many samples of a rank: few at first, so that the first batch is soon there.
PLAN_POSITIONS = (1024, 32768)


class Span(NamedTuple):
    """A span of consecutive global batches of an epoch.

    Attributes:
        start: First position.
        stop: Position after the last; the last batch may be smaller.
        batch_size: Global.
    """

    start: int
    stop: int
    batch_size: int

    def first(self, batches: int) -> Span:
        """Return the span of its first batches, so many or all there are."""
        return self._replace(stop=min(self.stop, self.start + batches * self.batch_size))

    def holds(self, other: Span) -> bool:
        """Whether the other's batches are among these."""
        return (
            self.batch_size == other.batch_size
            and self.start <= other.start
            and other.stop <= self.stop
            and (other.start - self.start) % self.batch_size == 0
        )

    def batches(self) -> list[tuple[int, int]]:
        """Return each batch's first position, and that after its last."""
        starts = range(self.start, self.stop, self.batch_size)
        return [(start, min(start + self.batch_size, self.stop)) for start in starts]


class Plan:
    """The samples that a rank reads in an epoch.

    It is worked out for many batches at a time, which costs little more than for one.

    Args:
        order: Of the epoch.
        part: What of each global batch falls to the rank.
    """

    def __init__(self, order: Order, part: Part) -> None:
        self.order = order
        self.part = part
        self._lock = threading.Lock()
        self._worked_out = 0
        # The newest few pieces, because threads are not at the same place.
        self._pieces: deque[_Piece] = deque(maxlen=4)

    def batches(self, span: Span) -> tuple[Integers, NDArray[np.int64], list[int]]:
        """Return what falls to this rank of the batches of a span.

        Returns:
            Positions and samples, batch after batch, and where in them each batch begins, and the
            last ends.
        """
        with self._lock:
            for piece in self._pieces:
                if piece.span.holds(span):
                    break
            else:
                piece = self._work_out(span)
                self._pieces.append(piece)
        first = (span.start - piece.span.start) // span.batch_size
        bounds = piece.bounds[first : first + len(span.batches()) + 1]
        part = slice(bounds[0], bounds[-1])
        return piece.positions[part], piece.indices[part], [end - bounds[0] for end in bounds]

    def _work_out(self, span: Span) -> _Piece:
        wanted = min(PLAN_POSITIONS[1], PLAN_POSITIONS[0] << 2 * self._worked_out)
        self._worked_out += 1
        _, size, lower, upper, total = self.part
        # A rank with little has no more batches worked out than one with an equal part: the list of
        # them would be long.
        ranks = min(size, total // max(upper - lower, 1))
        count = max(len(span.batches()), wanted * ranks // span.batch_size)
        span = span._replace(stop=self.order.samples).first(count)
        parts = [portion(start, stop, lower, upper, total) for start, stop in span.batches()]
        positions = np.concatenate([np.arange(*part, dtype=np.uint64) for part in parts])
        bounds = list(itertools.accumulate((stop - start for start, stop in parts), initial=0))
        return _Piece(span, positions, self.order.indices(positions), bounds)


class _Piece(NamedTuple):
    """What a rank reads of the batches of a span."""

    span: Span
    positions: Integers
    indices: NDArray[np.int64]
    bounds: list[int]
