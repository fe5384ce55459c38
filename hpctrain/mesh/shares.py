"""Which ranks hold which part of each parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from hpctrain.errors import Error
from hpctrain.mesh.region import Region
from hpctrain.world.broadcast import gather_json
from hpctrain.world.communicator import Communicator


class Share(NamedTuple):
    """A part of a parameter.

    Attributes:
        region: Where it lies in the whole.
        ranks: That hold it, ascending; the first one answers for it.
    """

    region: Region
    ranks: tuple[int, ...]


def shares_of(
    comm: Communicator, names: Sequence[str], regions: Sequence[Region | None]
) -> list[list[Share]]:
    """Return for each parameter its parts; every rank calls this.

    Args:
        comm: Of the world.
        names: Of the parameters.
        regions: What this rank holds of each; None: nothing.

    Raises:
        Error: The parts of a parameter do not make up a whole.
    """
    table = gather_json(comm, regions)
    found = []
    for number, name in enumerate(names):
        parts: dict[Region, list[int]] = {}
        for rank, row in enumerate(table):
            if row[number] is not None:
                parts.setdefault(_region(row[number]), []).append(rank)
        shares = [Share(region, tuple(ranks)) for region, ranks in parts.items()]
        if sum(share.region.elements for share in shares) != _elements(shares[0].region):
            raise Error(
                f"the ranks' parts of parameter '{name}' do not make up a whole.",
                hint="is its module in parallelize(model) of the task twice?",
            )
        found.append(shares)
    return found


def _region(value: Any) -> Region:
    shape, runs = value
    return Region(tuple(shape), tuple(tuple((a, b) for a, b in each) for each in runs))


def _elements(region: Region) -> int:
    return Region.whole(region.shape).elements
