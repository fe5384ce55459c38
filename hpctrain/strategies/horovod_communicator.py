"""The communicator of Horovod's world: its collectives, and waiting for them within a bound."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch

from hpctrain import process
from hpctrain.elastic.membership import Membership
from hpctrain.errors import PeerLost
from hpctrain.world.world import Part, equal_part

Handle: TypeAlias = int | torch.Tensor
"""A collective under way: Horovod's number of it, or its result, where there is no other rank."""

YIELDING_SECONDS = 2e-3
"""How long a wait only yields its core; waking from a sleep would delay a short one too much."""


class HorovodCommunicator:
    """The communicator of Horovod's world; of one rank alone, nothing is exchanged."""

    def __init__(
        self, hvd: Any, timeout_seconds: float, membership: Membership | None = None
    ) -> None:
        self._hvd = hvd
        self._membership = membership
        self.timeout_seconds = timeout_seconds

    @property
    def rank(self) -> int:
        """This process, 0 to ``size - 1``."""
        return int(self._hvd.rank())

    @property
    def size(self) -> int:
        """How many processes take part."""
        return int(self._hvd.size())

    @property
    def alone(self) -> bool:
        """Whether there is no other rank, at present."""
        return self.size == 1

    @property
    def stays_alone(self) -> bool:
        """Whether there is no other rank, and none can join."""
        return self._membership is None and self.alone

    @property
    def local_rank(self) -> int:
        """This process among those of its host."""
        return int(self._hvd.local_rank())

    @property
    def local_size(self) -> int:
        """How many processes run on this host."""
        return int(self._hvd.local_size())

    def part(self, epoch: int, batch: int) -> Part:
        """Return a part as large as every other rank's.

        Args:
            epoch: Makes no difference.
            batch: Makes no difference.
        """
        return equal_part(self.rank, self.size)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a contiguous tensor over all ranks, in place."""
        self.wait(self.start_sum(tensor, "hpctrain.all_reduce"))

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        """Overwrite a contiguous tensor on every rank with the root's, in place.

        Args:
            tensor: Of the same shape and type on every rank.
            root: The rank whose values all take.
        """
        if self.alone:
            return
        with peers(self):
            handle = self._hvd.broadcast_async_(tensor, root, name="hpctrain.broadcast")
        self.wait(handle)

    def barrier(self) -> None:
        """Wait until every rank has come to this call."""
        self.all_reduce(torch.zeros(1))

    def start_sum(self, tensor: torch.Tensor, name: str) -> Handle:
        """Begin to sum a tensor in place; give what this returns to :meth:`wait`.

        Args:
            tensor: Contiguous.
            name: All ranks have the same one; no other exchange under way has it.
        """
        if self.alone:
            return tensor
        with peers(self):
            return int(self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Sum))

    def start_average(self, tensor: torch.Tensor, name: str) -> Handle:
        """Begin to average a tensor in place; give what this returns to :meth:`wait`.

        Args:
            tensor: Contiguous.
            name: As in :meth:`start_sum`.
        """
        if self.alone:
            return tensor
        with peers(self):
            return int(self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Average))

    def start_gather(self, tensor: torch.Tensor, name: str) -> Handle:
        """Begin to collect all ranks' rows, in the order of ranks; :meth:`wait` returns them.

        Args:
            tensor: Contiguous, of shape (rows, ...); ranks may have other numbers of rows.
            name: As in :meth:`start_sum`.
        """
        if self.alone:
            return tensor.clone()
        with peers(self):
            return int(self._hvd.allgather_async(tensor, name=name))

    def start_scatter(self, tensor: torch.Tensor, name: str) -> int:
        """Begin to sum a tensor; :meth:`wait` returns this rank's part of the rows.

        Args:
            tensor: Contiguous, of shape (rows, ...). Where ranks' parts cannot be equal, the first
                ranks have a row more.
            name: As in :meth:`start_sum`.
        """
        with peers(self):
            return int(self._hvd.reducescatter_async(tensor, name=name, op=self._hvd.Sum))

    def start_all_to_all(self, tensor: torch.Tensor, name: str) -> Handle:
        """Begin to give each rank its part; :meth:`wait` returns what all have given to this one.

        Args:
            tensor: Contiguous, of shape (n,); n is a multiple of the ranks, and the same on each.
            name: As in :meth:`start_sum`.
        """
        if self.alone:
            return tensor.clone()
        with peers(self):
            return int(self._hvd.alltoall_async(tensor, name=name))

    def ready(self, handle: Handle) -> bool:
        """Whether :meth:`wait` would take no time."""
        return isinstance(handle, torch.Tensor) or bool(self._hvd.poll(handle))

    def wait(self, handle: Handle) -> torch.Tensor:
        """Wait for a collective, for ``timeout_seconds`` at most, and return what came of it.

        Horovod's own wait spins on a core until the end of time. This one offers its core to others
        at once, and soon sleeps, because ranks and their MPI threads often outnumber cores.

        Raises:
            PeerLost: The time is up, or Horovod says that a peer failed.
        """
        if isinstance(handle, torch.Tensor):
            return handle
        start = time.monotonic()
        while not self._hvd.poll(handle):
            waited = time.monotonic() - start
            if waited < YIELDING_SECONDS:
                os.sched_yield()
                continue
            if self._membership is not None:
                self._membership.watch()
            if waited > self.timeout_seconds:
                others = ", ".join(str(r) for r in range(self.size) if r != self.rank)
                raise PeerLost(
                    f"rank {self.rank} of {self.size} on {os.uname().nodename} waited "
                    f"{waited:.0f} s for an exchange with ranks {others}.",
                    hint="one of them hangs or was stopped; its own log says where. Horovod "
                    "names ranks that lag behind above, if it could.",
                )
            time.sleep(min(waited / 8, 1e-3))
        with peers(self):
            result = self._hvd.synchronize(handle)
        if isinstance(result, tuple):  # of an all-to-all, with the sizes of the parts
            result = result[0]
        assert isinstance(result, torch.Tensor)
        return result

    def give(self, pool: str, values: dict[str, float]) -> dict[str, float]:
        """Refuse: the ranks take steps together, and need no pool.

        Args:
            pool: Makes no difference.
            values: Go nowhere.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError

    def remember(self, value: Any) -> None:
        """Do nothing: ranks that join meet all others anew."""

    def stop(self) -> None:
        """Refuse: the ranks take steps together, and end together.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError

    def abort(self, reason: str, code: int = 1) -> None:
        """End the others, too, where the launcher would not.

        Args:
            reason: Makes no difference here; the rank itself says it.
            code: The exit code comes with the process's end.
        """
        if self._membership is not None:
            process.abort = self._membership.abort

    def close(self) -> None:
        """Leave the world: every rank has to, and none before all have come."""
        if self._membership is None:
            self.barrier()
        else:
            try:
                self.barrier()
            except PeerLost:
                process.mpi_is_whole = False
            self._membership.leave()
        if process.mpi_is_whole:
            self._hvd.shutdown()


@contextlib.contextmanager
def peers(comm: HorovodCommunicator) -> Iterator[None]:
    """Turn Horovod's exceptions into the one that hpctrain has for a lost peer."""
    from horovod.common.exceptions import HorovodInternalError

    try:
        yield
    except HorovodInternalError as error:
        raise PeerLost(
            f"rank {comm.rank} on {os.uname().nodename} lost a peer: {error}.",
            hint="look for the first error of another rank; `--resume auto` goes on from the last "
            "checkpoint.",
        ) from error
