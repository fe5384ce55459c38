"""Cutting off a rank that the others count as lost, so that it cannot hold up the job's end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI


class Fence:
    """Knows the processes of all ranks, and ends those of this host that are lost.

    A stopped process would otherwise stay, and its launcher with it, until somebody comes by.

    Args:
        comm: All ranks; each makes one.
        hosts: Of each rank, its host as a number.
    """

    def __init__(self, comm: MPI.Intracomm, hosts: list[int]) -> None:
        self._me = comm.rank
        self._hosts = hosts
        mine = np.array(_identity(os.getpid()), np.int64)
        everyone = np.zeros((comm.size, len(mine)), np.int64)
        comm.Allgather(mine, everyone)
        self._identities = everyone.tolist()
        self._stopped: dict[int, float] = {}
        self._looked = 0.0

    def cut_off(self, peer: int) -> None:
        """End the process of that rank, if it is of this host and still the same process."""
        if not 0 <= peer < len(self._hosts) or self._hosts[peer] != self._hosts[self._me]:
            return
        pid, *_ = self._identities[peer]
        # A number may mean another process in another container, or by now.
        if peer != self._me and list(_identity(pid)) == self._identities[peer]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def cut_off_stopped(self, seconds: float) -> None:
        """End the processes of this host that are seen to be stopped for so long; ask often."""
        now = time.monotonic()
        if now - self._looked < seconds / 8:
            return
        if now - self._looked > seconds / 2:  # this process was stopped, too, or looks first
            self._stopped.clear()
        self._looked = now
        for peer, (pid, *_) in enumerate(self._identities):
            if self._hosts[peer] != self._hosts[self._me] or _state(pid) not in ("T", "t"):
                self._stopped.pop(peer, None)
            elif now - self._stopped.setdefault(peer, now) > seconds:
                self.cut_off(peer)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _identity(pid: int) -> tuple[int, int, int]:
    """A process's number, its number space, and when it began."""
    try:
        began = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        return pid, os.stat("/proc/self/ns/pid").st_ino, began  # noqa: PTH116 - not a path to open
    except (OSError, ValueError, IndexError):
        return pid, 0, 0
