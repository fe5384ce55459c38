"""Compressed datasets, read a block of samples at a time: found once, decompressed once.

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
import hdf5plugin  # noqa: F401 - lets HDF5 itself read lz4 and zstd
import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import Error

# Numbers that The HDF Group registered for filters.
DEFLATE, SHUFFLE, LZ4, ZSTD = 1, 2, 32004, 32015
CACHE_BYTES = 2**31
TAKERS = 16
MAP_NORESERVE = 0x4000  # Python knows the name from 3.13 on


class BadShard(Error):  # noqa: N818 - what it is about, as in the option on_bad_shard
    """A shard is missing, truncated, corrupt, or not what the index says.

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
    """The framing of HDF5's LZ4 filter: sizes in big-endian, then blocks, incompressible ones raw.

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


_DECODERS: dict[tuple[int, ...], Callable[[memoryview, NDArray[np.uint8]], int]] = {
    (): _plain,
    (DEFLATE,): _zlib,
    (LZ4,): _lz4,
    (ZSTD,): _zstd,
}


_BROKEN = (OSError, ValueError, RuntimeError, KeyError, struct.error, cramjam.DecompressionError)


class ChunkedDataset:
    """One dataset of one file, whose rows are read a block at a time.

    Args:
        path: The file.
        name: The dataset.
        block: Rows to read at a time.

    Raises:
        OSError, KeyError, RuntimeError: As h5py does.
    """

    def __init__(self, path: Path, name: str, block: int) -> None:
        self.path = path
        self.name = name
        self._block = block
        self._file: h5py.File | None = h5py.File(path, "r", locking=False)
        dataset = self._file[name]
        self.rows = int(dataset.shape[0])
        filters = dataset.id.get_create_plist()
        codes = tuple(filters.get_filter(i)[0] for i in range(filters.get_nfilters()))
        # A filter that groups the bytes of numbers by their place comes before the compression.
        self._shuffled = dataset.dtype.itemsize if codes[:1] == (SHUFFLE,) else 1
        self._decode = _DECODERS.get(codes[1:] if self._shuffled > 1 else codes)
        self._dataset = dataset
        self._row_bytes = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:], dtype=np.int64))
        self._chunk = int(dataset.chunks[0]) if dataset.chunks else 0
        direct = self._chunk and dataset.chunks[1:] == dataset.shape[1:]
        if not direct or (block % self._chunk and self._chunk < self.rows):
            self._decode = None
        if self._decode is None:  # HDF5 reads it, and the file stays open
            return
        self._where: dict[int, tuple[int, int, int]] = {}

        def note(chunk: Any) -> None:
            place = (int(chunk.byte_offset), int(chunk.size), int(chunk.filter_mask))
            self._where[int(chunk.chunk_offset[0]) // self._chunk] = place

        dataset.id.chunk_iter(note)
        self._dataset = None
        self._file.close()
        self._file = None
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._bytes = memoryview(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ))

    def read(self, number: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out``, of shape (block, row bytes), with a block's rows; the last may be short.

        Raises:
            BadShard: They cannot be decompressed.
        """
        start = number * self._block
        stop = min(start + self._block, self.rows)
        try:
            if self._decode is None:
                rows = self._dataset[start:stop]
                out[: stop - start] = (
                    np.ascontiguousarray(rows).view(np.uint8).reshape(stop - start, -1)
                )
                return
            for first in range(start, stop, self._chunk):
                self._read_chunk(first // self._chunk, out[first - start :])
        except _BROKEN as error:
            raise BadShard(
                f"shard {self.path}: {self.name}, samples {start} to {stop - 1}, cannot be "
                f"decompressed: {error or type(error).__name__}.",
                hint="it is corrupt; `hpctrain data verify` tells what else is. Import it again.",
            ) from error

    def _read_chunk(self, number: int, out: NDArray[np.uint8]) -> None:
        offset, size, mask = self._where[number]
        data = self._bytes[offset : offset + size]
        length = self._chunk * self._row_bytes
        # The dataset's last chunk is stored whole, though fewer of its rows count.
        whole = out.size >= length
        target = out.reshape(-1)[:length] if whole else np.empty(length, np.uint8)
        if mask and self._shuffled > 1:
            raise ValueError("it was written with some filters left out")
        # A filter may have been left out where it gains nothing.
        decode = _plain if mask or self._decode is None else self._decode
        if decode(data, target) != length:
            raise ValueError("it is shorter than its samples")
        if self._shuffled > 1:
            target.reshape(-1, self._shuffled)[:] = target.reshape(self._shuffled, -1).T.copy()
        if not whole:
            out.reshape(-1)[:] = target[: out.size]


class BlockCache:
    """Decompressed blocks of one field of a split; any number of threads may take from it.

    Args:
        blocks: How many there are.
        rows: Rows in a block.
        row_bytes: At least 1.
        read: Fills memory of shape (rows, row bytes) with the block of a number.
    """

    def __init__(
        self,
        blocks: int,
        rows: int,
        row_bytes: int,
        read: Callable[[int, NDArray[np.uint8]], None],
    ) -> None:
        self._rows = rows
        self._row_bytes = row_bytes
        self._read = read
        self._slots = max(64, CACHE_BYTES // (rows * row_bytes))
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
        self._turn = threading.BoundedSemaphore(TAKERS)

    def take(
        self, blocks: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[np.uint8]
    ) -> None:
        """Gather rows.

        Args:
            blocks: Shape (n,): the block of each.
            rows: Shape (n,): its number in the block.
            out: Shape (n, row bytes).

        Raises:
            BadShard: A block cannot be read.
        """
        if len(blocks) == 0:
            return
        # So few blocks at a time that there is room for them whatever other threads hold.
        most = self._slots // TAKERS
        with self._turn:
            if len(blocks) <= most or len(np.unique(blocks)) <= most:
                self._take(blocks, rows, out)
                return
            for start in range(0, len(blocks), most):
                part = slice(start, start + most)
                self._take(blocks[part], rows[part], out[part])

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
