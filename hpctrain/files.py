"""Write and read files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

JSON_BYTES = 2**28
"""Largest file of JSON that is read whole."""


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Replace a file's content in one step; a crash leaves the old or the new, never half.

    Args:
        path: The file.
        text: The new content.
        private: Whether nobody but its owner may read it.

    Raises:
        OSError: It could not be written; the old content is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if private:
            temporary.touch(0o600, exist_ok=False)
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file's or folder's content has reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return a file's SHA-256 checksum, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return ``HPCTRAIN_CACHE``, or the user's cache folder as the XDG specification has it."""
    own = os.environ.get("HPCTRAIN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(own) if own else Path(base) / "hpctrain"


def open_regular(path: Path | str, *, follow: bool = True) -> BinaryIO:
    """Open a regular file to be read; nothing else, such as a FIFO, which would wait for a writer.

    Args:
        path: Of the file.
        follow: Whether it may be a symbolic link.

    Raises:
        OSError: It cannot be opened, or is not a regular file.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except ValueError as error:  # a NUL, or half a character
        raise OSError(errno.EINVAL, "not a name of a file", repr(path)) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path | str, most_bytes: int) -> bytes:
    """Read a regular file that is not larger than it can rightly be.

    Args:
        path: Of the file.
        most_bytes: Largest size.

    Raises:
        OSError: It cannot be read, is not a regular file, or is larger.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > most_bytes:
            raise OSError(errno.EFBIG, f"larger than {most_bytes} bytes", str(path))
        return file.read()


def parse_json(text: bytes | str) -> Any:
    """Return what JSON says.

    Raises:
        ValueError: It is not JSON, or is nested too deeply for what reads it.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path | str, most_bytes: int = JSON_BYTES) -> Any:
    """Return what a file of JSON says, whoever may have written it.

    Args:
        path: Of the file.
        most_bytes: Largest size.

    Raises:
        OSError: It cannot be read, is not a regular file, or is larger.
        ValueError: It is not JSON, or is nested too deeply.
    """
    return parse_json(read_regular(path, most_bytes))


def json_lines(path: Path | str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file; other lines, such as one cut off, are skipped.

    Raises:
        OSError: It cannot be read, or is not a regular file.
    """
    with open_regular(path) as file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = parse_json(line)
                if isinstance(record, dict):
                    yield record


def is_own(path: Path | str) -> bool:
    """Whether something is this user's, no link, and cannot be written by others."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    kind = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return kind and status.st_uid == os.geteuid() and not status.st_mode & 0o022
