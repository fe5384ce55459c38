"""Who takes part: rank, size, local rank, device, and the communicator under them.

The world is not a constant. Ask it each time: nothing may keep a rank or a size of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from hpctrain.errors import Error
from hpctrain.process import cores
from hpctrain.world import uncaught
from hpctrain.world.launcher import ALONE, Launch, detect


class Part(NamedTuple):
    """What of a global batch falls to a rank: from ``lower / total`` to ``upper / total`` of it.

    Attributes:
        rank: Whose it is.
        size: Of the world that shares the batch.
        lower: Shares of the ranks before this one.
        upper: The same and this rank's.
        total: Shares of all ranks.
    """

    rank: int
    size: int
    lower: int
    upper: int
    total: int


def equal_part(rank: int, size: int) -> Part:
    """A rank's part where all have the same."""
    return Part(rank, size, rank, rank + 1, size)


def part_of(shares: Sequence[int], rank: int) -> Part:
    """A rank's part where ranks' parts are to one another as these numbers.

    Args:
        shares: Of every rank; some may be 0, but not all.
        rank: Whose part it is.
    """
    lower = sum(shares[:rank])
    return Part(rank, len(shares), lower, lower + shares[rank], sum(shares))


class Communicator(Protocol):
    """What a strategy's engine offers the rest of hpctrain: few collectives, all bounded in time.

    Every rank calls the same ones in the same order. A lost peer raises
    :class:`hpctrain.errors.PeerLost`.
    """

    @property
    def rank(self) -> int:
        """This process, 0 to ``size - 1``."""

    @property
    def size(self) -> int:
        """How many processes take part."""

    @property
    def local_rank(self) -> int:
        """This process among those of its host."""

    @property
    def local_size(self) -> int:
        """How many processes run on this host."""

    def part(self, epoch: int, batch: int) -> Part:
        """What of an epoch's global batch of that number falls to this rank.

        Asked before each batch. It may differ from one batch to the next, when workers come, go, or
        turn out slow; but of one batch, all ranks' parts must be of the same shares.
        """

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a contiguous tensor over all ranks, in place."""

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        """Overwrite a contiguous tensor with the root's, in place."""

    def barrier(self) -> None:
        """Return when every rank has come here."""

    def give(self, pool: str, values: dict[str, float]) -> dict[str, float]:
        """Add values to a pool, waiting for nobody; rank 0 takes what has come together.

        Only where ranks do not go in lockstep.
        """

    def remember(self, value: Any) -> None:
        """Keep a plain value for ranks that join later; the last one counts."""

    def stop(self) -> None:
        """Have every rank end the training, where ranks do not go in lockstep."""

    def abort(self, reason: str, code: int = 1) -> None:
        """This rank has failed: tell the others, where the launcher might not."""

    def close(self) -> None:
        """Leave the world in good order; nothing may be called afterwards."""


class Alone:
    """The communicator of a world of one."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def part(self, epoch: int, batch: int) -> Part:
        """All of it."""
        return equal_part(self.rank, self.size)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """A sum over one."""

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        """Nobody to send to."""

    def barrier(self) -> None:
        """Nobody to wait for."""

    def give(self, pool: str, values: dict[str, float]) -> dict[str, float]:
        """What was given."""
        return values

    def remember(self, value: Any) -> None:
        """Nobody will join."""

    def stop(self) -> None:
        """Nobody to stop."""

    def abort(self, reason: str, code: int = 1) -> None:
        """Nobody to tell."""

    def close(self) -> None:
        """Nothing to leave."""


class Even:
    """A communicator, but every rank has as much of every batch: for validation.

    Args:
        comm: Whose ranks and collectives they are.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def part(self, epoch: int, batch: int) -> Part:
        """As much as every other rank has."""
        return equal_part(self._comm.rank, self._comm.size)


class Unconnected:
    """Before a strategy connects: the launcher's word on rank and size, and no collectives."""

    def __init__(self, launch: Launch) -> None:
        self.rank = launch.rank
        self.size = launch.size
        self.local_rank = launch.local_rank
        self.local_size = launch.local_size

    def part(self, epoch: int, batch: int) -> Part:
        """As much as every other rank has."""
        return equal_part(self.rank, self.size)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Refused."""
        raise self._error()

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        """Refused."""
        raise self._error()

    def barrier(self) -> None:
        """Refused."""
        raise self._error()

    def give(self, pool: str, values: dict[str, float]) -> dict[str, float]:
        """Refused."""
        raise self._error()

    def remember(self, value: Any) -> None:
        """Nobody will join."""

    def stop(self) -> None:
        """Refused."""
        raise self._error()

    def abort(self, reason: str, code: int = 1) -> None:
        """Nobody to tell."""

    def close(self) -> None:
        """Nothing to leave."""

    def _error(self) -> Error:
        return Error(
            f"this world of {self.size} ranks is not connected yet.",
            hint='make a strategy first: strategy = hpctrain.strategy("horovod", world).',
        )


class World:
    """Who takes part in this run, as this process sees it.

    Attributes:
        launch: What the launcher said at the start.
        comm: The engine under the world; a strategy replaces it when it connects.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.comm: Communicator = Alone() if launch.size == 1 else Unconnected(launch)

    @property
    def rank(self) -> int:
        """This process, 0 to ``size - 1``."""
        return self.comm.rank

    @property
    def size(self) -> int:
        """How many processes take part."""
        return self.comm.size

    @property
    def local_rank(self) -> int:
        """This process among those of its host."""
        return self.comm.local_rank

    @property
    def local_size(self) -> int:
        """How many processes run on this host."""
        return self.comm.local_size

    def once(self, action: Callable[[], None]) -> None:
        """Have rank 0 do something while the others wait; if it is lost, the next one does it."""
        done = torch.zeros(1)
        while not done:
            if first := self.rank == 0:
                action()
            done.fill_(first)
            self.comm.all_reduce(done)

    def part(self, epoch: int, batch: int) -> Part:
        """What of an epoch's global batch of that number falls to this rank."""
        return self.comm.part(epoch, batch)

    @property
    def device(self) -> torch.device:
        """This rank's GPU where there are any, else the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        # By the launcher's numbers, which never change: the model lives there. (An engine may count
        # a host's ranks in another order.) A launcher that binds GPUs shows each rank one alone.
        return torch.device("cuda", self.launch.local_rank % torch.cuda.device_count())

    def require(self, size: int) -> None:
        """Refuse a world of another size than was asked for.

        Raises:
            Error: The size differs.
        """
        if self.launch.size != size:
            raise Error(
                f"the run asks for {size} ranks, but {self.launch.name} started "
                f"{self.launch.size}.",
                hint="start as many as world_size says, or change world_size.",
            )

    def __repr__(self) -> str:
        return f"World(rank={self.rank}, size={self.size}, launcher={self.launch.name!r})"


def init() -> World:
    """Find this process's place under horovodrun, mpirun, srun, or alone.

    Also divides the host's cores among its ranks, unless ``OMP_NUM_THREADS`` is set, because each
    torch process would otherwise start a thread on every core.
    """
    launch = detect()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_per_rank(launch, cores(), os.cpu_count() or 1))
    world = World(launch)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    uncaught.install(launch, lambda reason, code: world.comm.abort(reason, code))
    return world


def threads_per_rank(launch: Launch, allowed: int, present: int) -> int:
    """Threads a rank should compute with.

    Args:
        launch: Tells how many ranks share the host.
        allowed: Cores this process may run on.
        present: Cores of the host.
    """
    if launch == ALONE or allowed < present:  # bound: these cores are this rank's own
        return allowed
    return max(1, allowed // launch.local_size)
