"""Having this job started again: by Slurm, or, where that is refused, as a job of its own.

An answer that does not come is no refusal. Slurm ends a job as soon as it has put it back into the
queue, with the very command that asked for it; and a silent controller does what it was asked for
when it wakes up. So nothing is submitted before Slurm has said no and that the job still runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from hpctrain.errors import Error
from hpctrain.slurm import commands, owner

CONTINUES = "HPCTRAIN_CONTINUES"
"""The environment variable with the ID of the job whose run this job continues."""

REQUEUE_SECONDS = 120.0
"""How long Slurm may take to end the batch script of a job that it has requeued."""

SILENCE_SECONDS = 900.0
PAUSE_SECONDS = 2.0
LOOK_SECONDS = 0.1


def requeue(job: str, restarts: int, ended: Callable[[], bool]) -> Error | None:
    """Put this job back into the queue, and wait until Slurm ends this script.

    Args:
        job: This job's ID.
        restarts: How often Slurm has restarted it so far.
        ended: Returns whether Slurm has told this script to end.

    Returns:
        None if the job is requeued or being ended; otherwise Slurm's refusal.

    Raises:
        Unanswered: Slurm has been silent for ``SILENCE_SECONDS``.
    """
    deadline = time.monotonic() + SILENCE_SECONDS
    while not ended():
        try:
            refusal = _asked(job) if runs(job, restarts) else None
            if refusal is not None and runs(job, restarts):
                return refusal
            wait(ended)
            return None
        except commands.Unanswered:
            if time.monotonic() > deadline:
                raise
            _pause(ended)
    return None


def _asked(job: str) -> Error | None:
    """Ask Slurm to requeue a job; return its refusal, if it refuses."""
    try:
        commands.requeue(job)
    except commands.Unanswered:
        raise
    except Error as error:
        return error
    return None


def runs(job: str, restarts: int) -> bool:
    """Return whether, according to Slurm, this start of a job is still running.

    Args:
        job: The job ID.
        restarts: How often Slurm had restarted the job before this start.

    Raises:
        Unanswered: Slurm does not answer.
    """
    try:
        state = commands.look(job)
    except commands.Unanswered:
        raise
    except Error:  # who may not ask for it
        return True
    return state is not None and state.name == "RUNNING" and state.restarts == restarts


def wait(ended: Callable[[], bool]) -> None:
    """Wait until Slurm ends this script; to exit earlier would look as if the job had ended."""
    deadline = time.monotonic() + REQUEUE_SECONDS
    while not ended() and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)


def _pause(ended: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PAUSE_SECONDS
    while not ended() and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)


def chain(job: str, run: Path, home: Path, ended: Callable[[], bool]) -> str | None:
    """Submit a job that continues this job's run when it is over; exactly once.

    Where an answer is lost, it is looked whether the job was submitted before it is tried again.

    Args:
        job: This job's ID.
        run: The run folder.
        home: The folder that the batch script takes for its run, with the script; if the script is
            not there, it is written.
        ended: Returns whether Slurm has told this script to end.

    Returns:
        The new job's ID; None if this script was told to end before it was known.

    Raises:
        Error: Slurm refuses the job, or has not answered for ``SILENCE_SECONDS``.
    """
    # Nothing that Slurm has said of this job holds for the next.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }
    environment |= {CONTINUES: job, "HPCTRAIN_RUN": str(home.resolve())}
    script = home / "job.sbatch"
    task = job.partition("_")[2]
    options = [f"--dependency=afterany:{job}", "--export=ALL"]
    options += [f"--array={task}"] if task else []
    deadline = time.monotonic() + SILENCE_SECONDS
    asked = False
    while not ended():
        try:
            if not script.exists():
                commands.call("scontrol", "write", "batch_script", job, str(script))
            # An answer may have been lost on its way.
            if asked and (there := commands.depending_on(job)):
                other = there[0]
            else:
                asked = True
                other = commands.submit(script, *options, environment=environment)
        except commands.Unanswered:
            if time.monotonic() > deadline:
                raise
            _pause(ended)
            continue
        if task and "_" not in other:
            other = f"{other}_{task}"
        owner.hand_over(run, job, other)
        return other
    return None
