"""Find where in a tar, compressed or not, its files' bytes are; and read these bytes.

A listing by ``tarfile`` costs as much for each member as decoding a small image. Here a header is
looked at for its name, size and type. Formats: v7, ustar, GNU's long names, pax's path and size.
https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import posixpath
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, cast

from hpctrain.data.folder_tree import MOST_LEVELS, SPECIAL
from hpctrain.data.summary import Found
from hpctrain.errors import Error

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
BLOCK = 512
BUFFER_BYTES = 2**20
HEADER_BUFFER_BYTES = 2**13
"""Small, because what lies between the headers of a tar that is not compressed need not be read."""
_COMPRESSIONS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))
_REGULAR = b"0", b"\0", b"7"
_HARD, _SYMBOLIC, _FOLDER = b"1", b"2", b"5"
_EMPTY = _HARD, _SYMBOLIC, b"3", b"4", _FOLDER, b"6"
"""Links, devices, folders and pipes: no bytes follow, whatever their size is said to be."""
MOST_NAME_BYTES = 2**20
"""Of what precedes a member to tell its name: enough for any path, and for what else pax says."""
MOST_LINKS = 40
"""From one to the next, as Linux has it."""


class Member(NamedTuple):
    """A regular file in a tar, or what leads to one.

    Attributes:
        name: With its folders.
        offset: Where its bytes begin in the tar once decompressed; of a link -1.
        size: Of it, in bytes.
        target: What a link leads to, from the tar's root; "" for a file.
    """

    name: str
    offset: int
    size: int
    target: str = ""


class reading:  # noqa: N801 - reads as a statement
    """Turns the ways in which a file can be broken into one error; a context manager."""

    def __init__(self, path: Path, *more: type[Exception]) -> None:
        self.path = path
        self.kinds: tuple[type[Exception], ...] = (
            EOFError,
            OSError,
            MemoryError,
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


def members(path: Path, found: Found | None = None) -> Iterator[Member]:
    """Yield the regular files and links of a tar, in its order.

    Args:
        path: The tar.
        found: Where to note what is neither.

    Raises:
        Error: It is damaged, ends too early, or holds a sparse file.
    """
    with reading(path, ValueError), _open(path, HEADER_BUFFER_BYTES) as file:
        end = file.seek(0, io.SEEK_END) if _is_plain(file) else None
        file.seek(0)
        position = 0
        name = link = ""
        size = None
        while True:
            header = file.read(BLOCK)
            if header.count(0) == BLOCK:
                break
            if len(header) < BLOCK or not _is_header(header):
                raise EOFError(f"no header at byte {position}")
            length = _number(header[124:136]) if size is None else size
            kind = header[156:157]
            position += BLOCK
            if kind in _EMPTY:
                length = 0
            if end is not None and position + length > end:
                raise EOFError(f"a member at byte {position} has {length} bytes")
            if kind in b"LKxg" and length > MOST_NAME_BYTES:
                raise EOFError(f"the name of a member at byte {position} has {length} bytes")
            if kind == b"L":
                name = _text(file.read(length))
            elif kind == b"K":
                link = _text(file.read(length))
            elif kind == b"x":
                name, link, size = _pax(file.read(length), name, link)
            elif kind != b"g":
                name = name or _name(header)
                if kind in _REGULAR and not name.endswith("/"):
                    yield Member(name, position, length)
                elif kind in (_HARD, _SYMBOLIC):
                    target = link or _text(header[157:257])
                    if kind == _SYMBOLIC:
                        target = posixpath.join(posixpath.dirname(name), target)
                    yield Member(name, -1, 0, target)
                elif kind == b"S":
                    raise EOFError(f"a sparse file at byte {position}")
                elif kind not in (*_REGULAR, _FOLDER) and found is not None:
                    found.leave(SPECIAL, name)
                name = link = ""
                size = None
            position += -(-length // BLOCK) * BLOCK
            file.seek(position)
        while file.read(BUFFER_BYTES):  # so that the checksum at a compressed stream's end is seen
            pass


def files_in(path: Path, found: Found) -> list[Member]:
    """List the files of a tar, links taken for what they lead to, in its order.

    Args:
        path: The tar.
        found: Where to note what is no file.

    Raises:
        Error: It is damaged, or a link leads nowhere, or back to where it is.
    """
    listed = list(members(path, found))
    if not any(member.target for member in listed):
        return listed
    places = {_normal(member.name): member for member in listed}
    folders = _by_folder(listed)
    files: list[Member] = []
    for member in listed:
        aim = member
        for _ in range(MOST_LINKS):
            if not aim.target or _normal(aim.target) not in places:
                break
            aim = places[_normal(aim.target)]
        if not aim.target:
            files.append(Member(member.name, aim.offset, aim.size))
            continue
        folder = _normal(aim.target)
        inside = folders.get(folder, [])
        if not inside or f"{_normal(member.name)}/".startswith(f"{folder}/"):
            raise Error(
                f"{member.name} in {path} is a link to {member.target}, which "
                + ("holds the link." if inside else "is not in it."),
                hint="pack what links lead to: tar --dereference --hard-dereference.",
            )
        files += [
            Member(member.name + _normal(other.name)[len(folder) :], other.offset, other.size)
            for other in inside
        ]
        if len(files) > MOST_LINKS * len(listed):
            raise Error(
                f"links in {path} name its files again and again.", hint="unpack it, and look."
            )
    return files


def _by_folder(listed: list[Member]) -> dict[str, list[Member]]:
    """Folder -> files somewhere below it."""
    folders: dict[str, list[Member]] = {}
    for member in listed:
        folder = _normal(member.name)
        for _ in range(MOST_LEVELS):
            folder = posixpath.dirname(folder)
            if member.target or not folder:
                break
            folders.setdefault(folder, []).append(member)
    return folders


def _normal(name: str) -> str:
    return posixpath.normpath(name)


def contents(path: Path, wanted: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Yield the bytes of members in rising order: in one pass where the tar is compressed.

    Args:
        path: The tar.
        wanted: Offset and size of each, in bytes of what is not compressed.

    Raises:
        Error: It is damaged, or ends too early.
    """
    with reading(path), _open(path) as file:
        before, data = (-1, -1), b""
        for offset, size in wanted:
            if (offset, size) == before:  # a link: a compressed tar would be read from its start
                yield data
                continue
            file.seek(offset)
            data = file.read(size)
            before = offset, size
            if len(data) < size:
                raise EOFError(f"{size} bytes are missing at byte {offset}")
            yield data


def is_plain(path: Path) -> bool:
    """Whether a tar is not compressed."""
    with reading(path), _open(path) as file:
        return _is_plain(file)


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
        if digits[0] != 0x80:
            raise ValueError("a negative number")
        return int.from_bytes(digits[1:], "big")
    octal = digits.strip(b" \0") or b"0"
    if octal.strip(b"01234567"):
        raise ValueError(f"{octal!r} is no number")
    return int(octal, 8)


def _text(data: bytes) -> str:
    return data.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[345] and header[257:262] == b"ustar":
        name = f"{_text(header[345:500])}/{name}"
    return name


def _pax(data: bytes, name: str, link: str) -> tuple[str, str, int | None]:
    """Path, link and size of the member that follows, where a pax header says them."""
    size = None
    start = 0
    while data[start : start + 1].strip(b"\0"):
        digits = data[start : start + 20].partition(b" ")[0]
        end = start + int(digits)
        if not digits.isdigit() or end < start + 5 or end > len(data):
            raise EOFError("a broken pax header")
        key, _, value = data[start + len(digits) + 1 : end].rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"linkpath":
            link = _text(value)
        elif key == b"size":
            if not value.isdigit():
                raise EOFError("a broken pax header")
            size = int(value)
        elif key.startswith(b"GNU.sparse."):
            raise EOFError("a sparse file")
        start = end
    return name, link, size
