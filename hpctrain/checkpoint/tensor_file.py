"""Safetensors files that are laid out in memory, written past the page cache, and read in blocks.

Each tensor's bytes are checked by XXH3-128 in blocks of 4 MiB, which finds accidents at the speed
of memory. (Against somebody who changes a file on purpose no checksum in the same folder helps.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import xxhash

BLOCK = 2**22
"""Bytes of a tensor under one checksum."""

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip
"""What safetensors knows, by the names it gives them."""

NAMED = {name: dtype for dtype, name in DTYPES.items()}

_PAGE = 4096  # what O_DIRECT asks of addresses, places and sizes, on every file system there is
_HUGE_PAGE = 2**21
_SPAN = 2**24  # bytes that are written at once
_DIRECT = 2**22  # smallest file that is written past the page cache
_WRITERS = 2  # the disk has the next request when it has done one
_READERS = min(8, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
_Result = TypeVar("_Result")
Job = tuple[int, Callable[[], object]]
"""Something that a thread can do, and how many bytes it moves."""


class Entry(NamedTuple):
    """A tensor of a file: its key there, type, and shape."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Layout(NamedTuple):
    """Where a file's tensors are.

    Attributes:
        header: What precedes them, its length in 8 bytes included.
        starts: The first byte of each, in the file.
        size: Of the file, in bytes.
    """

    header: bytes
    starts: list[int]
    size: int


def layout(entries: Sequence[Entry]) -> Layout:
    """Lay a safetensors file out: widest types first, so that each value's address fits its type.

    Args:
        entries: The tensors; ``starts`` of what is returned is in the same order.
    """
    order = sorted(range(len(entries)), key=lambda n: -entries[n].dtype.itemsize)
    spans: list[tuple[int, int]] = [(0, 0)] * len(entries)
    head, end = {}, 0
    for number in order:
        entry = entries[number]
        start, end = end, end + size_of(entry.dtype, entry.shape)
        spans[number] = (start, end)
        head[entry.key] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    header = len(text).to_bytes(8, "little") + text
    return Layout(header, [len(header) + start for start, _ in spans], len(header) + end)


def size_of(dtype: torch.dtype, shape: Iterable[int]) -> int:
    """Return the size of a tensor in bytes.

    Args:
        dtype: Its type.
        shape: Its dimensions; none for a scalar.
    """
    size = dtype.itemsize
    for each in shape:
        size *= each
    return size


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    data: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(data)


class Memory:
    """Memory that is kept between saves: pages that were touched once cost nothing again."""

    def __init__(self) -> None:
        self._kept = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    def take(self, size: int, *, pinned: bool) -> torch.Tensor:
        """Return at least so many bytes, from page start to page end; old contents may remain.

        Args:
            size: Wanted.
            pinned: Whether a GPU is to write there.
        """
        if not size <= len(self._kept) <= 2 * size + _HUGE_PAGE or self._pinned != pinned:
            self._kept = torch.empty(0, dtype=torch.uint8)  # what is too small is given back first
            self._kept = _allocate(-(-max(size, 1) // _PAGE) * _PAGE, pinned)
            self._pinned = pinned
        return self._kept


def _allocate(size: int, pinned: bool) -> torch.Tensor:
    if size >= _HUGE_PAGE:
        size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    if pinned:
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(whole.data_ptr(), size, 0)) == 0:  # else slower, and right
            weakref.finalize(memory, runtime.cudaHostUnregister, whole.data_ptr()).atexit = False
    return whole


def digests_of(data: memoryview) -> list[str]:
    """Return checksums of a tensor's bytes, one for each block."""
    return [
        xxhash.xxh3_128_hexdigest(data[start : start + BLOCK])
        for start in range(0, len(data), BLOCK)
    ]


def write_durably(
    path: Path, image: torch.Tensor, size: int, meanwhile: Callable[[], _Result]
) -> _Result:
    """Write a new file, and return when it is on disk.

    Args:
        path: Of the file.
        image: What it holds, from the begin of a page to the end of one.
        size: Of the file, in bytes.
        meanwhile: Called while the disk works.

    Returns:
        What that returned.

    Raises:
        OSError: It could not be written.
    """
    data = bytes_of(image)
    direct = getattr(os, "O_DIRECT", 0) if size >= _DIRECT else 0
    descriptor = _create(path, direct)
    try:
        whole = -(-size // _PAGE) * _PAGE if direct else size
        with ThreadPoolExecutor(_WRITERS, thread_name_prefix="hpctrain-write") as pool:
            spans = [
                pool.submit(_write, descriptor, data[start : min(start + _SPAN, whole)], start)
                for start in range(0, whole, _SPAN)
            ]
            result = meanwhile()
            for span in spans:
                span.result()
        if whole != size:
            os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return result


def _create(path: Path, direct: int) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags | direct, 0o666)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:
            raise
        path.unlink(missing_ok=True)  # some file systems make it, and then refuse
        return os.open(path, flags, 0o666)


def _write(descriptor: int, data: memoryview, start: int) -> None:
    while data:
        try:
            count = os.pwrite(descriptor, data, start)
        except OSError as error:
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            direct = getattr(os, "O_DIRECT", 0)
            if error.errno != errno.EINVAL or not flags & direct:
                raise
            # The file system asks for more than pages, or has written a part of one.
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~direct)
            continue
        data, start = data[count:], start + count


def read_into(descriptor: int, out: memoryview, start: int) -> None:
    """Read from a place in a file until memory is full.

    Args:
        descriptor: Of the open file.
        out: The memory to fill.
        start: Where to begin in the file, in bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: The file ends before.
    """
    while out:
        count = os.preadv(descriptor, [out], start)
        if not count:
            raise ValueError("it is cut short")
        out, start = out[count:], start + count


def check(data: memoryview, digest: str) -> None:
    """Verify a block of data by its checksum.

    Args:
        data: The block.
        digest: Its checksum, as :func:`digests_of` gave it.

    Raises:
        ValueError: They differ.
    """
    if xxhash.xxh3_128_hexdigest(data) != digest:
        raise ValueError("its checksum differs")


def in_threads(jobs: Iterable[Job]) -> None:
    """Do jobs on several threads; small ones are taken together.

    Args:
        jobs: Each with the bytes that it moves.

    Raises:
        Exception: What the first one that failed raised, when all have ended.
    """
    batches: list[list[Callable[[], object]]] = []
    room = 0
    for size, job in jobs:
        if room <= 0:
            batches.append([])
            room = BLOCK
        batches[-1].append(job)
        room -= size + _PAGE  # the work that even an empty one is
    if len(batches) <= 1:
        for job in itertools.chain(*batches):
            job()
        return
    with ThreadPoolExecutor(min(_READERS, len(batches)), "hpctrain-read") as pool:
        for done in [pool.submit(_do, batch) for batch in batches]:
            done.result()


def _do(batch: list[Callable[[], object]]) -> None:
    for job in batch:
        job()
