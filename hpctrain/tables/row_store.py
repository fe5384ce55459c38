"""The rows of a table that are in this process: made, updated and forgotten."""

from __future__ import annotations

import itertools
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from hpctrain.tables.arena import Arena, Column
from hpctrain.tables.index import Ids
from hpctrain.tables.spec import SHARDS, TableSpec

SWEEP = 1024
"""Slots that each update looks at, for rows to forget."""

_LISTED = 2**16  # slots that a turn of a listing looks at

_INTEGER = Column(torch.int64)


class RowStore:
    """Rows by id. What is not there is what it begins with, so reading makes no row.

    When a row is forgotten depends on updates alone, not on when it is found: who looks at a row
    that is due treats it as forgotten. So nothing depends on how rows are divided among servers.

    Args:
        spec: Of the table.

    Attributes:
        spec: Of the table.
        version: Updates so far, those without any row counted.
        rows: Those that are made: ``weights``, the rule's state, and ``steps``, ``sights`` and
            ``touched``, the last update.
        candidates: Ids that are yet to be admitted: ``sights``, ``touched``.
        made: Rows made so far.
        forgotten: Rows forgotten so far.
    """

    def __init__(self, spec: TableSpec) -> None:
        self.spec = spec
        self.version = 0
        dtype = spec.torch_dtype
        self._state = spec.rule.widths(spec.dim)
        self.rows = Arena(
            {
                "weights": Column(dtype, spec.dim),
                **{name: Column(dtype, width) for name, width in self._state.items()},
                **dict.fromkeys(("steps", "sights", "touched"), _INTEGER),
            }
        )
        self.candidates = Arena({"sights": _INTEGER, "touched": _INTEGER})
        self.made = self.forgotten = 0
        self._cursors = {id(self.rows): 0, id(self.candidates): 0}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of rows and candidates."""
        return self.rows.nbytes + self.candidates.nbytes

    def read(self, ids: Tensor) -> Tensor:
        """Return rows, ``[n, dim]``.

        Args:
            ids: Of the rows, ``[n]``.
        """
        numbers = ids.numpy()
        slots = self.rows.find(numbers)
        there = np.flatnonzero(slots >= 0)
        there = there[~self._due(self.rows, slots[there], self.version + 1)]
        if len(there) == len(ids):
            return self.rows.read("weights", slots)
        out = torch.empty(len(ids), self.spec.dim, dtype=self.spec.torch_dtype)
        out[torch.from_numpy(there)] = self.rows.read("weights", slots[there])
        rest = np.setdiff1d(np.arange(len(ids)), there, assume_unique=True)
        out[torch.from_numpy(rest)] = self.spec.start_values(numbers[rest])
        return out

    def update(self, ids: Tensor, gradient: Tensor, sights: Tensor, lr_factor: float = 1.0) -> None:
        """Update rows, and make those that are due to be made.

        Args:
            ids: All distinct, ``[n]``.
            gradient: Of each, ``[n, dim]``; may be overwritten.
            sights: How often the update's samples have each, ``[n]``.
            lr_factor: On the rule's learning rate.
        """
        self.version += 1
        numbers = ids.numpy()
        slots = self._current(self.rows, numbers)
        new = np.flatnonzero(slots < 0)
        if len(new):
            slots[new] = self._admit(numbers[new], sights[torch.from_numpy(new)])
        known = np.flatnonzero(slots >= 0)
        if len(known):
            which = torch.from_numpy(known)
            self._apply(slots[known], gradient[which], sights[which], lr_factor)
        if self.spec.evict_after is not None:
            self._sweep(self.rows, 2 * len(ids))
            self._sweep(self.candidates, 2 * len(ids))

    def pass_over(self) -> None:
        """Count an update that has none of the rows."""
        self.version += 1
        if self.spec.evict_after is not None:
            self._sweep(self.rows, 0)
            self._sweep(self.candidates, 0)

    def statistics(self) -> dict[str, int]:
        """Return how many rows there are, were made and forgotten, and wait to be admitted."""
        return {
            "rows": len(self),
            "made": self.made,
            "forgotten": self.forgotten,
            "candidates": len(self.candidates),
            "bytes": self.nbytes,
        }

    def _apply(self, slots: Ids, gradient: Tensor, sights: Tensor, lr_factor: float) -> None:
        rows, rule = self.rows, self.spec.rule
        weights = rows.read("weights", slots)
        state = {name: rows.read(name, slots) for name in self._state}
        steps = rows.read("steps", slots).add_(1)
        rule.update(weights, gradient, state, steps, rule.lr * lr_factor)
        rows.write("weights", slots, weights)
        for name, values in state.items():
            rows.write(name, slots, values)
        rows.write("steps", slots, steps)
        rows.write("sights", slots, rows.read("sights", slots) + sights)
        rows.write("touched", slots, self.version)

    def _admit(self, ids: Ids, sights: Tensor) -> Ids:
        """Count ids that have no row; return the slots of new rows, or -1 for those without."""
        before = torch.zeros_like(sights)
        if self.spec.admit_after > 1:
            before = self._counted(ids, sights)
        admitted = np.flatnonzero((before + sights >= self.spec.admit_after).numpy())
        slots = np.full(len(ids), -1, np.int64)
        if len(admitted):
            slots[admitted] = self._make(ids[admitted], before[torch.from_numpy(admitted)])
        return slots

    def _counted(self, ids: Ids, sights: Tensor) -> Tensor:
        """Count sights of ids that have no row, and return how many there were before."""
        candidates = self.candidates
        slots = self._current(candidates, ids)
        before = torch.zeros_like(sights)
        known = np.flatnonzero(slots >= 0)
        before[torch.from_numpy(known)] = candidates.read("sights", slots[known])
        ready = (before + sights >= self.spec.admit_after).numpy()
        done = np.flatnonzero(ready & (slots >= 0))
        candidates.remove(ids[done], slots[done])
        new = np.flatnonzero(~ready & (slots < 0))
        slots[new] = candidates.add(ids[new])
        waiting = np.flatnonzero(~ready)
        which = torch.from_numpy(waiting)
        candidates.write("sights", slots[waiting], before[which] + sights[which])
        candidates.write("touched", slots[waiting], self.version)
        return before

    def _make(self, ids: Ids, sights: Tensor) -> Ids:
        slots = self.rows.add(ids)
        self.rows.write("weights", slots, self.spec.start_values(ids))
        starts = self.spec.rule.starts()
        for name in self._state:
            self.rows.write(name, slots, starts.get(name, 0.0))
        self.rows.write("steps", slots, 0)
        self.rows.write("sights", slots, sights)
        self.made += len(ids)
        return slots

    # Forgetting.

    def _due(self, arena: Arena, slots: Ids, version: int) -> np.ndarray:
        """Return which of these slots are evicted by the update of this number."""
        if self.spec.evict_after is None or not len(slots):
            return np.zeros(len(slots), bool)
        due = version - arena.read("touched", slots) > self.spec.evict_after
        if self.spec.evict_below is not None and arena is self.rows:
            due &= arena.read("sights", slots) < self.spec.evict_below
        return due.numpy()

    def _current(self, arena: Arena, ids: Ids) -> Ids:
        """Return the slots of ids, or -1; rows that are due are evicted before."""
        slots = arena.find(ids)
        there = np.flatnonzero(slots >= 0)
        due = there[self._due(arena, slots[there], self.version)]
        self._forget(arena, ids[due], slots[due])
        slots[due] = -1
        return slots

    def _sweep(self, arena: Arena, count: int) -> None:
        if not arena.used:
            return
        start = self._cursors[id(arena)]
        slots = (start + np.arange(min(max(SWEEP, count), arena.used))) % arena.used
        self._cursors[id(arena)] = int(slots[-1]) + 1
        # A slot that is free again has the id and the time of what it held; another may have it.
        ids = arena.read("id", slots).numpy()
        mine = (arena.find(ids) == slots) & self._due(arena, slots, self.version)
        self._forget(arena, ids[mine], slots[mine])

    def _forget(self, arena: Arena, ids: Ids, slots: Ids) -> None:
        arena.remove(ids, slots)
        if arena is self.rows:
            self.forgotten += len(ids)

    # For checkpoints.

    def listed(self, arena: Arena) -> Ids:
        """Return the slots of what is there and not due, by part of the table, then by id.

        Args:
            arena: ``rows`` or ``candidates``.
        """
        turns = self.listing(arena)
        while True:
            try:
                next(turns)
            except StopIteration as end:
                found: Ids = end.value
                return found

    def listing(self, arena: Arena) -> Generator[None, None, Ids]:
        """Do what ``listed`` does, a part a turn.

        Args:
            arena: ``rows`` or ``candidates``.
        """
        kept = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))]
        for start in range(0, arena.used, _LISTED):
            slots = np.arange(start, min(start + _LISTED, arena.used))
            ids = arena.read("id", slots).numpy()
            there = arena.find(ids) == slots
            there &= ~self._due(arena, slots, self.version + 1)
            parts = self.spec.shards(ids[there]).astype(np.uint8)
            kept.append((slots[there], ids[there], parts))
            yield
        slots, ids, parts = (np.concatenate(each) for each in zip(*kept, strict=True))
        order = np.argsort(parts, kind="stable")
        ends = np.cumsum(np.bincount(parts, minlength=SHARDS))
        for start, end in itertools.pairwise([0, *ends.tolist()]):
            order[start:end] = order[start:end][np.argsort(ids[order[start:end]])]
            yield
        found: Ids = slots[order]
        return found
