"""Map rows of many files side by side as the rows of one array, gathered by one call.

numpy gathers from one array in one call, but a batch has samples of hundreds of shards, and a call
for each shard it touches would cost more than the copying. So address space is reserved for a whole
field, each shard is mapped into it so that its first row falls on a row's boundary, and what lies
between is never touched. Mappings last as long as the region: made anew each epoch, every page of
them would fault again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import Error

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE = 0
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # as on every Linux that numpy has wheels for
_FAILED = ctypes.c_void_p(-1).value


class Region:
    """Address space for rows of one size; files' rows appear in it as they are mapped.

    Args:
        row_bytes: At least 1.
        rows: Room for as many rows.
        files: In at most so many pieces.
        phase: Remainder of every piece's offset in its file by ``gcd(page, row_bytes)``.
    """

    def __init__(self, row_bytes: int, rows: int, files: int, phase: int = 0) -> None:
        page = mmap.PAGESIZE
        self.row_bytes = row_bytes
        self._phase = phase
        # Each piece may begin up to one common multiple of page and row after the one before.
        self._stride = int(np.lcm(page, row_bytes))
        self._size = rows * row_bytes + files * (self._stride + 2 * page)
        self._free = page  # where the next piece may begin
        self._lock = threading.Lock()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        address = _libc.mmap(None, self._size, _PROT_NONE, flags, -1, 0)
        if address == _FAILED:
            raise Error(
                f"{self._size} bytes of address space cannot be reserved: "
                f"{os.strerror(ctypes.get_errno())}.",
                hint="lift the limit (`ulimit -v unlimited`).",
            )
        self._address = address
        count = (self._size - phase) // row_bytes
        buffer = (ctypes.c_uint8 * (count * row_bytes)).from_address(address + phase)
        flat: NDArray[np.uint8] = np.frombuffer(memoryview(buffer), np.uint8)
        self.rows = flat.reshape(count, row_bytes)

    def map(self, path: Path, offset: int, rows: int) -> int:
        """Map rows of a file into the region.

        Args:
            path: Of the file; it must be at least ``offset + rows * row_bytes`` long.
            offset: Of the first row.
            rows: At least 1.

        Returns:
            The number of the first of them in ``self.rows``.

        Raises:
            OSError: The file cannot be mapped.
        """
        page = mmap.PAGESIZE
        start, skip = offset // page * page, offset % page
        length = skip + rows * self.row_bytes
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with self._lock:
                place = self._place(skip)
                self._free = place + -(-length // page) * page
                assert self._free <= self._size
                flags = mmap.MAP_SHARED | _MAP_FIXED
                address = self._address + place
                if _libc.mmap(address, length, mmap.PROT_READ, flags, descriptor, start) == _FAILED:
                    code = ctypes.get_errno()
                    raise OSError(code, os.strerror(code), str(path))
        finally:
            os.close(descriptor)
        return (place + skip - self._phase) // self.row_bytes

    def _place(self, skip: int) -> int:
        """Return the next page boundary from which rows, ``skip`` after it, fall on these rows."""
        page, common = mmap.PAGESIZE, int(np.gcd(mmap.PAGESIZE, self.row_bytes))
        period = self.row_bytes // common
        missing = -(self._free + skip - self._phase) // common
        pages = missing * pow(page // common, -1, period) % period if period > 1 else 0
        return self._free + pages * page

    def __reduce__(self) -> Any:
        raise TypeError("a mapped region belongs to one process")

    def __del__(self) -> None:
        if hasattr(self, "_address"):
            _libc.munmap(self._address, self._size)


def phase_of(offset: int, row_bytes: int) -> int:
    """Return the phase a region must have for rows that begin at an offset of a file.

    Args:
        offset: Of the first row, in bytes.
        row_bytes: Of one row.
    """
    return offset % int(np.gcd(mmap.PAGESIZE, row_bytes))
