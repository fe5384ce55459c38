"""Newcomers: processes that a run under way starts by MPI spawn, and takes in.

Rank 0 starts a process that runs this very command, on a thread of its own because that blocks. The
process imports and builds its model while the others go on, and says when it is ready. When all
others are at the same step it is taken in.
"""

from __future__ import annotations

import sys
import threading

from mpi4py import MPI

from hpctrain.elastic.membership import Welcome
from hpctrain.errors import Dismissed, PeerLost
from hpctrain.world import pmix
from hpctrain.world.spawn import START_SECONDS, receive_json, send_json, spawned

WELCOME, READY, GO, TAKE_IN = 50, 51, 52, 53
COMMAND = ("--strategy", "horovod")  # a world of one would choose another
WAIT_SECONDS = 120.0
"""So long a process that is ready waits to be taken in; the others look about once a second."""


class Recruiter:
    """Starts processes where there are too few.

    Args:
        wanted: How many there should be.
        out: The run folder.
    """

    def __init__(self, wanted: int, out: str) -> None:
        self._wanted = wanted
        self._out = out
        self._thread: threading.Thread | None = None
        self._comm: MPI.Intercomm | None = None
        self._ready = False

    def look(self, size: int, number: int) -> None:
        """Start a process if there are too few; to be called now and then, by rank 0 alone.

        Args:
            size: How many there are.
            number: What to call the next one.
        """
        if size < self._wanted and self._thread is None and not self._ready:
            self._thread = threading.Thread(target=self._spawn, args=(number,), daemon=True)
            self._thread.start()
        elif self._thread is not None and not self._thread.is_alive():
            self._thread = None

    def ready(self) -> bool:
        """Whether a process is ready to be taken in."""
        return self._ready

    def _spawn(self, number: int) -> None:
        try:
            comm = MPI.COMM_SELF.Spawn(sys.executable, [*sys.argv, *COMMAND], 1)
            comm.Set_errhandler(MPI.ERRORS_RETURN)
            send_json(comm, Welcome(number, self._out), WELCOME)
            receive_json(comm, READY)
        except (MPI.Exception, PeerLost) as error:
            print(f"hpctrain: a new process did not start: {error}", file=sys.stderr, flush=True)
            return
        self._comm, self._ready = comm, True

    def take(self) -> MPI.Intercomm | None:
        """Hand over the process that is ready, if there is one; it is no longer this one's."""
        comm, self._comm, self._ready = self._comm, None, False
        return comm

    def close(self) -> None:
        """Dismiss who is ready, or about to be: the run is over."""
        if self._thread is not None:
            self._thread.join(START_SECONDS)
        if self._comm is not None:
            send_json(self._comm, "over", GO)


def admit(base: MPI.Intracomm, newcomer: MPI.Intercomm | None) -> MPI.Intracomm:
    """Take in a process that is ready: every member calls this.

    Args:
        base: Of the members.
        newcomer: What rank 0 took from its recruiter; None on the others.

    Raises:
        MPI.Exception: It, or a member, was lost meanwhile.
    """
    bridge = base  # counts on rank 0 alone
    if newcomer is not None:
        send_json(newcomer, "go", GO)
        bridge = newcomer.Merge(False)
    return base.Create_intercomm(0, bridge, 1, TAKE_IN).Merge(False)


def ask_to_join() -> Welcome | None:
    """Return what this process is told, if a running job started it; None: none did."""
    if not spawned():
        return None
    return Welcome(*receive_json(MPI.Comm.Get_parent(), WELCOME))


def join() -> MPI.Intracomm:
    """Say that this process is ready, and return when the others have taken it in.

    Raises:
        Dismissed: The run is over.
        PeerLost: Nobody answers.
    """
    parent = MPI.Comm.Get_parent()
    parent.Set_errhandler(MPI.ERRORS_RETURN)
    send_json(parent, "ready", READY)
    try:
        answer = receive_json(parent, GO, WAIT_SECONDS)
    except MPI.Exception as error:
        raise PeerLost(
            "the run that this process was to join is gone.", hint="its own log says why."
        ) from error
    if answer != "go":
        pmix.leave()
        raise Dismissed("the run was over before this process could take part in it.")
    bridge = parent.Merge(True)
    return MPI.COMM_SELF.Create_intercomm(0, bridge, 0, TAKE_IN).Merge(True)
