"""Read one field of a split, in each of the ways in which it may be stored."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from hpctrain.data.chunks import CACHE_BYTES, BadShard, BlockCache, ChunkedDataset
from hpctrain.data.hdf5 import open_file, own_bytes, sequences, spec_of_dataset, stored_as_numpy
from hpctrain.data.index import FieldSpec, ShardEntry
from hpctrain.data.mapping import Region, phase_of
from hpctrain.data.source import OFFSETS, Arrays, Empty

Numbers = NDArray[np.int64]

SEQUENCES = 32
"""Samples of varying length that are read at a time where HDF5 reads them."""


class Field(Protocol):
    """One field of all shards of a split."""

    def open(self, number: int, path: Path, shard: ShardEntry) -> None:
        """Make a shard's samples ready to be taken.

        Args:
            number: The shard's, within the split.
            path: Of its file.
            shard: Its entry in the index.

        Raises:
            OSError, KeyError, RuntimeError, ValueError: It is not what the index says.
        """

    def take(self, shards: Numbers, local: Numbers, empty: Empty) -> Arrays:
        """Return samples by suffix of the field's name: rows, and offsets of a ragged field.

        Args:
            shards: Shape (n,): the shard of each sample, which is open.
            local: Shape (n,): its number in that shard.
            empty: Gives the memory for them.

        Raises:
            BadShard: Some cannot be read.
        """


def field(
    dataset: str,
    spec: FieldSpec,
    shards: Sequence[ShardEntry],
    *,
    room: int = CACHE_BYTES,
    own: bool = False,
    compared: bool = False,
) -> Field:
    """Return the reader that suits how a field is stored.

    Args:
        dataset: Its name in the files.
        spec: What it is.
        shards: Of the split.
        room: Bytes of decompressed samples to keep.
        own: The files were written by hpctrain.
        compared: What is mapped was compared with what HDF5 reads when the files were adopted.
    """
    full = [shard for shard in shards if shard.samples]
    counts = np.array([shard.samples for shard in shards], dtype=np.int64)
    if spec.ragged:
        if all(f"{dataset}/values" in shard.offsets for shard in full):
            return _RaggedRows(dataset, spec)
        return _SequencesOfHdf5(dataset, spec, room)
    if spec.row_bytes == 0:
        return _NoBytes(spec)
    if is_mapped(dataset, shards):
        return _MappedRows(dataset, spec, len(counts), int(counts.sum()), own or compared)
    return _CachedBlocks(dataset, spec, counts, room, own)


def is_mapped(dataset: str, shards: Sequence[ShardEntry]) -> bool:
    """Whether a field is stored contiguously in all shards, as numpy has it.

    Args:
        dataset: The field's name in the files.
        shards: Of the split.
    """
    return all(dataset in shard.offsets for shard in shards if shard.samples)


class _MappedRows:
    """A field whose rows are mapped."""

    def __init__(
        self, dataset: str, spec: FieldSpec, shards: int, rows: int, compared: bool
    ) -> None:
        self._dataset = dataset
        self._spec = spec
        self._compared = compared
        self._shards, self._rows = shards, rows
        # One region, unless files put the field at offsets that no common grid of rows has.
        self._regions: dict[int, Region] = {}
        self._region_of = np.zeros(shards, dtype=np.int64)
        self._first_row = np.zeros(shards, dtype=np.int64)

    def open(self, number: int, path: Path, shard: ShardEntry) -> None:
        if not shard.samples:
            return
        offset = shard.offsets[self._dataset]
        if offset + shard.samples * self._spec.row_bytes > shard.bytes:
            raise ValueError(f"{self._dataset} leads beyond the file's end")
        if not self._compared:
            _check_stored(path, self._dataset, self._spec)
        phase = phase_of(offset, self._spec.row_bytes)
        if phase not in self._regions:
            self._regions[phase] = Region(self._spec.row_bytes, self._rows, self._shards, phase)
        self._region_of[number] = phase
        self._first_row[number] = self._regions[phase].map(path, offset, shard.samples)

    def _gather(self, shards: Numbers, local: Numbers, out: NDArray[np.uint8]) -> None:
        rows = self._first_row[shards] + local
        if len(self._regions) == 1:
            # Without a mode other than "raise", numpy gathers into a buffer first.
            for region in self._regions.values():
                np.take(region.rows, rows, axis=0, out=out, mode="clip")
            return
        phases = self._region_of[shards]
        for phase, region in list(self._regions.items()):
            mine = phases == phase
            out[mine] = region.rows[rows[mine]]

    def take(self, shards: Numbers, local: Numbers, empty: Empty) -> Arrays:
        rows = empty((len(local), *self._spec.shape), self._spec.kind)
        if len(local):
            self._gather(shards, local, as_bytes(rows))
        return {"": rows}


def _check_stored(path: Path, name: str, spec: FieldSpec) -> None:
    """Check a set that was adopted before types were looked at."""
    with open_file(path) as file:
        if spec_of_dataset(file[name]) != spec or not stored_as_numpy(file[name]):
            raise ValueError(f"{name} is stored in another way than numpy would; adopt it again")


class _CachedBlocks:
    """A field of chunked datasets, or of such as only HDF5 can read.

    Files differ in what a block is: those of as many rows share a cache.
    """

    def __init__(
        self, dataset: str, spec: FieldSpec, counts: Numbers, room: int, own: bool
    ) -> None:
        self._dataset = dataset
        self._spec = spec
        self._counts = counts
        self._room = room
        self._own = own
        self._caches: list[_Blocks] = []
        self._cache_of = np.zeros(len(counts), dtype=np.int64)
        self._first_block = np.zeros(len(counts), dtype=np.int64)

    def open(self, number: int, path: Path, shard: ShardEntry) -> None:
        if not shard.samples:
            return
        dataset = ChunkedDataset(path, self._dataset, self._spec, self._own)
        if dataset.rows < shard.samples:
            raise ValueError(f"{self._dataset} has {dataset.rows} rows, not {shard.samples}")
        which = next((i for i, b in enumerate(self._caches) if b.rows == dataset.block), -1)
        if which < 0:
            which = len(self._caches)
            most = int((-(-self._counts // dataset.block)).sum())
            self._caches.append(_Blocks(most, dataset.block, self._spec.row_bytes, self._room))
        self._first_block[number] = self._caches[which].add(number, dataset, shard.samples)
        self._cache_of[number] = which

    def take(self, shards: Numbers, local: Numbers, empty: Empty) -> Arrays:
        rows = empty((len(local), *self._spec.shape), self._spec.kind)
        caches = self._cache_of[shards]
        first = self._first_block[shards]
        for which, blocks in enumerate(list(self._caches)):
            mine = caches == which
            if mine.all():
                blocks.take(first, local, as_bytes(rows))
            elif mine.any():
                part = np.empty((int(mine.sum()), self._spec.row_bytes), np.uint8)
                blocks.take(first[mine], local[mine], part)
                as_bytes(rows)[mine] = part
        return {"": rows}


class _Blocks:
    """Blocks of as many rows, of any number of shards."""

    def __init__(self, most: int, rows: int, row_bytes: int, room: int) -> None:
        self.rows = rows
        self._shards: list[tuple[int, ChunkedDataset]] = []
        self._firsts: list[int] = []
        self._next = 0
        self._cache = BlockCache(most, rows, row_bytes, room, self._read)

    def add(self, number: int, dataset: ChunkedDataset, samples: int) -> int:
        """Return the number of a shard's first block."""
        first = self._next
        self._shards.append((number, dataset))
        self._firsts.append(first)
        self._next += -(-samples // self.rows)
        return first

    def take(self, first: Numbers, local: Numbers, out: NDArray[np.uint8]) -> None:
        """Rows by the number of their shard's first block, and their own number in the shard."""
        place, row = np.divmod(local, self.rows)
        self._cache.take(first + place, row, out)

    def _read(self, block: int, out: NDArray[np.uint8]) -> None:
        which = bisect_right(self._firsts, block) - 1
        shard, dataset = self._shards[which]
        try:
            dataset.read(block - self._firsts[which], out)
        except BadShard as error:
            error.shard = shard
            raise


class _RaggedRows:
    """A field of which each sample has any number of rows: mapped values, and mapped offsets."""

    def __init__(self, dataset: str, spec: FieldSpec) -> None:
        self._dataset = dataset
        self._spec = spec
        self._offsets: dict[int, NDArray[np.int64]] = {}
        self._values: dict[int, NDArray[np.uint8]] = {}

    def open(self, number: int, path: Path, shard: ShardEntry) -> None:
        if not shard.samples:
            return
        offsets = _mapped(path, shard.offsets[f"{self._dataset}/offsets"], shard.samples + 1, 8)
        self._offsets[number] = offsets.view(np.int64).reshape(-1)
        rows = int(self._offsets[number][-1])
        if (np.diff(self._offsets[number]) < 0).any() or self._offsets[number][0] != 0:
            raise ValueError(f"{self._dataset}/offsets do not rise from 0")
        start = shard.offsets[f"{self._dataset}/values"]
        if start + rows * self._spec.row_bytes > shard.bytes:
            raise ValueError(f"{self._dataset}/offsets lead beyond the file's end")
        self._values[number] = _mapped(path, start, rows, self._spec.row_bytes)

    def take(self, shards: Numbers, local: Numbers, empty: Empty) -> Arrays:
        pieces = []
        offsets = empty((len(local) + 1,), np.dtype(np.int64))
        offsets[0] = total = 0
        for i, (shard, sample) in enumerate(zip(shards.tolist(), local.tolist(), strict=True), 1):
            start, stop = self._offsets[shard][sample : sample + 2].tolist()
            pieces.append(self._values[shard][start:stop])
            offsets[i] = total = total + stop - start
        values = empty((total, *self._spec.shape), self._spec.kind)
        if total:
            np.concatenate(pieces, out=as_bytes(values))
        return {"": values, OFFSETS: offsets}


class _SequencesOfHdf5:
    """A field of text, or of HDF5's rows of varying length, which HDF5 alone can read."""

    def __init__(self, dataset: str, spec: FieldSpec, room: int) -> None:
        self._dataset = dataset
        self._spec = spec
        self._room = room
        self._open: dict[int, tuple[h5py.File, Path, h5py.Dataset]] = {}
        self._blocks: OrderedDict[tuple[int, int], list[NDArray[np.uint8]]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def open(self, number: int, path: Path, shard: ShardEntry) -> None:
        file = open_file(path)
        dataset = file[self._dataset]
        if not own_bytes(dataset) or spec_of_dataset(dataset) != self._spec:
            raise ValueError(f"{self._dataset} is not what the index says")
        if len(dataset) < shard.samples:
            raise ValueError(f"{self._dataset} has {len(dataset)} rows, not {shard.samples}")
        self._open[number] = file, path, dataset

    def take(self, shards: Numbers, local: Numbers, empty: Empty) -> Arrays:
        pieces = []
        offsets = empty((len(local) + 1,), np.dtype(np.int64))
        offsets[0] = total = 0
        for i, (shard, sample) in enumerate(zip(shards.tolist(), local.tolist(), strict=True), 1):
            piece = self._block(shard, sample // SEQUENCES)[sample % SEQUENCES]
            pieces.append(piece)
            offsets[i] = total = total + len(piece)
        values = empty((total, *self._spec.shape), self._spec.kind)
        if total:
            np.concatenate(pieces, out=as_bytes(values))
        return {"": values, OFFSETS: offsets}

    def _block(self, shard: int, number: int) -> list[NDArray[np.uint8]]:
        with self._lock:
            if (shard, number) in self._blocks:
                self._blocks.move_to_end((shard, number))
                return self._blocks[shard, number]
            _, path, dataset = self._open[shard]
            start = number * SEQUENCES
            try:
                rows = sequences(dataset, start, start + SEQUENCES)
            except (OSError, ValueError, RuntimeError, KeyError) as error:
                bad = BadShard(
                    f"shard {path}: {self._dataset}, samples from {start}, cannot be read: "
                    f"{' '.join(str(error).split())}.",
                    hint="it is corrupt; `hpctrain data verify` tells what else is.",
                )
                bad.shard = shard
                raise bad from error
            found = self._blocks[shard, number] = [
                row.view(np.uint8).reshape(len(row), self._spec.row_bytes) for row in rows
            ]
            self._bytes += sum(row.nbytes for row in found)
            while self._bytes > self._room and len(self._blocks) > 1:
                self._bytes -= sum(row.nbytes for row in self._blocks.popitem(last=False)[1])
            return found


class _NoBytes:
    """A field whose samples have no bytes."""

    def __init__(self, spec: FieldSpec) -> None:
        self._spec = spec

    def open(self, number: int, path: Path, shard: ShardEntry) -> None:
        pass

    def take(self, shards: Numbers, local: Numbers, empty: Empty) -> Arrays:
        return {"": empty((len(local), *self._spec.shape), self._spec.kind)}


def _mapped(path: Path, offset: int, rows: int, row_bytes: int) -> NDArray[np.uint8]:
    if rows * row_bytes == 0:
        return np.empty((rows, row_bytes), np.uint8)
    return np.memmap(path, np.uint8, mode="r", offset=offset, shape=(rows, row_bytes))


def as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the same memory as rows of bytes, of shape (n, row bytes)."""
    return (
        array.view(np.uint8).reshape(len(array), -1)
        if array.size
        else np.empty((len(array), 0), np.uint8)
    )
