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
"""The environment variable that names the job whose run a job goes on with."""

REQUEUE_SECONDS = 120.0
"""So long Slurm may take to end a script that it has put back into the queue."""

SILENCE_SECONDS = 900.0
PAUSE_SECONDS = 2.0
LOOK_SECONDS = 0.1


def requeue(job: str, restarts: int, ended: Callable[[], bool]) -> Error | None:
    """Put this job back into the queue, and wait until Slurm ends this script.

    Args:
        job: This one.
        restarts: How often Slurm has started it again.
        ended: Whether Slurm has told this script to end.

    Returns:
        None where the job is in the queue, or being ended; else why Slurm refuses.

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
    """Ask for it; why Slurm refuses."""
    try:
        commands.requeue(job)
    except commands.Unanswered:
        raise
    except Error as error:
        return error
    return None


def runs(job: str, restarts: int) -> bool:
    """Whether this start of a job still runs by Slurm's account, not to be ended.

    Args:
        job: Its number.
        restarts: How often Slurm had started it again.

    Raises:
        Unanswered: Slurm is silent.
    """
    try:
        state = commands.look(job)
    except commands.Unanswered:
        raise
    except Error:  # who may not ask for it
        return True
    return state is not None and state.name == "RUNNING" and state.restarts == restarts


def wait(ended: Callable[[], bool]) -> None:
    """Return when Slurm ends this script: to go first would look like an end of the job."""
    deadline = time.monotonic() + REQUEUE_SECONDS
    while not ended() and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)


def _pause(ended: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PAUSE_SECONDS
    while not ended() and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)


def chain(job: str, run: Path, home: Path, ended: Callable[[], bool]) -> str | None:
    """Submit a job that goes on with this one's run when it is over; once, whatever is answered.

    Args:
        job: This one.
        run: The run folder.
        home: The folder that the batch script calls its run, with the script; it is written there
            if it is not.
        ended: Whether Slurm has told this script to end.

    Returns:
        The other job's number; None where this script is to end before that is known.

    Raises:
        Error: Slurm refuses it, or is silent.
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
