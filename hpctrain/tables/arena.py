"""Records in blocks that grow by doubling: none is ever moved, so that growth costs no pause."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from hpctrain.tables.index import Ids, Index

_FIRST = 1024
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64, torch.int64: np.int64}


class Column(NamedTuple):
    """One kind of values of each record.

    Attributes:
        dtype: Their type.
        width: How many there are; 0: one, without a dimension of its own.
    """

    dtype: torch.dtype
    width: int = 0

    def shape(self, count: int) -> tuple[int, ...]:
        """Return the shape of these values of so many records."""
        return (count, self.width) if self.width else (count,)


class Arena:
    """Records by id: columns of values, each in blocks.

    Args:
        columns: By name.

    Attributes:
        columns: By name.
        used: Slots that have ever been taken; some may be free again.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self.columns = {"id": Column(torch.int64), **columns}
        self.used = 0
        self._index = Index()
        self._blocks: list[dict[str, torch.Tensor]] = []
        self._free: list[Ids] = []

    def __len__(self) -> int:
        return self._index.size

    @property
    def nbytes(self) -> int:
        """Bytes of the slots that were ever taken."""
        each = sum(c.dtype.itemsize * max(1, c.width) for c in self.columns.values())
        return each * self.used

    def find(self, ids: Ids) -> Ids:
        """Return each id's slot, or -1."""
        return self._index.find(ids)

    def add(self, ids: Ids) -> Ids:
        """Return slots for ids that are not there, all distinct; values are left as they were."""
        slots = self._take(len(ids))
        self._index.add(ids, slots)
        self.write("id", slots, torch.from_numpy(ids))
        return slots

    def remove(self, ids: Ids, slots: Ids) -> None:
        """Remove records, and free their slots.

        Args:
            ids: Whose, all distinct and there.
            slots: Of each.
        """
        if len(ids):
            self._index.remove(ids)
            self._free.append(slots)

    def _take(self, count: int) -> Ids:
        parts = []
        while count and self._free:
            last = self._free.pop()
            if len(last) > count:
                self._free.append(last[count:])
                last = last[:count]
            parts.append(last)
            count -= len(last)
        parts.append(np.arange(self.used, self.used + count))
        self.used += count
        while _start(len(self._blocks)) < self.used:
            self._blocks.append(self._block(_FIRST << len(self._blocks)))
        return np.concatenate(parts)

    def _block(self, size: int) -> dict[str, torch.Tensor]:
        return {  # numpy's zeros are pages that come as they are touched
            name: torch.from_numpy(np.zeros(column.shape(size), _NUMPY[column.dtype]))
            for name, column in self.columns.items()
        }

    def read(self, name: str, slots: Ids) -> torch.Tensor:
        """Return a copy of a column of these slots.

        Args:
            name: The column's.
            slots: Which.
        """
        column = self.columns[name]
        out = torch.empty(column.shape(len(slots)), dtype=column.dtype)
        for block, where, inner in self._split(slots):
            out.index_copy_(0, where, self._blocks[block][name].index_select(0, inner))
        return out

    def write(self, name: str, slots: Ids, values: torch.Tensor | float) -> None:
        """Set a column of these slots.

        Args:
            name: The column's.
            slots: Which, all distinct.
            values: Of each, or of all.
        """
        for block, where, inner in self._split(slots):
            column = self._blocks[block][name]
            if isinstance(values, torch.Tensor):
                column.index_copy_(0, inner, values.index_select(0, where))
            else:
                column.index_fill_(0, inner, values)

    @staticmethod
    def _split(slots: Ids) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """Split slots by block: return which of them are in each, and where in it."""
        blocks: NDArray[np.int64] = np.log2(slots // _FIRST + 1).astype(np.int64)
        parts = []
        for block in np.unique(blocks).tolist():
            where = np.flatnonzero(blocks == block)
            inner = slots[where] - _start(block)
            parts.append((block, torch.from_numpy(where), torch.from_numpy(inner)))
        return parts


def _start(block: int) -> int:
    return _FIRST * ((1 << block) - 1)
