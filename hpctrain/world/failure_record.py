"""Record why a rank failed: one small file for whoever looks after the job.

A launcher's exit code says little (``srun`` makes another rank's SIGTERM of one rank's error), and
of many ranks that fail the first is the cause.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from hpctrain.errors import Error, PeerLost
from hpctrain.files import read_regular, write_text
from hpctrain.world.launcher import detect

FOLDER = "HPCTRAIN_JOB"
"""The environment variable that names the folder; ``hpctrain job`` sets it."""

NOTE_BYTES = 2**20


@dataclass(frozen=True)
class Failure:
    """Why a rank, or the whole job, failed.

    Attributes:
        what: Kind of error: an exception's name, a signal's, ``node lost``, ``exit code``.
        message: In a line.
        rank: Whose; None where that is not known.
        host: Of that rank.
        exit_code: What the job should end with.
        consequence: Whether it follows from another rank's failure.
        time: When, in seconds since 1970.
        traceback: Of an exception that nobody foresaw.
    """

    what: str
    message: str
    rank: int | None = None
    host: str | None = None
    exit_code: int = 1
    consequence: bool = False
    time: float = 0.0
    traceback: str = ""

    def __str__(self) -> str:
        where = " on ".join(
            part
            for part in (f"rank {self.rank}" if self.rank is not None else "", self.host or "")
            if part
        )
        text = f"{where}: {self.what}" if where else self.what
        if self.message:
            text += f": {self.message}"
        return " ".join(text.split()) + f" (exit code {self.exit_code})"


def note(error: BaseException, exit_code: int) -> None:
    """Write down why this rank ends, in the job's folder; where there is none, do nothing.

    Args:
        error: What ended it.
        exit_code: What the process ends with.
    """
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    rank = detect().rank
    unforeseen = not isinstance(error, Error)
    failure = Failure(
        type(error).__name__,
        str(error) if not unforeseen else " ".join(str(error).split())[:500],
        rank,
        os.environ.get("SLURMD_NODENAME") or os.uname().nodename,
        exit_code,
        isinstance(error, PeerLost),
        time.time(),
        "".join(traceback.format_exception(error))[-4000:] if unforeseen else "",
    )
    with contextlib.suppress(OSError):  # the disk may be what is full
        write_text(Path(folder) / f"rank-{rank}.json", json.dumps(asdict(failure)) + "\n")


def read_notes(folder: Path) -> list[Failure]:
    """Read what failed ranks left in a job's folder, the earliest first."""
    from pydantic import TypeAdapter

    found = []
    note = TypeAdapter(Failure)
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(note.validate_json(read_regular(path, NOTE_BYTES), strict=True))
    return sorted(found, key=lambda failure: failure.time)
