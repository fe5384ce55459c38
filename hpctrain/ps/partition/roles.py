"""Which ranks serve and which work: a pure function of where the ranks are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from hpctrain.errors import Error


class Roles(NamedTuple):
    """Numbers (ranks) of workers and of servers; where they are co-located a rank is both."""

    workers: tuple[int, ...]
    servers: tuple[int, ...]


def assign(hosts: Sequence[int], servers: int, *, colocate: bool) -> Roles:
    """Spread the servers over the hosts, each host's last ranks first; the others work.

    Args:
        hosts: Of each rank, its host as a number.
        servers: How many.
        colocate: Whether the ranks that serve also work.

    Raises:
        Error: There are not enough ranks.
    """
    if servers + (0 if colocate else 1) > len(hosts):
        raise Error(
            f"too few ranks: {len(hosts)}, with {servers} to serve and at least one to work.",
            hint="start more by mpirun, use fewer servers, or --set ps.colocate=true.",
        )
    ranks: defaultdict[int, list[int]] = defaultdict(list)
    for rank, host in enumerate(hosts):
        ranks[host].append(rank)
    turns = [
        (len(here) - place, host) for host, here in ranks.items() for place in range(len(here))
    ]
    # The last rank of every host, last host first; then the last but one of every host, ...
    order = [
        ranks[host][-turn] for turn, host in sorted(turns, key=lambda item: (item[0], -item[1]))
    ]
    serving = tuple(sorted(order[:servers]))
    working = tuple(r for r in range(len(hosts)) if colocate or r not in serving)
    return Roles(working, serving)
