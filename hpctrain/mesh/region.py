"""Which part of a parameter a rank holds, in the coordinates of the whole one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

Runs = tuple[tuple[int, int], ...]
"""Elements along a dimension: runs of them, each from its first to the one after its last."""


class Region(NamedTuple):
    """A part of a tensor: along each dimension some runs of its elements.

    Attributes:
        shape: Of the whole tensor.
        runs: Along each dimension.

    Example:
        >>> rows = Region.whole((6, 2)).ordered([0, 1, 4, 5, 2, 3]).narrowed(0, 1, 3)
        >>> rows.runs
        (((1, 2), (4, 5)), ((0, 2),))
        >>> rows.take(torch.arange(12).view(6, 2)).tolist()
        [[2, 3], [8, 9]]
    """

    shape: tuple[int, ...]
    runs: tuple[Runs, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        """Return all of a tensor of that shape."""
        return cls(tuple(shape), tuple(((0, n),) for n in shape))

    def ordered(self, rows: Sequence[int]) -> Region:
        """Return the same elements with the rows in another order.

        Args:
            rows: The n-th is which row comes there.
        """
        runs: list[tuple[int, int]] = []
        for row in rows:
            if runs and runs[-1][1] == row:
                runs[-1] = (runs[-1][0], row + 1)
            else:
                runs.append((row, row + 1))
        return self._replace(runs=(tuple(runs), *self.runs[1:]))

    def narrowed(self, dim: int, start: int, stop: int) -> Region:
        """Return a part of this one.

        Args:
            dim: Along which dimension.
            start: Its first element, counted within this region.
            stop: The one after its last.
        """
        found, place = [], 0
        for first, last in self.runs[dim]:
            begin, end = max(start - place, 0), min(stop - place, last - first)
            if begin < end:
                found.append((first + begin, first + end))
            place += last - first
        runs = list(self.runs)
        runs[dim] = tuple(found)
        return self._replace(runs=tuple(runs))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of a tensor that holds the region."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self.runs)

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.sizes)

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the region's values of the whole tensor, in memory of their own."""
        for dim, runs in enumerate(self.runs):
            if runs != ((0, self.shape[dim]),):
                parts = [whole.narrow(dim, start, stop - start) for start, stop in runs]
                whole = torch.cat(parts, dim) if parts else whole.narrow(dim, 0, 0)
        return whole.clone(memory_format=torch.contiguous_format)

    def put(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Write the region's values into the whole tensor.

        Args:
            whole: Of the shape ``shape``.
            part: Of the shape ``sizes``.
        """
        for target, source in self._boxes():
            whole[target] = part[source]

    def _boxes(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """Yield each box's place in the whole tensor, and in one that holds the region."""
        spans = []
        for runs in self.runs:
            ends = itertools.accumulate((stop - start for start, stop in runs), initial=0)
            spans.append(
                [
                    (slice(start, stop), slice(place, place + stop - start))
                    for (start, stop), place in zip(runs, ends, strict=False)
                ]
            )
        for pairs in itertools.product(*spans):
            yield tuple(target for target, _ in pairs), tuple(source for _, source in pairs)


def rows_by_head(heads: int, width: int, parts: int, ranks: int) -> list[int]:
    """Return rows of a fused projection in the order in which ranks take equal runs of them.

    Of queries, keys and values laid one after the other, each rank takes the same heads.

    Args:
        heads: Of each of the parts.
        width: Rows of a head.
        parts: How many are fused: 3 of queries, keys and values.
        ranks: That divide them.

    Example:
        >>> rows_by_head(heads=2, width=1, parts=3, ranks=2)
        [0, 2, 4, 1, 3, 5]
    """
    each = heads // ranks * width
    return [
        part * heads * width + rank * each + row
        for rank in range(ranks)
        for part in range(parts)
        for row in range(each)
    ]
