"""Which nodes of this job are left: those that srun still starts processes on.

The node of the batch script is the control. It is there, or nobody would ask: so where srun starts
nothing on it either, srun is what is wrong, and nothing is known of the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from hpctrain.errors import Error
from hpctrain.slurm import commands
from hpctrain.slurm.hosts import Node

PROBE_SECONDS = 15.0
MOST_PROBES = 32
REFUSED_SECONDS, SILENCE_SECONDS = 5.0, 120.0
"""So long srun may refuse to start anything, or Slurm be silent, until srun is given up."""

PAUSE_SECONDS = 1.0


class Doubt(Error):  # noqa: N818 - it says that nothing was found out
    """srun starts nothing on any node, so nothing is known of them; the message is its own."""


def present(nodes: list[Node], environment: Mapping[str, str] = os.environ) -> list[Node]:
    """Return the nodes on which srun still starts processes.

    Args:
        nodes: The nodes of this job.
        environment: The environment of srun; ``SLURMD_NODENAME`` is Slurm's name of this host.

    Raises:
        Doubt: srun starts nothing on this host either, so it is srun that fails.
    """
    names = [node.name for node in nodes]
    mine = environment.get("SLURMD_NODENAME")
    began = time.monotonic()
    while True:
        with ThreadPoolExecutor(MOST_PROBES) as pool:
            said = list(pool.map(lambda name: _refusal(name, environment), names))
        refusals = {name: error for name, error in zip(names, said, strict=True) if error}
        if not refusals:
            return nodes
        answering = [name for name in names if name not in refusals]
        control = mine if mine in names else (answering or names)[0]
        # It is asked again, as Slurm may have fallen silent in between.
        error = refusals.get(control) or _refusal(control, environment)
        if error is None:
            return [node for node in nodes if node.name not in refusals]
        patience = SILENCE_SECONDS if isinstance(error, commands.Unanswered) else REFUSED_SECONDS
        if time.monotonic() - began > patience:
            raise Doubt(error.message.removeprefix("srun refuses: "))
        time.sleep(PAUSE_SECONDS)


def _refusal(node: str, environment: Mapping[str, str]) -> Error | None:
    """Return srun's error if it does not start a process on a node; None if it does."""
    try:
        commands.call(
            "srun", "--overlap", "--mpi=none", "--nodes=1", "--ntasks=1", f"--nodelist={node}",
            "--quiet", "true", timeout_seconds=PROBE_SECONDS, environment=environment,
        )  # fmt: skip
    except Error as error:
        return error
    return None
