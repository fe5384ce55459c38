"""Inputs of the cost model: the network, the machine, and the job, in bytes and seconds."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from hpctrain.errors import Error, nearest

Buckets = tuple[tuple[float, float], ...]
"""Of each, in order: how far backward is when it is ready (0 to 1), and its share of bytes."""


@dataclass(frozen=True)
class Network:
    """The network: alpha and beta, between nodes and within one.

    A node has one link, which carries ``bytes_per_second`` in each direction at a time. Within a
    node every rank can pass ``local_bytes_per_second`` on to another.

    Attributes:
        bytes_per_second: Of a node's link, as it is sold: 25 Gbit/s are 3.125e9.
        link_share: Part of it that is left for payload.
        latency_seconds: Alpha: of a message between nodes, however small.
        local_bytes_per_second: Between two ranks of a node.
        local_latency_seconds: Of a message between them.
    """

    bytes_per_second: float
    link_share: float = 0.9
    latency_seconds: float = 20e-6
    local_bytes_per_second: float = 5e9
    local_latency_seconds: float = 2e-6

    @property
    def beta(self) -> float:
        """Seconds for a byte between nodes."""
        return 1 / (self.bytes_per_second * self.link_share)

    @property
    def local_beta(self) -> float:
        """Seconds for a byte within a node."""
        return 1 / self.local_bytes_per_second


@dataclass(frozen=True)
class Machine:
    """The costs of computing on a rank, for each byte.

    Attributes:
        reduce_seconds_per_byte: Gamma: adding a received byte to one of one's own.
        update_seconds_per_byte: Optimizer's update, for a byte of parameters.
        served_update_seconds_per_byte: The same on a server, whose parameters lie end to end, where
            that is known: without what each of many small tensors costs.
        contention: Seconds of computing that are lost for each second of exchange beside it. 0: the
            exchange is done by hardware of its own, all of it can be hidden; 1: nothing can.
        lag_bytes: By how much workers that push the same parameters to a server are apart: so much
            of what each pushes last is only answered when nothing is left to push.
    """

    reduce_seconds_per_byte: float = 0.0
    update_seconds_per_byte: float = 0.0
    contention: float = 0.0
    served_update_seconds_per_byte: float | None = None
    lag_bytes: float = 2**20

    @property
    def served_update(self) -> float:
        """Seconds of an update for a byte of a server's parameters."""
        known = self.served_update_seconds_per_byte
        return self.update_seconds_per_byte if known is None else known


@dataclass(frozen=True)
class Job:
    """The training to predict, and its ranks.

    Attributes:
        parameter_bytes: Of the gradients of all parameters.
        forward_seconds: For a rank's batch, on a rank.
        backward_seconds: For a rank's batch, on a rank.
        ranks: All of them, with those that serve.
        ranks_per_node: How many share a node's link.
        samples: Of a rank's batch.
        buckets: When the gradients are ready.
        jitter: Standard deviation of a rank's computing time from step to step, by its mean.
    """

    parameter_bytes: float
    forward_seconds: float
    backward_seconds: float
    ranks: int = 1
    ranks_per_node: int = 1
    samples: int = 1
    buckets: Buckets = ((1.0, 1.0),)
    jitter: float = 0.0

    @property
    def nodes(self) -> int:
        """The number of nodes; the last may have fewer ranks."""
        return -(-self.ranks // self.ranks_per_node)

    @property
    def compute_seconds(self) -> float:
        """Seconds of forward and backward."""
        return self.forward_seconds + self.backward_seconds


def even_buckets(count: int) -> Buckets:
    """Return buckets of one size, ready at even intervals; the last at the end of backward."""
    return tuple(((index + 1) / count, 1 / count) for index in range(count))


_BITS = {"bit": 1 / 8, "B": 1.0}
_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_RATE = re.compile(r"([0-9.]+)\s*([kMGT]?)(bit|B)(?:/s|ps)?")
_TIME = re.compile(r"([0-9.]+)\s*(s|ms|us|ns)")
EXAMPLE = "for example --network 25Gbit,latency=20us."
KEYS = ("latency", "share", "local", "local-latency")


def network_of(text: str, default: Network) -> Network:
    """Parse a network as it is typed: ``25Gbit,latency=20us,share=0.9,local=10GB``.

    Args:
        text: The rate of a node's link first; ``bit`` and ``B`` (bytes) by their prefixes.
        default: For what is not given.

    Raises:
        Error: It cannot be read.
    """
    rate, *settings = (part.strip() for part in text.split(","))
    values = {"bytes_per_second": _rate(rate)}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "share":
            values["link_share"] = _share(value)
        elif key == "local":
            values["local_bytes_per_second"] = _rate(value)
        elif key in KEYS:
            values[f"{key.replace('-', '_')}_seconds"] = _time(value)
        else:
            raise Error(f"--network has no '{key}'.", hint=nearest(key, KEYS))
    return dataclasses.replace(default, **values)


def _rate(text: str) -> float:
    match = _RATE.fullmatch(text)
    if not match or not (rate := _number(match[1])):
        raise Error(f"'{text}' is not a rate.", hint=EXAMPLE)
    return rate * _PREFIXES[match[2]] * _BITS[match[3]]


def _time(text: str) -> float:
    match = _TIME.fullmatch(text)
    value = _number(match[1]) if match else None
    if not match or value is None:
        raise Error(f"'{text}' is not a time.", hint=EXAMPLE)
    return value * _SECONDS[match[2]]


def _share(text: str) -> float:
    value = _number(text)
    if value is None or not 0 < value <= 1:
        raise Error(f"share={text} is not above 0 and at most 1.", hint=EXAMPLE)
    return value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
