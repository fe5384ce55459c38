"""What horovodrun takes for ssh in a Slurm job: it starts processes by srun, without an sshd.

horovodrun calls ``ssh -o OPTION=VALUE... HOST [-p PORT] [-i FILE] COMMAND``.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from hpctrain.process import search_path, which
from hpctrain.slurm.hidden import show

PYTHON = "HPCTRAIN_PYTHON"
"""The environment variable that tells the shim which interpreter to use."""

# Of this process's own step; srun would take them for its options.
KEPT = ("SLURM_CONF", "SLURM_JOB_ID", "SLURM_JOBID")


def split(arguments: list[str]) -> tuple[str, str]:
    """Return the host and the command that arguments of ssh name."""
    words: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        if word in ("-o", "-p", "-i", "-l", "-F") and len(words) < 2:
            left.pop(0)
        elif not (word.startswith("-") and len(words) < 2):
            words.append(word)
    return words[0], " ".join(words[1:])


def one_task(host: str) -> tuple[list[str], dict[str, str]]:
    """Prepare to run one task on a node of this job by srun.

    Returns:
        The srun command, to which the task's own is to be appended; and its environment.
    """
    environment = {
        name: value
        for name, value in show(os.environ).items()
        if not name.startswith("SLURM_") or name in KEPT
    }
    environment["PATH"] = search_path()
    arguments = ["srun", "--overlap", "--mpi=none", "--nodes=1", "--ntasks=1", f"--nodelist={host}",
                 "--unbuffered", "--quiet"]  # fmt: skip
    return arguments, environment


def main() -> NoReturn:
    """Replace this process by srun, which starts the command that ssh was asked to run."""
    host, command = split(sys.argv[1:])
    arguments, environment = one_task(host)
    program = which("srun")
    if program is None:
        sys.exit("hpctrain: error: srun is not on PATH. HINT: this is for Slurm jobs.")
    # The command is one string for a shell on the other side, as ssh's is.
    arguments += ["--input=none", "/bin/bash", "-c", command]
    os.execve(program, arguments, environment)  # noqa: S606 - without a shell, as it should be


if __name__ == "__main__":
    main()
