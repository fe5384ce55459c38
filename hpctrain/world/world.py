"""The world: rank, size, local rank, device, and the communicator under them.

The world is not a constant. Ask it each time: nothing may keep a rank or a size of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from hpctrain.errors import Error
from hpctrain.process import cores
from hpctrain.world import logs, uncaught
from hpctrain.world.broadcast import gather_json
from hpctrain.world.communicator import Alone as Alone
from hpctrain.world.communicator import Communicator as Communicator
from hpctrain.world.communicator import Even as Even
from hpctrain.world.communicator import Part as Part
from hpctrain.world.communicator import equal_part as equal_part
from hpctrain.world.communicator import part_of as part_of
from hpctrain.world.gather import gather_rows
from hpctrain.world.launcher import ALONE, Launch, detect


class Unconnected:
    """The communicator before a strategy connects: the launcher's rank and size, no collectives."""

    def __init__(self, launch: Launch) -> None:
        self.rank = launch.rank
        self.size = launch.size
        self.local_rank = launch.local_rank
        self.local_size = launch.local_size

    def part(self, epoch: int, batch: int) -> Part:
        """Return a part as large as every other rank's.

        Args:
            epoch: Makes no difference.
            batch: Makes no difference.
        """
        return equal_part(self.rank, self.size)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Refuse, because no strategy has connected the ranks.

        Raises:
            Error: Always.
        """
        raise self._error()

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        """Refuse, because no strategy has connected the ranks.

        Args:
            tensor: Is left as it is.
            root: Makes no difference.

        Raises:
            Error: Always.
        """
        raise self._error()

    def barrier(self) -> None:
        """Refuse, because no strategy has connected the ranks.

        Raises:
            Error: Always.
        """
        raise self._error()

    def give(self, pool: str, values: dict[str, float]) -> dict[str, float]:
        """Refuse, because no strategy has connected the ranks.

        Args:
            pool: Makes no difference.
            values: Go nowhere.

        Raises:
            Error: Always.
        """
        raise self._error()

    def remember(self, value: Any) -> None:
        """Do nothing: nobody will join."""

    def stop(self) -> None:
        """Refuse, because no strategy has connected the ranks.

        Raises:
            Error: Always.
        """
        raise self._error()

    def abort(self, reason: str, code: int = 1) -> None:
        """Do nothing: there is nobody to tell.

        Args:
            reason: Makes no difference.
            code: Makes no difference.
        """

    def close(self) -> None:
        """Do nothing: there is no connection to close."""

    def _error(self) -> Error:
        return Error(
            f"this world of {self.size} ranks is not connected yet.",
            hint='make a strategy first: strategy = hpctrain.strategy("horovod", world).',
        )


class World:
    """The world of this run, as this process sees it: rank, size, device, and communicator.

    Attributes:
        launch: What the launcher said at the start.
        comm: The engine under the world; a strategy replaces it when it connects.
        no_gathers: Why ranks do not wait for each other in :meth:`all_gather`, and what to do;
            None: they do.

    Example:
        >>> world = World(Launch("alone", rank=0, size=1, local_rank=0, local_size=1))
        >>> world.rank, world.size
        (0, 1)
        >>> world.gather_object({"loss": 0.5})
        [{'loss': 0.5}]
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.no_gathers: tuple[str, str] | None = None
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
        """Run an action on rank 0 while the others wait; if that rank is lost, on the next one."""
        done = torch.zeros(1)
        while not done:
            if first := self.rank == 0:
                action()
            done.fill_(first)
            self.comm.all_reduce(done)

    def part(self, epoch: int, batch: int) -> Part:
        """Return the part of a global batch that falls to this rank.

        Args:
            epoch: The epoch, counted from 0.
            batch: The number of the global batch within it, counted from 0.
        """
        return self.comm.part(epoch, batch)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return all ranks' rows, one rank's after another's; every rank calls this together.

        The gradient is exact: that of the sum of all ranks' losses, so that their average over
        ranks, which a strategy takes, is the gradient of the losses' average. Every rank has to use
        what comes in its loss, because the backward pass is an exchange, too.

        Args:
            tensor: Of shape (rows, ...); a rank may have another number of rows, or none.

        Returns:
            Of shape (all ranks' rows, ...), on the tensor's device.

        Raises:
            Error: Ranks' rows are of different shapes or types, or ranks do not go together here.
            PeerLost: Another rank is gone.
        """
        self._check_gathers("all_gather")
        return tensor if self.size == 1 else gather_rows(self.comm, tensor)

    def gather_object(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank, on every rank; every rank calls this together.

        Args:
            value: What JSON can hold: numbers, text, lists, dicts with text as keys.

        Raises:
            Error: JSON cannot hold it, or ranks do not go together here.
            PeerLost: Another rank is gone.
        """
        self._check_gathers("gather_object")
        try:
            return gather_json(self.comm, value)
        except TypeError as error:
            raise Error(
                f"world.gather_object() on rank {self.rank}: {error}.",
                hint="give numbers, text, lists and dicts; for tensors, there is all_gather().",
            ) from error

    def _check_gathers(self, method: str) -> None:
        if self.no_gathers is not None:
            why, hint = self.no_gathers
            raise Error(f"world.{method}() cannot be used here: {why}.", hint=hint)

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

    Example:
        >>> world = init()
        >>> 0 <= world.rank < world.size
        True
    """
    launch = detect()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_per_rank(launch, cores(), os.cpu_count() or 1))
    world = World(launch)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    logs.follow(lambda: (world.rank, world.size))
    uncaught.install(launch, lambda reason, code: world.comm.abort(reason, code))
    return world


def threads_per_rank(launch: Launch, allowed: int, present: int) -> int:
    """Return how many threads a rank should compute with.

    Args:
        launch: Tells how many ranks share the host.
        allowed: Cores this process may run on.
        present: Cores of the host.
    """
    if launch == ALONE or allowed < present:  # bound: these cores are this rank's own
        return allowed
    return max(1, allowed // launch.local_size)
