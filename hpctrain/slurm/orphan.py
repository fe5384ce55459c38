"""Ranks that outlived the node on which their job's batch script ran."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from hpctrain.errors import Error
from hpctrain.slurm import commands

SUPERVISOR = "HPCTRAIN_SUPERVISOR"
"""The environment variable that names the batch script's host; ``hpctrain job`` sets it."""


def end_job(lost_hosts: Iterable[str]) -> None:
    """Have Slurm start the job again, if nobody else is there to end it.

    With ``--no-kill`` a job whose first node is lost would stay until its time limit. When it is
    started again its script finds the run completed, or goes on with it.

    Args:
        lost_hosts: Where ranks were lost.
    """
    if os.environ.get(SUPERVISOR) not in set(lost_hosts):
        return
    try:
        commands.requeue(commands.this_job())
    except Error as error:
        print(f"hpctrain: {error}", file=sys.stderr, flush=True)
