"""horovodrun within a Slurm job: hosts from Slurm, and srun where it would use ssh."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from hpctrain.errors import Error
from hpctrain.process import search_path, which
from hpctrain.slurm import hosts
from hpctrain.slurm.hidden import hide
from hpctrain.slurm.ssh import PYTHON

SHIM = Path(__file__).parent / "shim"
"""A folder with the ``ssh`` that horovodrun finds first."""


def arguments(command: list[str], interface: str | None) -> list[str]:
    """Build the command line of horovodrun for this job.

    Args:
        command: The program that each rank runs, with its arguments.
        interface: The network interface for Gloo; None: horovodrun finds one.

    Raises:
        Error: This process is not part of a Slurm job.
    """
    nodes = hosts.nodes()
    words = ["horovodrun", "--gloo", "-np", str(sum(node.tasks for node in nodes))]
    words += ["-H", ",".join(f"{node.name}:{node.tasks}" for node in nodes)]
    if interface is not None:
        words += ["--network-interfaces", interface]
    return [*words, sys.executable, "-m", "hpctrain.slurm.hidden", *command]


def become(command: list[str]) -> NoReturn:
    """Replace this process by horovodrun.

    Raises:
        Error: It is not installed, or this process is not part of a Slurm job.
    """
    program = which("horovodrun")
    if program is None:
        raise Error("horovodrun is not on PATH.", hint="`hpctrain horovod build`.")
    mine = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    others = [node.name for node in hosts.nodes() if node.name != mine]
    interface = os.environ.get("HOROVOD_GLOO_IFACE") or hosts.interface(others)
    environment = hide(os.environ)
    environment |= {"PATH": f"{SHIM}:{search_path()}", PYTHON: sys.executable}
    os.execve(  # noqa: S606 - without a shell, as it should be
        program, arguments(command, interface), environment
    )
