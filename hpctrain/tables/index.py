"""Which slot an id has: a hash table of 64-bit integers that grows a little with every call."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.random import mix

Ids = NDArray[np.int64]

_SMALLEST = 1024
_MOVED = 4  # places of the smaller table that are moved for each id that is added
_FREE, _GONE = 0, -1  # else a slot, plus 1


def _zeros(count: int) -> Ids:
    """Return ``count`` zeros, in small pages that are filled as they are touched.

    Ids go to places all over: of huge pages the first call would have the system fill them all.
    """
    memory = mmap.mmap(-1, 8 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.int64)


class _Places:
    """Open addressing with linear probing; at most half of the places are used."""

    def __init__(self, capacity: int) -> None:
        self.keys, self.slots = _zeros(capacity), _zeros(capacity)
        self.taken = 0

    @property
    def capacity(self) -> int:
        return len(self.slots)

    def _first(self, ids: Ids) -> Ids:
        mask = np.uint64(self.capacity - 1)
        return (mix(ids.view(np.uint64)) & mask).astype(np.int64)

    def find(self, ids: Ids) -> tuple[Ids, Ids]:
        """Find each id's slot and place, or -1 where an id is not there."""
        slots, places = np.full(len(ids), -1, np.int64), np.full(len(ids), -1, np.int64)
        left, at = np.arange(len(ids)), self._first(ids)
        while len(left):
            found = self.slots[at]
            hit = (found > 0) & (self.keys[at] == ids[left])
            slots[left[hit]], places[left[hit]] = found[hit] - 1, at[hit]
            on = ~hit & (found != _FREE)
            left, at = left[on], (at[on] + 1) & (self.capacity - 1)
        return slots, places

    def put(self, ids: Ids, slots: Ids) -> None:
        """Add ids that are not there yet.

        Args:
            ids: All distinct, ``[n]``.
            slots: Of each, ``[n]``.
        """
        self.taken += len(ids)
        left, at = np.arange(len(ids)), self._first(ids)
        while len(left):
            free = self.slots[at] == _FREE
            # Several may want the same place: the last of them has it.
            self.keys[at[free]], self.slots[at[free]] = ids[left[free]], slots[left[free]] + 1
            on = self.slots[at] != slots[left] + 1
            left, at = left[on], (at[on] + 1) & (self.capacity - 1)


class Index:
    """Maps ids to slots.

    A larger table is filled from the smaller one call by call, so that no call takes long, however
    many ids there are.

    Attributes:
        size: How many ids there are.
    """

    def __init__(self) -> None:
        self.size = 0
        self._new = _Places(_SMALLEST)
        self._old: _Places | None = None
        self._moved = 0

    def find(self, ids: Ids) -> Ids:
        """Return each id's slot, or -1.

        Args:
            ids: In any order, maybe repeated.
        """
        slots, _ = self._new.find(ids)
        if self._old is not None:
            missing = np.flatnonzero(slots < 0)
            slots[missing] = self._old.find(ids[missing])[0]
        return slots

    def add(self, ids: Ids, slots: Ids) -> None:
        """Add ids that are not there.

        Args:
            ids: All distinct.
            slots: Of each, distinct from all others that are there.
        """
        self._move(_MOVED * len(ids))
        while 2 * (self._new.taken + len(ids)) > self._new.capacity:
            self._move(self._new.capacity)  # all that is left, if anything
            old = self._new
            self._old, self._moved = old, 0
            # Where most places are of removed ids, the next one need not be larger.
            grown = 4 * (self.size + len(ids)) > old.capacity
            self._new = _Places(2 * old.capacity if grown else old.capacity)
            self._move(_MOVED * len(ids))
        self._new.put(ids, slots)
        self.size += len(ids)

    def remove(self, ids: Ids) -> None:
        """Remove ids that are there.

        Args:
            ids: All distinct.
        """
        self.size -= len(ids)
        for places in (self._new, self._old):
            if places is not None:
                where = places.find(ids)[1]
                places.slots[where[where >= 0]] = _GONE

    def _move(self, count: int) -> None:
        if self._old is None:
            return
        stop = min(self._moved + count, self._old.capacity)
        slots = self._old.slots[self._moved : stop]
        there = np.flatnonzero(slots > 0)
        self._new.put(self._old.keys[self._moved + there], slots[there] - 1)
        self._moved = stop
        if stop == self._old.capacity:
            self._old = None
