"""How ranks of a host come to share memory (regions.py), by an MPI window."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from hpctrain.ps.protocol.regions import Regions

PAGE = 4096

SHARED_MEMORY = "/dev/shm"
"""Where MPI makes windows; a container has 64 MiB there unless it was asked for more."""

SPARE_BYTES = 2**20
"""What else there is in a window."""


class Sharing:
    """Memory of the workers of a host, once all of its ranks have come to share it.

    Where one of them is lost before, the others exchange messages instead.

    Args:
        node: The host's ranks.
        workers: Their numbers, and places among the host's ranks.
        same_weights: Whether they use one set of weights.
        watch: What ends a rank of the host that is stopped, while the others block.

    Attributes:
        common: The worker whose weights all use, or None.
        regions: The memory, once ``done``; empty where there is to be none.
    """

    def __init__(
        self,
        node: MPI.Intracomm,
        workers: dict[int, int],
        same_weights: bool,
        watch: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.common = min(workers) if same_weights else None
        self.regions = Regions()
        self.done = threading.Event()
        self._node = node
        self._workers = workers
        self._watch = watch
        self._size: int | None = None
        self._request: MPI.Request | None = None
        self._window: MPI.Win | None = None
        self._agreement: tuple[Any, Any] | None = None

    def offer(self, size: int) -> None:
        """Say how many bytes this rank adds to the shared memory."""
        self._size = -(-size // PAGE) * PAGE

    def poll(self) -> bool:
        """Return True once, when the memory is there; blocks only when every rank has come."""
        if self._size is None or self.done.is_set():
            return False
        try:
            if self._request is None:
                self._request = self._node.Ibarrier()
            if not self._request.Test():
                return False
            with self._watch():
                self._make(self._size)
        except MPI.Exception:
            self._agree(False)
        self.done.set()
        return True

    def _make(self, size: int) -> None:
        memory = {}
        if not self._fits(size):
            return
        try:
            window = self._window = MPI.Win.Allocate_shared(size, 1, comm=self._node)
            for worker, place in self._workers.items():
                buffer, _ = window.Shared_query(place)
                memory[worker] = torch.frombuffer(buffer, dtype=torch.uint8)
            whole = self._agree(True)
        except MPI.Exception:
            whole = self._agree(False)
        if whole:
            self.regions = Regions(memory, self.common)

    def _fits(self, size: int) -> bool:
        """Whether there is room for what all ranks of the host offer: MPI does not look."""
        mine = np.array([size], np.int64)
        offered = np.zeros(1, np.int64)
        self._node.Allreduce(mine, offered)
        free = np.array([_free_bytes()], np.int64)
        least = np.zeros(1, np.int64)
        self._node.Allreduce(free, least, op=MPI.MIN)
        return int(offered[0]) + SPARE_BYTES <= int(least[0])

    def _agree(self, whole: bool) -> bool:
        """Whether all live ranks of the host have the memory."""
        flag = np.array([whole], np.int32)
        # An MPI without agreement, or fault tolerance, ends the job when a rank is lost.
        with contextlib.suppress(MPI.Exception, NotImplementedError):
            self._agreement = (self._node.Iagree(flag), flag)
            if whole:  # all have come; else the result is known already
                self._agreement[0].Wait()
        return bool(flag[0])


def _free_bytes() -> int:
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:  # this MPI makes them elsewhere
        return 2**62
    return found.f_bavail * found.f_frsize
