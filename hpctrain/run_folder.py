"""A run's folder: made for it alone, held while it runs, and the files that say how it ended."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from pathlib import Path
from typing import IO

from hpctrain.errors import Error

CONFIG = "config.toml"
RESULT = "result.json"
"""Written last, and only at success: its being there is the proof."""

INTERRUPTED = "interrupted.json"
"""Instead of it: the run was asked to stop, has saved a checkpoint, and can be gone on with."""

INTERRUPTED_CODE = 75
"""The exit code of such a run: that of sysexits.h for "try again later"."""

STOP = "stop"
"""Asks the run to save a checkpoint and end."""

LOCK = ".lock"
"""Held by rank 0 while the run is under way; when the process ends, the kernel lets go of it."""

LOCK_SECONDS = 1.0
"""How long to wait for a run before this one that is about to be gone."""

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


def new_folder(task: str) -> Path:
    """Make a folder ``runs/TASK-TIME`` that no other run has.

    Args:
        task: As ``--task`` names it.

    Raises:
        Error: It cannot be made.
    """
    name = re.sub(r"\W+", "-", Path(task.rpartition(":")[2] or task).stem)
    base = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()  # by one process alone, on any file system
                return folder
            number += 1
    except OSError as error:
        raise unwritable(base, error) from error


def claim(folder: Path) -> IO[str] | None:
    """Make a run's folder, if need be, and hold it; the file that is returned must stay open.

    Args:
        folder: Of the run.

    Returns:
        The lock; None where the file system has no locks.

    Raises:
        Error: Another run holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise unwritable(folder, error) from error
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in _NO_LOCKS:
                lock.close()
                return None
            if time.monotonic() > deadline:
                lock.seek(0)
                owner = " ".join(lock.read(200).split()) or "of another host"
                lock.close()
                raise Error(
                    f"{folder} is in use by a run that is under way ({owner}).",
                    hint="wait for it or end it, or choose another --out.",
                ) from None
            time.sleep(0.05)
    with contextlib.suppress(OSError):  # a full disk does not hinder the lock
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
    return lock


def unwritable(path: Path, error: OSError) -> Error:
    """Return the error to raise where a run folder, or a file of it, cannot be written.

    Args:
        path: The folder or file.
        error: What the system says of it; its ``errno`` chooses the hint.
    """
    hints = {
        errno.ENOTDIR: "it is within a file; choose another --out.",
        errno.EEXIST: "it is a file; choose another --out.",
        errno.ENAMETOOLONG: "choose a shorter --out.",
    }
    return Error(
        f"cannot write {_short(path)}: {error.strerror}.",
        hint=hints.get(error.errno or 0, "make room, or choose another --out."),
    )


def _short(path: Path) -> str:
    text = os.fsencode(path).decode("utf-8", "replace")
    return text if len(text) <= 120 else f"{text[:60]}...{text[-40:]}"
