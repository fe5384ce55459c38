"""Whose a run folder is: one job's at a time, and of that job one start.

``owners/0000.json`` is the claim of the first job that has it, ``0001.json`` of the next, and so
on; the last one has the folder now. A claim is made by creating the next file, which only one can.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec.structs import replace

from hpctrain.errors import Error
from hpctrain.files import read_regular
from hpctrain.slurm import commands

FOLDER = "owners"
MOST_BYTES = 2**16
ASK_SECONDS = 2.0
SILENCE_SECONDS = 600.0
"""How long Slurm may leave open whether another job is over."""


UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Exceptions from decoding a file that anyone may have written."""

JobNumber = Annotated[
    str, msgspec.Meta(pattern=r"^\d{1,18}(_\d{1,18})?(;[A-Za-z0-9_.-]{1,255})?\Z")
]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Claim(msgspec.Struct, frozen=True):
    """A job's claim to a run folder.

    Attributes:
        job: The job ID.
        restarts: How often Slurm had restarted the job when it made the claim.
        again: How often the run was restarted, by requeueing or by successor jobs.
        continues: The ID of the job whose run this one continues.
    """

    job: JobNumber
    restarts: Count = 0
    again: Count = 0
    continues: str | None = None


class Elsewhere(Error):  # noqa: N818 - nothing went wrong
    """The run continues as another job, or a later start of this one: nothing is left to do."""

    exit_code = 0


def claims(run: Path) -> list[Claim]:
    """Return all readable claims to a run folder; the last one is the current owner's."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted((run / FOLDER).glob("*.json")):
            with contextlib.suppress(OSError, *UNREADABLE):
                found.append(msgspec.json.decode(read_regular(path, MOST_BYTES), type=Claim))
    return found


def _add(run: Path, number: int, claim: Claim) -> bool:
    """Write the claim of this number.

    Returns:
        False if another process has written one of this number already.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    try:
        descriptor = os.open(
            folder / f"{number:04}.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644
        )
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(claim)) + b"\n")
        file.flush()
        os.fsync(descriptor)
    return True


def claim(run: Path, job: str, restarts: int, continues: str | None) -> Claim:
    """Claim a run folder for this start of this job.

    Args:
        run: The run folder.
        job: This job's ID.
        restarts: How often Slurm has restarted this job.
        continues: The ID of the job whose run this one was submitted to continue.

    Returns:
        The claim that holds now.

    Raises:
        Elsewhere: Another job, or a later start of this one, has taken the run over.
        Error: The folder belongs to a job that is not over, or cannot be written.
    """
    while True:
        number, known = _settled(run)
        last = known[-1] if known else None
        mine = _next(run, last, Claim(job=job, restarts=restarts, continues=continues), known)
        try:
            if mine == last or _add(run, number, mine):
                return mine
        except OSError as error:
            raise Error(f"cannot write {run / FOLDER}: {error.strerror}.",
                        hint="choose another --run.") from error  # fmt: skip


def _next(run: Path, last: Claim | None, wanted: Claim, known: list[Claim]) -> Claim:
    job, restarts = wanted.job, wanted.restarts
    if last is None:
        return replace(wanted, again=restarts)
    if last.job == job:
        if last.restarts > restarts:
            raise Elsewhere(f"job {job} was started again; this start of it is over")
        more = restarts - last.restarts
        return replace(last, restarts=restarts, again=last.again + more)
    if wanted.continues == last.job:
        return replace(wanted, again=last.again + 1 + restarts)
    if wanted.continues is not None or job in [each.job for each in known]:
        raise Elsewhere(f"the run went on as job {last.job}")
    _over(run, last.job)
    return wanted


def _over(run: Path, job: str) -> None:
    """Check that a job is over, or unknown to Slurm; else raise an error."""
    deadline = time.monotonic() + SILENCE_SECONDS
    while True:
        try:
            state = commands.look(job)
        except commands.Unanswered as error:
            if time.monotonic() > deadline:
                raise Error(f"{run} belongs to job {job}, and whether that is over Slurm has not "
                            f"said for {SILENCE_SECONDS:.0f} s: {error.message}",
                            hint="choose another --out.") from error  # fmt: skip
            time.sleep(ASK_SECONDS)
            continue
        if state is None or state.over:
            return
        raise Error(f"{run} belongs to job {job}, which is {state.name}.", hint="choose another "
                    f"--out, or `scancel {job}` first.")  # fmt: skip


def hand_over(run: Path, job: str, to: str) -> None:
    """Hand a run folder over to the job that continues this job's run.

    Args:
        run: The run folder.
        job: The ID of this job, its present owner.
        to: The ID of the job that continues the run.

    Raises:
        OSError: The folder cannot be written; the other job will claim it by itself.
    """
    number = _count(run)
    last = next(reversed(claims(run)), None)
    if last is not None and last.job == job:
        _add(run, number, Claim(job=to, again=last.again + 1, continues=job))


def _count(run: Path) -> int:
    numbers = [int(path.stem) for path in (run / FOLDER).glob("*.json") if path.stem.isdigit()]
    return max(numbers, default=-1) + 1


def _settled(run: Path) -> tuple[int, list[Claim]]:
    """Return the number of the next claim and all claims so far, once the last is fully written.

    The number is read first: if a claim is added in between, writing the next one fails.
    """
    deadline = time.monotonic() + ASK_SECONDS
    while True:
        number = _count(run)
        known = claims(run)
        if len(known) == number or time.monotonic() > deadline:
            return number, known
        time.sleep(0.05)
