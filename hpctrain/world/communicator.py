"""What an engine offers the rest of hpctrain: a rank's place, its part, and few collectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch


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
        rank: Of those that share the samples.
        size: How many those are.
    """

    def __init__(self, comm: Communicator, rank: int, size: int) -> None:
        self._comm = comm
        self._part = equal_part(rank, size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def part(self, epoch: int, batch: int) -> Part:
        """As much as every other rank has."""
        return self._part
