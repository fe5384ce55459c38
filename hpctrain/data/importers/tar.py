"""Where in a tar, compressed or not, its files' bytes are; and these bytes.

A listing by ``tarfile`` costs as much for each member as decoding a small image. Here a header is
looked at for its name, size and type. Formats: v7, ustar, GNU's long names, pax's path and size.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, cast

from hpctrain.errors import Error

BLOCK = 512
BUFFER_BYTES = 2**20
HEADER_BUFFER_BYTES = 2**13
"""Small, because what lies between the headers of a tar that is not compressed need not be read."""
_COMPRESSIONS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))
_REGULAR = b"0", b"\0", b"7"


class Member(NamedTuple):
    """A regular file in a tar, and where it is in the tar once decompressed."""

    name: str
    offset: int
    size: int


class reading:  # noqa: N801 - reads as a statement
    """Turns the ways in which a file can be broken into one error."""

    def __init__(self, path: Path, *more: type[Exception]) -> None:
        self.path = path
        self.kinds: tuple[type[Exception], ...] = (
            EOFError,
            OSError,
            zlib.error,
            lzma.LZMAError,
            *more,
        )

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, self.kinds):
            raise Error(
                f"{self.path} cannot be read to its end: {error}.",
                hint="it is damaged or incomplete; fetch it again.",
            ) from error


def _open(path: Path, buffer_bytes: int = BUFFER_BYTES) -> BinaryIO:
    with path.open("rb") as file:
        head = file.read(6)
    for magic, opener in _COMPRESSIONS:
        if head.startswith(magic):
            return io.BufferedReader(cast(io.RawIOBase, opener(path)), BUFFER_BYTES)
    return path.open("rb", buffering=buffer_bytes)


def is_tar(path: Path) -> bool:
    """Whether a file begins as a tar does."""
    try:
        with _open(path) as file:
            header = file.read(BLOCK)
    except (EOFError, OSError, zlib.error, lzma.LZMAError):
        return False
    return len(header) == BLOCK and _is_header(header)


def members(path: Path) -> Iterator[Member]:
    """The regular files of a tar, in its order.

    Raises:
        Error: It is damaged, ends too early, or holds a sparse file.
    """
    with reading(path, ValueError), _open(path, HEADER_BUFFER_BYTES) as file:
        end = file.seek(0, io.SEEK_END) if _is_plain(file) else None
        file.seek(0)
        position = 0
        name, size = "", None
        while True:
            header = file.read(BLOCK)
            if header.count(0) == BLOCK:
                break
            if len(header) < BLOCK or not _is_header(header):
                raise EOFError(f"no header at byte {position}")
            length = _number(header[124:136]) if size is None else size
            kind = header[156:157]
            position += BLOCK
            if end is not None and position + length > end:
                raise EOFError(f"a member at byte {position} has {length} bytes")
            if kind == b"L":
                name = _text(file.read(length))
            elif kind == b"x":
                name, size = _pax(file.read(length), name)
            else:
                if kind in _REGULAR:
                    if not name:
                        name = _text(header[:100])
                        if header[345] and header[257:262] == b"ustar":
                            name = f"{_text(header[345:500])}/{name}"
                    if not name.endswith("/"):
                        yield Member(name, position, length)
                elif kind == b"S":
                    raise EOFError(f"a sparse file at byte {position}")
                if kind not in b"gK":
                    name, size = "", None
            position += -(-length // BLOCK) * BLOCK
            file.seek(position)
        while file.read(BUFFER_BYTES):  # so that the checksum at a compressed stream's end is seen
            pass


def contents(path: Path, wanted: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """The bytes of members by offset and size, in rising order: one pass where it is compressed.

    Raises:
        Error: It is damaged, or ends too early.
    """
    with reading(path), _open(path) as file:
        for offset, size in wanted:
            file.seek(offset)
            data = file.read(size)
            if len(data) < size:
                raise EOFError(f"{size} bytes are missing at byte {offset}")
            yield data


def _is_plain(file: BinaryIO) -> bool:
    return isinstance(getattr(file, "raw", None), io.FileIO)


def _is_header(header: bytes) -> bool:
    """Whether a header's checksum is right: the sum of its bytes, the sum itself as spaces.

    Modulo 65521, which is how adler32 sums up bytes far quicker than Python could.
    """
    try:
        stored = _number(header[148:156])
    except ValueError:
        return False
    expected = 1 + stored - 8 * ord(" ") + sum(header[148:156])
    return zlib.adler32(header) & 0xFFFF == expected % 65521


def _number(digits: bytes) -> int:
    if digits[0] & 0x80:
        return int.from_bytes(digits[1:], "big")
    return int(digits.strip(b" \0") or b"0", 8)


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes, name: str) -> tuple[str, int | None]:
    """Path and size of the member that follows, where a pax header says them."""
    size = None
    while data.strip(b"\0"):
        length = int(data.partition(b" ")[0])
        if length < 5:
            raise EOFError("a broken pax header")
        key, _, value = data[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            size = int(value)
        data = data[length:]
    return name, size
