"""Which server has which slice of the parameters: a pure function, so nobody has to be told.

Every rank works the placement out for itself, from the sizes of the slices and the servers alone.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from hpctrain.data.random import key
from hpctrain.errors import Error, PeerLost

Placement = tuple[tuple[int, ...], ...]
"""For each slice its primary server, then its replicas; all distinct."""

_SLACK = 1.1  # so many times the mean is what a server takes; less would move more
_VIRTUAL_NODES = 128
_SERVER, _SLICE, _TURN = range(3)  # what a key is for

_Preference = Callable[[int], Iterable[int]]
"""The servers in the order in which a slice would have them."""


def place(
    sizes: Sequence[int],
    servers: Sequence[int],
    *,
    method: Literal["hash", "greedy"] = "hash",
    replicas: int = 0,
) -> Placement:
    """Give every slice a primary server, and replicas.

    ``hash`` is consistent hashing on a ring with virtual nodes (Karger et al., "Consistent hashing
    and random trees", STOC 1997) with bounded loads (Mirrokni, Thorup and Zadimoghaddam,
    "Consistent Hashing with Bounded Loads", SODA 2018): a slice goes to the first server along the
    ring that has room for it. A server more or less then moves little more than its own part.

    ``greedy`` gives the largest slice left to the least loaded server (Graham, "Bounds on
    multiprocessing timing anomalies", 1969). That balances better, and a server more or less moves
    most of everything.

    Replicas are chosen likewise, and so that first replicas have room for what they would inherit
    if any one server were lost.

    Args:
        sizes: Bytes of each slice, positive.
        servers: Who they are, all distinct, in any order.
        method: ``hash`` or ``greedy``.
        replicas: Copies of each slice besides the primary's.

    Raises:
        Error: There are too few servers for so many replicas.
    """
    if not 0 <= replicas < len(servers):
        raise Error(
            f"{replicas} replicas of each slice do not fit on {len(servers)} servers: "
            "a slice and its replicas are all on different ones.",
            hint=f"at most ps.replicas={max(0, len(servers) - 1)}, or more servers.",
        )
    if method == "hash":
        preference, enough = _ring(servers), 1.0
    else:  # none has room, so it is always the least loaded
        ordered = sorted(servers)
        preference, enough = (lambda index: ordered), 0.0
    loads = dict.fromkeys(servers, 0)
    capacity = _capacity(sizes, len(servers))
    groups: list[list[int]] = [[] for _ in sizes]
    for index in _turns(sizes):

        def fullness(server: int, size: int = sizes[index]) -> float:
            return (loads[server] + size) / capacity

        primary = _first(preference(index), fullness, enough)
        loads[primary] += sizes[index]
        groups[index].append(primary)
    return _replicate(groups, [1 + replicas] * len(sizes), sizes, servers, preference, enough)


def without(
    placement: Placement, sizes: Sequence[int], lost: int, servers: Sequence[int]
) -> Placement:
    """Return the placement after the loss of a server: the failover of its slices.

    Slices whose primary was lost belong to their first replica. A slice that is now short of a
    replica gets another, after those that it has, while there are servers enough.

    Args:
        placement: As it was.
        sizes: Bytes of each slice, positive.
        lost: The server that is gone.
        servers: The others.

    Raises:
        PeerLost: The lost server had the only copy of a slice.
    """
    groups = [[server for server in group if server != lost] for group in placement]
    gone = [size for size, group in zip(sizes, groups, strict=True) if not group]
    if gone:
        raise PeerLost(
            f"server {lost} is lost, and with it the only copy of {len(gone)} slices of the "
            f"parameters ({sum(gone):,} bytes).",
            hint="ps.replicas=1 survives it; now, go on from a checkpoint.",
        )
    widths = [min(len(group), len(servers)) for group in placement]
    return _replicate(groups, widths, sizes, servers, _ring(servers), 1.0)


def _replicate(
    groups: list[list[int]],
    widths: Sequence[int],
    sizes: Sequence[int],
    servers: Sequence[int],
    preference: _Preference,
    enough: float,
) -> Placement:
    """Add replicas to the groups that are not as wide as they should be."""
    owned: dict[int, int] = defaultdict(int)
    copied: dict[int, int] = defaultdict(int)
    inherited: dict[tuple[int, int], int] = defaultdict(int)  # by whom, from whom
    for size, group in zip(sizes, groups, strict=True):
        owned[group[0]] += size
        for server in group[1:]:
            copied[server] += size
        for server in group[1:2]:
            inherited[server, group[0]] += size
    copies = [s for s, width in zip(sizes, widths, strict=True) for _ in range(width - 1)]
    room_to_copy = _capacity(copies, len(servers))
    room_to_inherit = _capacity(sizes, len(servers) - 1)

    for index in _turns(sizes):
        size, group = sizes[index], groups[index]
        while len(group) < widths[index]:
            heir = len(group) == 1

            def fullness(
                server: int, size: int = size, owner: int = group[0], heir: bool = heir
            ) -> float:
                full = (copied[server] + size) / room_to_copy
                if heir:
                    after = owned[server] + inherited[server, owner] + size
                    full = max(full, after / room_to_inherit)
                return full

            others = (server for server in preference(index) if server not in group)
            chosen = _first(others, fullness, enough)
            copied[chosen] += size
            if heir:
                inherited[chosen, group[0]] += size
            group.append(chosen)
    return tuple(tuple(group) for group in groups)


def _ring(servers: Sequence[int]) -> _Preference:
    """The servers as they come along a ring from a slice's place on it."""
    nodes = [(key(_SERVER, s, node), s) for s in servers for node in range(_VIRTUAL_NODES)]
    nodes.sort()

    def preference(index: int) -> Iterable[int]:
        start = bisect(nodes, (key(_SLICE, index),))
        seen = set()
        for number in range(start, start + len(nodes)):
            server = nodes[number % len(nodes)][1]
            if server not in seen:
                seen.add(server)
                yield server

    return preference


def _first(candidates: Iterable[int], fullness: Callable[[int], float], enough: float) -> int:
    """The first candidate that would not be fuller than that, or else the least full."""
    best, least = -1, math.inf
    for server in candidates:
        full = fullness(server)
        if full <= enough:
            return server
        if full < least:
            best, least = server, full
    return best


def _turns(sizes: Sequence[int]) -> list[int]:
    """The order in which slices choose: the large ones while there is room, whoever is there."""
    return sorted(range(len(sizes)), key=lambda index: (-sizes[index], key(_TURN, index)))


def _capacity(sizes: Sequence[int], servers: int) -> float:
    """Bytes that a server takes: somewhat more than the mean, or what few large slices need."""
    loads = [0] * max(1, servers)
    for size in sorted(sizes, reverse=True):
        heapq.heapreplace(loads, loads[0] + size)
    return max(_SLACK * sum(loads) / len(loads), max(loads))
