"""The cost of collectives by the alpha-beta-gamma model: formulas to be checked with a pencil.

A message of S bytes takes alpha + S beta; adding S bytes to S others takes S gamma (Hockney, "The
communication challenge for MPP", 1994). n ranks, R on each of N nodes, so n = N R.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from hpctrain.costmodel.inputs import Machine, Network


class Cost(NamedTuple):
    """The cost of an exchange, in seconds; the parts add up.

    Attributes:
        latency: Of messages, whatever their size.
        transfer: Of bytes on the busiest link.
        work: Of arithmetic, as far as it does not go on while bytes travel.
    """

    latency: float = 0.0
    transfer: float = 0.0
    work: float = 0.0

    @property
    def seconds(self) -> float:
        """The whole time of the exchange."""
        return self.latency + self.transfer + self.work


def ring(size: float, nodes: int, local: int, network: Network, machine: Machine) -> Cost:
    """All-reduce around one ring over all ranks, those of a node side by side.

    2(n-1) steps of S/n bytes each, of which a node's link carries one at a time (Patarasu & Yuan,
    "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009; Sergeev & Del
    Balso, arXiv:1802.05799). A piece passes 2(N-1) links between nodes on its way, and other hops
    within nodes; the slower kind of link sets the pace.

    Args:
        size: S, bytes.
        nodes: N.
        local: R, ranks on a node.
        network: Alpha and beta.
        machine: Gamma.
    """
    n = nodes * local
    between = 2 * (nodes - 1)
    within = 2 * (n - 1) - between
    latency = between * network.latency_seconds + within * network.local_latency_seconds
    betas = [network.beta] * (nodes > 1) + [network.local_beta] * (local > 1)
    transfer = 2 * (n - 1) / n * size * max(betas, default=0.0)
    return Cost(latency, transfer, (n - 1) / n * size * machine.reduce_seconds_per_byte)


def halving(size: float, nodes: int, local: int, network: Network, machine: Machine) -> Cost:
    """Return the cost of recursive halving and doubling among the nodes, with rings within them.

    2 ceil(log2 N) alpha + 2(N-1)/N S beta + (N-1)/N S gamma (Thakur, Rabenseifner & Gropp,
    "Optimization of collective communication operations in MPICH", 2005).

    Args:
        size: S, bytes.
        nodes: N.
        local: R, the ranks of a node.
        network: Alpha and beta.
        machine: Gamma.
    """
    rounds = math.ceil(math.log2(nodes))
    share = (nodes - 1) / nodes
    among = Cost(
        2 * rounds * network.latency_seconds,
        2 * share * size * network.beta,
        share * size / local * machine.reduce_seconds_per_byte,
    )
    return _within(size, local, network, machine, among)


def binomial(size: float, nodes: int, local: int, network: Network, machine: Machine) -> Cost:
    """Return the cost of reduction and broadcast by binomial trees among nodes, rings within them.

    2 ceil(log2 N) (alpha + S beta) + ceil(log2 N) S gamma (Thakur, Rabenseifner & Gropp, 2005).

    Args:
        size: S, bytes.
        nodes: N.
        local: R, the ranks of a node.
        network: Alpha and beta.
        machine: Gamma.
    """
    rounds = math.ceil(math.log2(nodes))
    among = Cost(
        2 * rounds * network.latency_seconds,
        2 * rounds * size * network.beta,
        rounds * size / local * machine.reduce_seconds_per_byte,
    )
    return _within(size, local, network, machine, among)


def hierarchical(size: float, nodes: int, local: int, network: Network, machine: Machine) -> Cost:
    """Return the cost of R rings side by side among nodes, after a reduce-scatter within each.

    The R rings carry S/R each and share the link, so it carries 2(N-1)/N S, in 2(N-1) instead of
    2(n-1) steps (Jia et al., "Highly scalable deep learning training system with mixed-precision",
    arXiv:1807.11205; Horovod's hierarchical all-reduce).

    Args:
        size: S, bytes.
        nodes: N.
        local: R, the ranks of a node.
        network: Alpha and beta.
        machine: Gamma.
    """
    share = (nodes - 1) / nodes
    among = Cost(
        2 * (nodes - 1) * network.latency_seconds,
        2 * share * size * network.beta,
        share * size / local * machine.reduce_seconds_per_byte,
    )
    return _within(size, local, network, machine, among)


def _within(size: float, local: int, network: Network, machine: Machine, among: Cost) -> Cost:
    """A reduce-scatter and an all-gather around a ring within a node, with ``among`` between."""
    share = (local - 1) / local
    return Cost(
        among.latency + 2 * (local - 1) * network.local_latency_seconds,
        among.transfer + 2 * share * size * network.local_beta,
        among.work + share * size * machine.reduce_seconds_per_byte,
    )


_Load = tuple[tuple[float, float], tuple[float, float]]

ALGORITHMS: dict[str, Callable[[float, int, int, Network, Machine], Cost]] = {
    "ring": ring,
    "hierarchical": hierarchical,
    "halving": halving,
    "binomial": binomial,
}


class Placement(NamedTuple):
    """How many workers and servers each node has."""

    workers: tuple[int, ...]
    servers: tuple[int, ...]


def place(nodes: int, local: int, servers: int, colocated: bool) -> Placement:
    """Spread servers evenly over the nodes: besides the workers, or instead of some of them.

    Args:
        nodes: How many.
        local: Ranks of a node.
        servers: On all nodes.
        colocated: Whether they are threads of workers, not ranks in place of them.
    """
    served = tuple(servers // nodes + (index < servers % nodes) for index in range(nodes))
    return Placement(tuple(local - (0 if colocated else each) for each in served), served)


def one_of(placement: Placement) -> Placement:
    """Return the same servers with one worker, on a node with as few servers as there is."""
    nodes = [node for node, count in enumerate(placement.workers) if count]
    chosen = min(nodes, key=lambda node: placement.servers[node])
    workers = tuple(int(node == chosen) for node in range(len(placement.workers)))
    return placement._replace(workers=workers)


def parameter_server(
    size: float, placement: Placement, network: Network, ratio: float = 1.0
) -> Cost:
    """Return the cost of pushing all gradients and pulling all parameters, bound by the worst link.

    With k servers of S/k bytes, n workers, all on nodes of their own and full duplex, a worker's
    link carries S each way and a server's n S/k: max(1, n/k) S beta (Li et al., "Scaling
    distributed machine learning with the parameter server", OSDI 2014; Jiang et al., "A unified
    architecture for accelerating distributed DNN training", OSDI 2020, who also count co-located
    servers). Here the bytes of each node are counted, so that any placement is covered; with one
    worker and one server on each of n nodes, it is the ring's 2(n-1)/n S beta.

    Args:
        size: S, bytes.
        placement: Of workers and servers.
        network: Alpha and beta.
        ratio: Of a compressed gradient's bytes to the plain one's; weights come uncompressed.
    """
    servers = sum(placement.servers)
    link = max(max(map(sum, zip(*node, strict=True))) for node in _loads(size, placement, ratio))
    local = max(
        (ratio + 1) * here * serving / servers * size
        for here, serving in zip(placement.workers, placement.servers, strict=True)
    )
    transfer = max(link * network.beta, local * network.local_beta)
    alpha = network.latency_seconds if len(placement.workers) > 1 else network.local_latency_seconds
    return Cost(2 * alpha, transfer)


def parameter_server_tail(
    size: float, placement: Placement, network: Network, ratio: float = 1.0
) -> float:
    """Return the time lost if answers begin only when all pushes have come.

    Args:
        size: S, bytes.
        placement: Of workers and servers.
        network: Alpha and beta.
        ratio: Of a compressed gradient's bytes to the plain one's.

    Returns:
        Seconds more than :func:`parameter_server` says.
    """
    loads = list(_loads(size, placement, ratio))
    pushes, answers = (max(max(node[phase]) for node in loads) for phase in (0, 1))
    both = max(max(map(sum, zip(*node, strict=True))) for node in loads)
    return (pushes + answers - both) * network.beta


def _loads(size: float, placement: Placement, ratio: float) -> Iterator[_Load]:
    """Yield for each node's link the bytes out and in, of all pushes, and of answers to them."""
    workers, servers = sum(placement.workers), sum(placement.servers)
    for here, serving in zip(placement.workers, placement.servers, strict=True):
        away = here * (servers - serving) / servers * size
        served = serving * (workers - here) / servers * size
        yield (ratio * away, ratio * served), (served, away)
