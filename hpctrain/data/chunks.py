"""Read compressed datasets a block of samples at a time: found once, decompressed once.

HDF5 decompresses under one lock for the whole process. So it is asked only where the chunks are;
they are then decompressed straight from the mapped file, by any number of threads at once. Filters
that are not known here are left to HDF5, which knows them all.

Decompressed blocks lie side by side in one array, from which numpy gathers a batch in one call. A
block is dropped when each of its samples has been taken once, which in an epoch is exactly what
happens to it.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cramjam
import h5py
import numpy as np
from numpy.typing import NDArray

from hpctrain.data.hdf5 import open_file, own_bytes, spec_of_dataset, stored_as_numpy
from hpctrain.data.index import FieldSpec
from hpctrain.errors import Error

# Numbers that The HDF Group registered for filters.
DEFLATE, SHUFFLE, LZ4, ZSTD = 1, 2, 32004, 32015
CACHE_BYTES = 2**31
"""Of decompressed samples that a split keeps."""
BLOCK_BYTES = 32 * 2**10
"""What is decompressed at a time, at least: a sample each would cost more to find than to read."""
MOST_BLOCKS = 2**28
TAKERS = 16
MAP_NORESERVE = 0x4000  # Python knows the name from 3.13 on


class BadShard(Error):  # noqa: N818 - what it is about, as in the option on_bad_shard
    """The error of a shard that is missing, truncated, corrupt, or not what the index says.

    Attributes:
        shard: Its number in the split, where that was found while reading from it.
    """

    shard: int | None = None


def _plain(data: memoryview, out: NDArray[np.uint8]) -> int:
    out[:] = np.frombuffer(data, np.uint8)
    return len(data)


def _zlib(data: memoryview, out: NDArray[np.uint8]) -> int:
    return int(cramjam.zlib.decompress_into(data, out.data))


def _zstd(data: memoryview, out: NDArray[np.uint8]) -> int:
    return int(cramjam.zstd.decompress_into(data, out.data))


def _lz4(data: memoryview, out: NDArray[np.uint8]) -> int:
    """Decode the blocks of HDF5's LZ4 filter, of big-endian sizes; raw where they did not shrink.

    https://github.com/HDFGroup/hdf5_plugins/blob/master/docs/RegisteredFilterPlugins.md
    """
    total, block = struct.unpack_from(">QI", data)
    if total != len(out) or block < 1:
        raise ValueError(f"it holds {total} bytes, not {len(out)}")
    place, done = 12, 0
    while done < total:
        (size,) = struct.unpack_from(">I", data, place)
        place += 4
        length = min(block, total - done)
        part = out[done : done + length]
        if size == length:
            part[:] = np.frombuffer(data[place : place + size], np.uint8)
        elif cramjam.lz4.decompress_block_into(data[place : place + size], part.data) != length:
            raise ValueError("a block is shorter than it says")
        place += size
        done += length
    return done


_Decoder = Callable[[memoryview, NDArray[np.uint8]], int]
_DECODERS: dict[tuple[int, ...], _Decoder] = {
    (): _plain,
    (DEFLATE,): _zlib,
    (LZ4,): _lz4,
    (ZSTD,): _zstd,
}


_BROKEN = (OSError, ValueError, RuntimeError, KeyError, struct.error, cramjam.DecompressionError)


def block_rows(dataset: h5py.Dataset, row_bytes: int) -> int:
    """Return how many rows to read at a time: whole chunks, at least some 32 KiB, at most all.

    Args:
        dataset: To be read.
        row_bytes: Of one row.
    """
    wanted = max(1, BLOCK_BYTES // max(1, row_bytes))
    chunk = int(dataset.chunks[0]) if dataset.chunks else 1
    if dataset.chunks and dataset.id.get_create_plist().get_nfilters() == 0:
        chunk = min(chunk, wanted)  # what is not compressed can be read in parts
    rows = chunk * max(1, wanted // chunk)
    return max(1, min(rows, int(dataset.shape[0])))


class ChunkedDataset:
    """One dataset of one file, whose rows are read a block at a time.

    Chunks are decompressed here where the file's bytes are numpy's, the filters are known, and a
    sample of chunks comes out as HDF5 itself reads it; all else is read by HDF5.

    Args:
        path: The file.
        name: The dataset.
        spec: What the index says it is.
        known: It was written by hpctrain: nothing needs to be compared.

    Raises:
        OSError, KeyError, RuntimeError, ValueError: It cannot be opened, or is not what the index
            says.
    """

    def __init__(self, path: Path, name: str, spec: FieldSpec, known: bool = False) -> None:
        self.path = path
        self.name = name
        self._file: h5py.File | None = open_file(path)
        dataset = self._file[name]
        if not own_bytes(dataset) or not _same_file(dataset, self._file):
            raise ValueError(f"{name} is put together from other files")
        if spec_of_dataset(dataset) != spec:
            raise ValueError(f"{name} is {spec_of_dataset(dataset)}, but the index says {spec}")
        self.rows = int(dataset.shape[0])
        self._kind = spec.kind
        self._row_bytes = spec.row_bytes
        self._block = block_rows(dataset, self._row_bytes)
        self._chunk = int(dataset.chunks[0]) if dataset.chunks else 0
        self._chunks: _Chunks | None = None
        if dataset.chunks and dataset.chunks[1:] == dataset.shape[1:] and stored_as_numpy(dataset):
            chunks = _Chunks(path, dataset, self._row_bytes)
            if chunks.supported and (known or chunks.as_hdf5_reads(self._file.userblock_size)):
                self._chunks = chunks
                self._file.close()
                self._file = dataset = None
        self._dataset = dataset

    @property
    def block(self) -> int:
        """Rows that are read at a time."""
        return self._block

    def read(self, number: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out``, of shape (block, row bytes), with a block's rows; the last may be short.

        Args:
            number: The block's, from 0.
            out: Where its rows go.

        Raises:
            BadShard: They cannot be decompressed.
        """
        start = number * self._block
        stop = min(start + self._block, self.rows)
        try:
            if self._chunks is None:
                rows = np.ascontiguousarray(self._dataset[start:stop], self._kind)
                out[: stop - start] = rows.view(np.uint8).reshape(stop - start, -1)
            else:
                self._chunks.read(start, stop, out)
        except _BROKEN as error:
            raise BadShard(
                f"shard {self.path}: {self.name}, samples {start} to {stop - 1}, cannot be "
                f"decompressed: {' '.join(str(error).split()) or type(error).__name__}.",
                hint="it is corrupt; `hpctrain data verify` tells what else is. Import it again.",
            ) from error


def _same_file(dataset: h5py.Dataset, file: h5py.File) -> bool:
    return bool(h5py.h5o.get_info(dataset.id).fileno == h5py.h5o.get_info(file.id).fileno)


class _Chunks:
    """Where a dataset's chunks are, and what undoes their filters.

    Attributes:
        supported: All chunks that there are can be read here.
    """

    def __init__(self, path: Path, dataset: h5py.Dataset, row_bytes: int) -> None:
        self._dataset: h5py.Dataset | None = dataset
        self._row_bytes = row_bytes
        self._rows, self._chunk = int(dataset.shape[0]), int(dataset.chunks[0])
        self._length = self._chunk * row_bytes
        self.supported = hasattr(dataset.id, "chunk_iter")
        if not self.supported:
            return
        found: list[tuple[int, int, int, int]] = []

        def note(chunk: Any) -> None:
            row = int(chunk.chunk_offset[0])
            if row < self._rows:
                place = (int(chunk.byte_offset), int(chunk.size), int(chunk.filter_mask))
                found.append((row // self._chunk, *place))

        dataset.id.chunk_iter(note)
        table = np.array(sorted(found), dtype=np.int64).reshape(-1, 4)
        self._numbers, self._offsets, self._sizes, self._masks = table.T.copy()
        self._undo = self._all_undone(dataset)
        # The dataset's last chunk may have been stored without filters because it is not full.
        self._plain_edge = -1
        self._fill = b""
        missing = np.flatnonzero(self._numbers != np.arange(len(self._numbers)))
        first = int(missing[0]) if len(missing) else len(self._numbers)
        if first * self._chunk < self._rows:
            row = first * self._chunk
            self._fill = np.ascontiguousarray(dataset[row : row + 1]).tobytes()
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._bytes = memoryview(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ))

    def _all_undone(self, dataset: h5py.Dataset) -> dict[int, tuple[_Decoder, int]]:
        """By filter mask: the decoder, and the bytes of numbers that were shuffled (1: none)."""
        properties = dataset.id.get_create_plist()
        filters = [properties.get_filter(i) for i in range(properties.get_nfilters())]
        undo = {}
        for mask in {0, *np.unique(self._masks).tolist()}:
            left = [f for i, f in enumerate(filters) if not mask >> i & 1]
            shuffled = 1
            if left and left[0][0] == SHUFFLE:
                shuffled = int(left.pop(0)[2][0])
            decoder = _DECODERS.get(tuple(int(f[0]) for f in left))
            if decoder is None or shuffled < 1 or self._length % shuffled:
                self.supported = False
                return {}
            undo[mask] = (decoder, shuffled)
        return undo

    def as_hdf5_reads(self, user_block: int) -> bool:
        """Whether a sample of the chunks comes out as HDF5 reads them.

        HDF5 up to 1.14 leaves out of chunks' addresses what comes before the file's own beginning.
        """
        if self._agree():
            return True
        self._offsets = self._offsets + user_block
        return user_block > 0 and self._agree()

    def _agree(self) -> bool:
        _, kinds = np.unique(self._masks, return_index=True)
        places = {0, len(self._numbers) - 1, *kinds.tolist()} if len(self._numbers) else set()
        for place in sorted(places):
            number = int(self._numbers[place])
            start = number * self._chunk
            stop = min(start + self._chunk, self._rows)
            assert self._dataset is not None
            try:
                wanted = np.ascontiguousarray(self._dataset[start:stop]).tobytes()
            except _BROKEN:
                return False  # and HDF5 will say why
            if not self._gives(start, stop, wanted):
                if stop - start == self._chunk:
                    return False
                self._plain_edge = number
                if not self._gives(start, stop, wanted):
                    self._plain_edge = -1
                    return False
        self._dataset = None
        return True

    def _gives(self, start: int, stop: int, wanted: bytes) -> bool:
        out = np.empty((stop - start, self._row_bytes), np.uint8)
        try:
            self.read(start, stop, out)
        except _BROKEN:
            return False
        return out.tobytes() == wanted

    def read(self, start: int, stop: int, out: NDArray[np.uint8]) -> None:
        """Put these rows at the beginning of ``out``."""
        for number in range(start // self._chunk, -(-stop // self._chunk)):
            first = number * self._chunk
            begin, end = max(start, first), min(stop, first + self._chunk)
            place = int(np.searchsorted(self._numbers, number))
            there = place < len(self._numbers) and self._numbers[place] == number
            target = out[begin - start : end - start]
            if not there:  # never written
                target[:] = np.frombuffer(self._fill, np.uint8)
                continue
            data = self._bytes[self._offsets[place] : self._offsets[place] + self._sizes[place]]
            decode, shuffled = self._undo[int(self._masks[place])]
            if number == self._plain_edge:
                decode, shuffled = _plain, 1
            self._undone(data, decode, shuffled, target, begin - first)

    def _undone(
        self,
        data: memoryview,
        decode: _Decoder,
        shuffled: int,
        target: NDArray[np.uint8],
        skip: int,
    ) -> None:
        """Put rows of a chunk, after ``skip`` of them, into ``target``."""
        if decode is _plain and shuffled == 1:
            if len(data) != self._length:
                raise ValueError("it is shorter than its samples")
            part = data[skip * self._row_bytes :][: target.size]
            target.reshape(-1)[:] = np.frombuffer(part, np.uint8)
            return
        # The dataset's last chunk is stored whole, though fewer of its rows count.
        whole = target.size == self._length
        flat = target.reshape(-1) if whole else np.empty(self._length, np.uint8)
        if decode(data, flat) != self._length:
            raise ValueError("it is shorter than its samples")
        if shuffled > 1:
            flat.reshape(-1, shuffled)[:] = flat.reshape(shuffled, -1).T.copy()
        if not whole:
            target.reshape(-1)[:] = flat[skip * self._row_bytes :][: target.size]


class BlockCache:
    """Decompressed blocks of one field of a split; any number of threads may take from it.

    Args:
        blocks: How many there are.
        rows: Rows in a block.
        row_bytes: At least 1.
        room: Bytes to keep of them; one block is always kept.
        read: Fills memory of shape (rows, row bytes) with the block of a number.

    Raises:
        Error: There is no room for what has to be kept.
    """

    def __init__(
        self,
        blocks: int,
        rows: int,
        row_bytes: int,
        room: int,
        read: Callable[[int, NDArray[np.uint8]], None],
    ) -> None:
        if blocks > MOST_BLOCKS:
            raise Error(
                f"its samples are in {blocks} pieces, more than can be kept track of.",
                hint="import the data: shards have larger pieces.",
            )
        self._rows = rows
        self._row_bytes = row_bytes
        self._read = read
        self._slots = max(1, min(blocks, room // (rows * row_bytes)))
        # So few blocks at a time that there is room for them whatever other threads hold.
        takers = min(TAKERS, max(1, self._slots // TAKERS))
        self._most = self._slots // takers
        if self._slots == blocks:  # there is room for all
            takers, self._most = TAKERS, blocks
        # Address space for all of them; pages are given only when they are first written.
        size = self._slots * rows * row_bytes
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        try:
            self._memory = np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8)
        except OSError as error:
            raise Error(
                f"{size} bytes of memory for decompressed samples cannot be had: {error.strerror}.",
                hint="lift the limit (`ulimit -v unlimited`), or ask the job for more memory.",
            ) from error
        self._memory = self._memory.reshape(-1, row_bytes)
        self._slot_of = np.full(blocks, -1, dtype=np.int32)
        # By slot: the block in it or -1, its samples not yet taken, when it was last used, how many
        # threads are using it, and whether it has been read.
        self._block_in = np.full(self._slots, -1, dtype=np.int64)
        self._left = np.zeros(self._slots, dtype=np.int64)
        self._last_use = np.zeros(self._slots, dtype=np.int64)
        self._pins = np.zeros(self._slots, dtype=np.int64)
        self._ready = np.zeros(self._slots, dtype=bool)
        self._free: list[int] = []
        self._used = 0
        self._clock = 0
        self._failed: dict[int, Exception] = {}
        self._to_read: deque[tuple[int, int]] = deque()
        self._change = threading.Condition()
        self._turn = threading.BoundedSemaphore(takers)

    def take(
        self, blocks: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[np.uint8]
    ) -> None:
        """Gather rows, from blocks that are kept or read and decompressed now.

        Args:
            blocks: Shape (n,): the block of each.
            rows: Shape (n,): its number in the block.
            out: Shape (n, row bytes).

        Raises:
            BadShard: A block cannot be read.
        """
        if len(blocks) == 0:
            return
        with self._turn:
            if len(blocks) <= self._most or len(wanted := np.unique(blocks)) <= self._most:
                self._take(blocks, rows, out)
                return
            # Each block is read once, though not all can be there together.
            for start in range(0, len(wanted), self._most):
                stop = min(start + self._most, len(wanted)) - 1
                mine = (blocks >= wanted[start]) & (blocks <= wanted[stop])
                part = np.empty((int(mine.sum()), self._row_bytes), np.uint8)
                self._take(blocks[mine], rows[mine], part)
                out[mine] = part

    def _take(
        self, blocks: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[np.uint8]
    ) -> None:
        wanted, counts = np.unique(blocks, return_counts=True)
        slots = self._pin(wanted)
        try:
            self._fill(slots)
            with self._change:
                for block in wanted[self._slot_of[wanted] != slots].tolist():
                    raise self._failed[block]
            source = self._slot_of[blocks].astype(np.int64) * self._rows + rows
            np.take(self._memory, source, axis=0, out=out, mode="clip")
        finally:
            with self._change:
                self._pins[slots] -= 1
                self._left[slots] -= counts
                self._drop(slots[(self._left[slots] <= 0) & (self._pins[slots] == 0)])
                self._change.notify_all()

    def _pin(self, wanted: NDArray[np.int64]) -> NDArray[np.int64]:
        """Slots for these blocks, kept from others until they are unpinned."""
        with self._change:
            while True:
                slots = self._slot_of[wanted].astype(np.int64)
                present = slots[slots >= 0]
                self._pins[present] += 1
                if self._make_room(len(wanted) - len(present)):
                    break
                self._pins[present] -= 1
                self._change.wait()
            for number in np.flatnonzero(slots < 0).tolist():
                block = int(wanted[number])
                if self._free:
                    slot = self._free.pop()
                else:
                    slot, self._used = self._used, self._used + 1
                slots[number] = self._slot_of[block] = slot
                self._block_in[slot] = block
                self._left[slot] = self._rows
                self._ready[slot] = False
                self._pins[slot] = 1
                self._to_read.append((block, slot))
            self._clock += 1
            self._last_use[slots] = self._clock
            self._change.notify_all()
        return slots

    def _make_room(self, count: int) -> bool:
        """Whether there are so many free slots, having given up blocks that nobody is using."""
        missing = count - len(self._free) - (self._slots - self._used)
        if missing > 0:
            used = slice(0, self._used)
            idle = np.flatnonzero((self._pins[used] == 0) & (self._block_in[used] >= 0))
            self._drop(idle[np.argsort(self._last_use[idle], kind="stable")[:missing]])
            missing -= len(idle)
        return missing <= 0

    def _fill(self, slots: NDArray[np.int64]) -> None:
        """Return when all these are read; until then read whatever is to be read, for anybody."""
        while True:
            with self._change:
                while not self._to_read:
                    if self._ready[slots].all():
                        return
                    self._change.wait()
                if self._ready[slots].all():
                    return
                block, slot = self._to_read.popleft()
            failed: Exception | None = None
            try:
                first = slot * self._rows
                self._read(block, self._memory[first : first + self._rows])
            except Exception as error:
                failed = error
            with self._change:
                if failed is not None:
                    # Whoever wants it finds it gone, and the reason here.
                    self._failed[block] = failed
                    self._left[slot] = 0
                    self._slot_of[block] = -1
                self._ready[slot] = True
                if not self._to_read:  # else nobody is waiting
                    self._change.notify_all()

    def _drop(self, slots: NDArray[Any]) -> None:
        for slot in slots.tolist():
            block = int(self._block_in[slot])
            if block >= 0:
                if self._slot_of[block] == slot:
                    self._slot_of[block] = -1
                self._block_in[slot] = -1
                self._free.append(slot)
