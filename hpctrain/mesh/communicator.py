"""The world as the ranks of a mesh see it: collectives of torch.distributed over MPI."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from hpctrain.mesh.shape import Shape
from hpctrain.world.communicator import Part, equal_part


class MeshCommunicator:
    """All ranks of a mesh; those of one replica have the same part of each batch.

    Args:
        shape: Of the mesh.
        local_rank: This process among those of its host.
        local_size: How many those are.
    """

    def __init__(self, shape: Shape, local_rank: int, local_size: int) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.local_rank = local_rank
        self.local_size = local_size
        self._replica = equal_part(shape.place(self.rank).dp, shape.dp)

    def part(self, epoch: int, batch: int) -> Part:
        """Return this rank's part of a global batch: as much as every other replica has.

        Args:
            epoch: Makes no difference.
            batch: Makes no difference.
        """
        return self._replica

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a contiguous tensor over all ranks, in place."""
        dist.all_reduce(tensor)

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        """Overwrite a contiguous tensor on every rank with the root's, in place.

        Args:
            tensor: Of the same shape and type on every rank.
            root: The rank whose values all take.
        """
        dist.broadcast(tensor, root)

    def barrier(self) -> None:
        """Return when every rank has come here."""
        dist.barrier()

    def give(self, pool: str, values: dict[str, float]) -> dict[str, float]:
        """Raise NotImplementedError: a mesh's ranks take steps together, and need no pool.

        Args:
            pool: Makes no difference.
            values: Makes no difference.
        """
        raise NotImplementedError

    def remember(self, value: Any) -> None:
        """Do nothing: nobody will join."""

    def stop(self) -> None:
        """Raise NotImplementedError: a mesh's ranks take steps together, and end so."""
        raise NotImplementedError

    def abort(self, reason: str, code: int = 1) -> None:
        """Do nothing: the launcher ends the other ranks.

        Args:
            reason: Makes no difference.
            code: Makes no difference.
        """

    def close(self) -> None:
        """Leave the world when all ranks have come here."""
        self.barrier()
        dist.destroy_process_group()
