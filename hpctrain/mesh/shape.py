"""The shape of a mesh of ranks, and where in it each rank stands."""

from __future__ import annotations

import math
from typing import NamedTuple

from hpctrain.errors import Error


class Place(NamedTuple):
    """Where a rank stands in a mesh.

    Attributes:
        pp: Which stages of a pipeline it computes.
        dp: Which replica it is part of: which samples it reads.
        tp: Which part of each divided matrix it holds.
    """

    pp: int
    dp: int
    tp: int


class Shape(NamedTuple):
    """How many ranks there are along each axis of a mesh.

    Neighbouring ranks, which are mostly on one host, exchange most: those of one tensor-parallel
    group. Then come those of the same stage, and last the stages.

    Attributes:
        pp: Stages of a pipeline, each on ranks of its own.
        dp: Replicas, which read different samples.
        tp: Parts of each divided matrix.

    Example:
        >>> shape = Shape(pp=2, dp=2, tp=2)
        >>> shape.place(5)
        Place(pp=1, dp=0, tp=1)
        >>> shape.rank(Place(pp=1, dp=0, tp=1))
        5
    """

    pp: int = 1
    dp: int = 1
    tp: int = 1

    @property
    def size(self) -> int:
        """How many ranks the mesh has."""
        return math.prod(self)

    def place(self, rank: int) -> Place:
        """Return where a rank stands.

        Args:
            rank: From 0 to ``size - 1``.
        """
        rest, tp = divmod(rank, self.tp)
        pp, dp = divmod(rest, self.dp)
        return Place(pp, dp, tp)

    def rank(self, place: Place) -> int:
        """Return which rank stands at a place."""
        return (place.pp * self.dp + place.dp) * self.tp + place.tp

    def __str__(self) -> str:
        return f"dp={self.dp}, pp={self.pp}, tp={self.tp}"


def fitted(ranks: int, *, dp: int | None, pp: int, tp: int) -> Shape:
    """Return the mesh of so many ranks.

    Args:
        ranks: That were launched.
        dp: Replicas; None: as many as the ranks allow.
        pp: Stages.
        tp: Parts of a divided matrix.

    Raises:
        Error: The ranks are not as many as the mesh takes.

    Example:
        >>> fitted(8, dp=None, pp=2, tp=1)
        Shape(pp=2, dp=4, tp=1)
    """
    shape = Shape(pp, dp if dp is not None else max(1, ranks // (pp * tp)), tp)
    if shape.size != ranks:
        raise Error(
            f"a mesh of {shape} takes {shape.size} ranks, and {ranks} were launched.",
            hint=f"start {shape.size} ranks, or choose others of --mesh dp=N,pp=N,tp=N.",
        )
    return shape
