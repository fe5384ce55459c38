"""Files that are there whole or not at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


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
    """A file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """``HPCTRAIN_CACHE``, or the user's cache folder as the XDG specification has it."""
    own = os.environ.get("HPCTRAIN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(own) if own else Path(base) / "hpctrain"
