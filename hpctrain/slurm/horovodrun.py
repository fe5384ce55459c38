"""horovodrun within a Slurm job: hosts from Slurm, and srun where it would use ssh."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from hpctrain.errors import Error
from hpctrain.process import search_path, which
from hpctrain.slurm import hosts


def arguments(command: list[str], interface: str | None) -> list[str]:
    """Horovodrun's command line for this job.

    Raises:
        Error: This is no job.
    """
    nodes = hosts.nodes()
    words = ["horovodrun", "--gloo", "-np", str(sum(node.tasks for node in nodes))]
    words += ["-H", ",".join(f"{node.name}:{node.tasks}" for node in nodes)]
    if interface is not None:
        words += ["--network-interfaces", interface]
    return [*words, *command]


def become(command: list[str]) -> NoReturn:
    """Replace this process by horovodrun.

    Raises:
        Error: It is not installed, or this is no job.
    """
    program = which("horovodrun")
    if program is None:
        raise Error("horovodrun is not on PATH.", hint="`hpctrain horovod build`.")
    mine = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
    others = [node.name for node in hosts.nodes() if node.name != mine]
    interface = os.environ.get("HOROVOD_GLOO_IFACE") or hosts.interface(others)
    folder = Path(tempfile.mkdtemp(prefix="hpctrain-ssh-"))
    shim = folder / "ssh"
    shim.write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m hpctrain.slurm.ssh "$@"\n')
    shim.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{search_path()}"}
    os.execve(  # noqa: S606 - without a shell, as it should be
        program, arguments(command, interface), environment
    )
