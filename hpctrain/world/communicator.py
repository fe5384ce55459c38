"""What a strategy's engine offers: a rank's place, its part of a batch, and a few collectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch


class Part(NamedTuple):
    """A rank's part of a global batch: from ``lower / total`` to ``upper / total`` of it.

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
    """Return a rank's part of a global batch that is divided evenly.

    Args:
        rank: Whose part it is, 0 to ``size - 1``.
        size: How many ranks share the batch.

    Example:
        >>> equal_part(1, 4)
        Part(rank=1, size=4, lower=1, upper=2, total=4)
    """
    return Part(rank, size, rank, rank + 1, size)


def part_of(shares: Sequence[int], rank: int) -> Part:
    """Return a rank's part of a global batch that is divided in proportion to ranks' shares.

    Args:
        shares: Of every rank; some may be 0, but not all.
        rank: Whose part it is.

    Example:
        >>> part_of([3, 1], 1)
        Part(rank=1, size=2, lower=3, upper=4, total=4)
    """
    lower = sum(shares[:rank])
    return Part(rank, len(shares), lower, lower + shares[rank], sum(shares))


class Communicator(Protocol):
    """The interface of a strategy's engine: a few collectives, all bounded in time.

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
        """Return the part of a global batch that falls to this rank.

        Asked before each batch. It may differ from one batch to the next, when workers join, are
        lost, or
        turn out to be stragglers; but of one batch, all ranks' parts must be of the same shares.

        Args:
            epoch: The epoch, counted from 0.
            batch: The number of the global batch within it, counted from 0.
        """

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a contiguous tensor over all ranks, in place."""

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        """Overwrite a contiguous tensor on every rank with the root's, in place.

        Args:
            tensor: Of the same shape and type on every rank.
            root: The rank whose values all take.
        """

    def barrier(self) -> None:
        """Wait until every rank has come to this call."""

    def give(self, pool: str, values: dict[str, float]) -> dict[str, float]:
        """Add values to a pool, waiting for nobody; rank 0 takes what has come together.

        Only for asynchronous training, where ranks do not take each step together.

        Args:
            pool: The pool's name.
            values: What to add, by name.

        Returns:
            On rank 0 the sums that had come together; elsewhere nothing.
        """

    def remember(self, value: Any) -> None:
        """Keep a plain value for ranks that join later; the last one counts."""

    def stop(self) -> None:
        """End the training on every rank, where ranks do not take each step together."""

    def abort(self, reason: str, code: int = 1) -> None:
        """Tell the other ranks that this one has failed, where the launcher might not.

        Args:
            reason: The error, in one line.
            code: The exit code that the job should end with.
        """

    def close(self) -> None:
        """Leave the world in good order; nothing may be called afterwards."""


class Alone:
    """The communicator of a world of one rank: nothing is exchanged, nothing blocks."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def part(self, epoch: int, batch: int) -> Part:
        """Return the whole batch as this rank's part.

        Args:
            epoch: Makes no difference.
            batch: Makes no difference.
        """
        return equal_part(self.rank, self.size)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Leave the tensor as it is: a sum over one rank."""

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> None:
        """Leave the tensor as it is: it is the root's.

        Args:
            tensor: The root's values.
            root: Can only be 0.
        """

    def barrier(self) -> None:
        """Return at once: there is nobody to wait for."""

    def give(self, pool: str, values: dict[str, float]) -> dict[str, float]:
        """Return the values given: this rank's are all there are.

        Args:
            pool: Makes no difference.
            values: Returned as they are.
        """
        return values

    def remember(self, value: Any) -> None:
        """Do nothing: nobody will join."""

    def stop(self) -> None:
        """Do nothing: there is nobody else to stop."""

    def abort(self, reason: str, code: int = 1) -> None:
        """Do nothing: there is nobody to tell.

        Args:
            reason: Makes no difference.
            code: Makes no difference.
        """

    def close(self) -> None:
        """Do nothing: there is no connection to close."""


class Even:
    """A communicator whose ranks have equal parts of every batch: for validation.

    Args:
        comm: Whose ranks and collectives they are.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def part(self, epoch: int, batch: int) -> Part:
        """Return a part as large as every other rank's.

        Args:
            epoch: Makes no difference.
            batch: Makes no difference.
        """
        return equal_part(self._comm.rank, self._comm.size)
