"""Test whether ranks outlive one another here: a small launch, in which one of them dies.

``python -m hpctrain.elastic.selftest`` is what each of its ranks runs.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence

from hpctrain.elastic.choose import set_parameters
from hpctrain.process import run
from hpctrain.world import pmix

SECONDS = 30.0
START_SECONDS = 0.5  # srun drops the output of a step that fails while it starts
OUTLIVED = "hpctrain: outlived"


def works(launcher: Sequence[str], environment: Mapping[str, str]) -> tuple[bool, str]:
    """Launch two ranks, let one die, and tell whether the other goes on.

    Args:
        launcher: Starts two ranks of the command that is added to it.
        environment: For it.

    Returns:
        Whether the other rank went on, and in a line what was seen.
    """
    began = time.monotonic()
    done = run(
        [*launcher, sys.executable, "-m", "hpctrain.elastic.selftest"],
        timeout_seconds=SECONDS,
        env=environment,
    )
    if OUTLIVED in done.stdout:
        return True, f"a rank outlived another's death ({time.monotonic() - began:.1f} s)"
    said = [line for line in done.stdout.splitlines() if line.strip(" -")]
    return False, f"a rank did not outlive another's death: {said[-1] if said else 'no word'}"


def main() -> None:
    """Run as one rank of the test."""
    set_parameters(os.environ, hang_seconds=5.0)
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    world.Set_errhandler(MPI.ERRORS_RETURN)
    comm = world.Dup()
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    pmix.fence(SECONDS)
    if comm.size < 2:
        sys.exit("the ranks do not see each other")
    if comm.rank == comm.size - 1:
        time.sleep(START_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + SECONDS / 2
    try:
        while time.monotonic() < deadline:
            comm.Barrier()
    except MPI.Exception:
        comm.Revoke()
        left = comm.Shrink()
        if left.size == comm.size - 1:
            print(OUTLIVED, flush=True)
            pmix.leave()
            os._exit(0)
    os._exit(1)


if __name__ == "__main__":
    main()
