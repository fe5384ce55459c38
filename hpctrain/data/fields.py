"""Reading one field of a split, in each of the ways in which it may be stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.chunks import BadShard, BlockCache, ChunkedDataset
from hpctrain.data.index import FieldSpec, ShardEntry
from hpctrain.data.mapping import Region, phase_of
from hpctrain.data.source import OFFSETS, Arrays, Empty

Numbers = NDArray[np.int64]


class Field(Protocol):
    """One field of all shards of a split."""

    def open(self, number: int, path: Path, shard: ShardEntry) -> None:
        """Make a shard's samples ready to be taken.

        Raises:
            OSError, KeyError, RuntimeError, ValueError: It is not what the index says.
        """

    def take(self, shards: Numbers, local: Numbers, empty: Empty) -> Arrays:
        """Samples by shard and number in the shard: suffix of the field's name -> array.

        Raises:
            BadShard: Some cannot be read.
        """


def field(
    dataset: str, spec: FieldSpec, counts: Numbers, chunk_samples: int, mapped: bool
) -> Field:
    """The reader of a field.

    Args:
        dataset: Its name in the files.
        spec: What it is.
        counts: Samples of each shard.
        chunk_samples: Samples to decompress at a time.
        mapped: Whether it is stored contiguously in all shards.
    """
    if spec.ragged:
        return _RaggedRows(dataset, spec)
    if spec.row_bytes == 0:
        return _NoBytes(spec)
    if mapped:
        return _MappedRows(dataset, spec, len(counts), int(counts.sum()))
    return _CachedBlocks(dataset, spec, counts, chunk_samples)


class _MappedRows:
    """A field whose rows are mapped."""

    def __init__(self, dataset: str, spec: FieldSpec, shards: int, rows: int) -> None:
        self._dataset = dataset
        self._spec = spec
        self._shards, self._rows = shards, rows
        # One region, unless files put the field at offsets that no common grid of rows has.
        self._regions: dict[int, Region] = {}
        self._region_of = np.zeros(shards, dtype=np.int64)
        self._first_row = np.zeros(shards, dtype=np.int64)

    def open(self, number: int, path: Path, shard: ShardEntry) -> None:
        offset = shard.offsets[self._dataset]
        if offset + shard.samples * self._spec.row_bytes > shard.bytes:
            raise ValueError(f"{self._dataset} leads beyond the file's end")
        if shard.samples:
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


class _CachedBlocks:
    """A field of chunked datasets."""

    def __init__(
        self, dataset: str, spec: FieldSpec, counts: NDArray[np.int64], block: int
    ) -> None:
        self._dataset = dataset
        self._spec = spec
        self._block = block
        blocks = -(-counts // block)
        self._first_block = np.concatenate([[0], np.cumsum(blocks)])
        self._open: dict[int, ChunkedDataset] = {}
        total = int(self._first_block[-1])
        self._cache = BlockCache(total, block, spec.row_bytes, self._read)

    def open(self, number: int, path: Path, shard: ShardEntry) -> None:
        dataset = ChunkedDataset(path, self._dataset, self._block)
        if dataset.rows < shard.samples:
            raise ValueError(f"{self._dataset} has {dataset.rows} rows, not {shard.samples}")
        self._open[number] = dataset

    def _read(self, block: int, out: NDArray[np.uint8]) -> None:
        shard = int(np.searchsorted(self._first_block[1:], block, side="right"))
        try:
            self._open[shard].read(block - int(self._first_block[shard]), out)
        except BadShard as error:
            error.shard = shard
            raise

    def take(self, shards: Numbers, local: Numbers, empty: Empty) -> Arrays:
        rows = empty((len(local), *self._spec.shape), self._spec.kind)
        place, row = np.divmod(local, self._block)
        self._cache.take(self._first_block[shards] + place, row, as_bytes(rows))
        return {"": rows}


class _RaggedRows:
    """A field of which each sample has any number of rows: mapped values, and mapped offsets."""

    def __init__(self, dataset: str, spec: FieldSpec) -> None:
        self._dataset = dataset
        self._spec = spec
        self._offsets: dict[int, NDArray[np.int64]] = {}
        self._values: dict[int, NDArray[np.uint8]] = {}

    def open(self, number: int, path: Path, shard: ShardEntry) -> None:
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
    """The same memory as rows of bytes, of shape (n, row bytes)."""
    return (
        array.view(np.uint8).reshape(len(array), -1)
        if array.size
        else np.empty((len(array), 0), np.uint8)
    )
