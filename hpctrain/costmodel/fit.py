"""Fit the cost model's parameters to measurements, with confidence intervals.

A measurement is a line of a JSON list::

    {"strategy": "ps:2", "ranks": 6, "nodes": 6, "bytes": 1e8, "seconds": 1.9,
     "link_bytes_per_second": 1.25e8}

An exchange alone, or a whole step where ``backward_seconds`` (and ``forward_seconds``) say what
computing takes on a rank without any exchange. See :class:`Record` for all keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from scipy import optimize, stats

from hpctrain.costmodel.inputs import Buckets, Job, Machine, Network, even_buckets
from hpctrain.costmodel.step import predict
from hpctrain.costmodel.strategies import Compression, StrategyCost, strategy_of
from hpctrain.errors import Error
from hpctrain.files import read_json

Vector = NDArray[np.float64]
SOFT = 0.1
"""Relative errors far above this count by their size, not its square."""
ALIKE = 1e5
"""A condition number from which on two parameters do the same."""
WIDE = 1e-3
"""Part of a parameter over which the search looks for a slope: the model has bends."""


class Record(BaseModel):
    """A measurement. Times are of a step, in seconds, best a median."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    strategy: str = Field(description="As for `hpctrain advise --strategy`.")
    ranks: int = Field(ge=1, description="All, with those that serve.")
    nodes: int = Field(ge=1, description="Or hosts; with equally many ranks each.")
    bytes: float = Field(gt=0, description="Of the gradients.")
    seconds: float = Field(gt=0, description="Measured.")
    link_bytes_per_second: float = Field(gt=0, description="Of a node's link, as it is sold.")
    forward_seconds: float = Field(0.0, ge=0, description="Of a rank without exchange.")
    backward_seconds: float = Field(0.0, ge=0, description="The same; 0: an exchange alone.")
    update_seconds: float = Field(0.0, ge=0, description="Of the optimizer, for all parameters.")
    buckets: int | Buckets = Field(
        1, description="How many of one size, or (ready, share) of each."
    )
    jitter: float = Field(0.0, ge=0, description="Of a rank's computing, by its mean.")
    compression_ratio: float = Field(1.0, gt=0, description="Compressed bytes by plain ones.")
    encode_seconds_per_byte: float = Field(0.0, ge=0, description="Of the codec, a plain byte.")
    decode_seconds_per_byte: float = Field(0.0, ge=0, description="The same.")

    @cached_property
    def job(self) -> Job:
        """The job that was measured."""
        buckets = even_buckets(self.buckets) if isinstance(self.buckets, int) else self.buckets
        return Job(
            self.bytes, self.forward_seconds, self.backward_seconds, self.ranks,
            -(-self.ranks // self.nodes), buckets=buckets, jitter=self.jitter,
        )  # fmt: skip

    @cached_property
    def known_strategy(self) -> StrategyCost:
        """The strategy that was measured; a codec's time that is not given is to be fitted."""
        numbers = (self.compression_ratio, self.encode_seconds_per_byte)
        return strategy_of(
            self.strategy,
            lambda name: Compression(name, *numbers, self.decode_seconds_per_byte),
        )

    @property
    def place(self) -> tuple[int, int, float]:
        """Where it was measured."""
        return self.ranks, self.nodes, self.link_bytes_per_second


class Parameter(NamedTuple):
    """The first guess and the bounds with which a parameter is searched for.

    Attributes:
        start: First guess.
        low: The least value that is allowed.
        high: The largest value that is allowed.
        inverse: Whether its inverse, a time, is what is searched for.
    """

    start: float
    low: float
    high: float
    inverse: bool = False


PARAMETERS = {
    "latency_seconds": Parameter(1e-4, 0.0, 1.0),
    "link_share": Parameter(0.9, 0.01, 2.0, inverse=True),
    "reduce_seconds_per_byte": Parameter(5e-10, 0.0, 1e-6),
    "contention": Parameter(0.3, 0.0, 1.0),
    "lag_bytes": Parameter(2.0**20, 0.0, 1e12),
    "local_bytes_per_second": Parameter(2e9, 1e6, 1e12, inverse=True),
    "local_latency_seconds": Parameter(1e-5, 0.0, 1.0),
}


class Interval(NamedTuple):
    """An estimate, and where the true value is at the level of confidence asked for."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """The result of a fit: parameters, and how well measurements determine them.

    Attributes:
        known: Parameters that were given, and those that no measurement depends on.
        names: Those that were fitted, in the order of the next two.
        solution: In the units of the search.
        covariance: Of these.
        scatter: Standard deviation of relative errors, not minding a few large ones.
        freedom: Measurements less parameters.
        confidence: Of all intervals.
    """

    known: dict[str, float]
    names: tuple[str, ...]
    solution: Vector
    covariance: Vector
    scatter: float
    freedom: int
    confidence: float

    @property
    def values(self) -> dict[str, float]:
        """All parameters, given or fitted, by name."""
        return {**self.known, **_values(self.names, self.solution)}

    def intervals(self) -> dict[str, Interval]:
        """Return the confidence intervals of the parameters that were fitted."""
        found = {}
        for index, name in enumerate(self.names):
            center, kind = float(self.solution[index]), PARAMETERS[name]
            reach = self._quantile() * math.sqrt(self.covariance[index, index])
            low, high = _ends(kind)
            ends = (max(low, center - reach), min(high, center + reach))
            if kind.inverse:
                found[name] = Interval(1 / center, 1 / ends[1], 1 / ends[0])
            else:
                found[name] = Interval(center, *ends)
        return found

    def predict(self, record: Record) -> Interval:
        """Predict the time of a step like this one, whose own ``seconds`` are not looked at."""

        def logarithm(point: Vector) -> Vector:
            values = {**self.known, **_values(self.names, point)}
            return np.array([math.log(_seconds(record, values))])

        (center,) = logarithm(self.solution)
        slope = _slopes(logarithm, self.solution, self.names)[0]
        deviation = math.sqrt(self.scatter**2 + float(slope @ self.covariance @ slope))
        reach = self._quantile() * deviation
        return Interval(*(math.exp(center + sign * reach) for sign in (0, -1, 1)))

    def _quantile(self) -> float:
        return float(stats.t.ppf((1 + self.confidence) / 2, self.freedom))


def read_records(path: Path) -> list[Record]:
    """Read the measurements of a file: a list, or an object that has one under ``records``.

    Raises:
        Error: It cannot be read, or a record is wrong.
    """
    try:
        content: Any = read_json(path)
    except OSError as error:
        raise Error(f"cannot read {path}: {error.strerror}.", hint="check the path.") from error
    except ValueError as error:
        raise Error(f"{path} is not JSON: {error}.", hint="write a list of records.") from error
    rows = content.get("records") if isinstance(content, dict) else content
    try:
        return TypeAdapter(list[Record]).validate_python(rows)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Error(
            f"{path}: record {where}: {first['msg']}.", hint="docs/model.md has all keys."
        ) from error


def fit(
    records: Sequence[Record],
    known: dict[str, float] | None = None,
    confidence: float = 0.95,
) -> Fit:
    """Fit the parameters that measurements depend on, by robust least squares on relative errors.

    Intervals come from the Jacobian at the solution and Student's t.

    Args:
        records: Measurements.
        known: Parameters that are not searched for.
        confidence: Of the intervals.

    Raises:
        Error: There are too few records, or they do not tell some parameters apart.
    """
    known = dict(known or {})
    if unknown := ", ".join(set(known) - set(PARAMETERS)):
        raise Error(f"there is no parameter {unknown}.", hint=f"there are {', '.join(PARAMETERS)}.")
    measured = np.log([record.seconds for record in records])

    def residuals_of(names: tuple[str, ...], given: dict[str, float]) -> Callable[[Vector], Vector]:
        def residuals(point: Vector) -> Vector:
            values = {**given, **_values(names, point)}
            return np.log([_seconds(record, values) for record in records]) - measured

        return residuals

    names = tuple(name for name in PARAMETERS if name not in known)
    begin = _start(names)
    slopes = _slopes(residuals_of(names, known), begin, names)
    matter = [bool(np.abs(column).max() > 1e-9) for column in slopes.T]
    # What no measurement depends on stays as it is.
    given = {n: PARAMETERS[n].start for n, does in zip(names, matter, strict=True) if not does}
    names = tuple(n for n, does in zip(names, matter, strict=True) if does)
    if len(records) <= len(names):
        raise Error(
            f"{len(records)} records for {len(names)} parameters ({', '.join(names)}).",
            hint="measure at more sizes, ranks and rates; or give some: --known NAME=VALUE.",
        )
    residuals = residuals_of(names, {**known, **given})
    ends = [_ends(PARAMETERS[name]) for name in names]
    found = optimize.least_squares(
        residuals,
        _start(names),
        jac=lambda point: _slopes(residuals, point, names, over=WIDE),
        bounds=tuple(zip(*ends, strict=True)),
        x_scale=_start(names),
        loss="soft_l1",
        f_scale=SOFT,
    )
    slopes = _slopes(residuals, found.x, names)
    _check_told_apart(slopes, names)
    freedom = len(records) - len(names)
    left = np.abs(residuals(found.x))
    scatter = 1.4826 * float(np.median(left)) * math.sqrt(len(records) / freedom)
    covariance: Vector = scatter**2 * np.asarray(np.linalg.inv(slopes.T @ slopes), np.float64)
    return Fit({**known, **given}, names, found.x, covariance, scatter, freedom, confidence)


def held_out(
    records: Sequence[Record],
    known: dict[str, float] | None = None,
    by: Callable[[Record], Hashable] = lambda record: record.place,
) -> list[float]:
    """Cross-validate: return the relative errors for each place, fitted to all other places.

    Args:
        records: Measurements; the errors are in their order.
        known: Parameters that are not searched for.
        by: What is left out together; usually a number of ranks, nodes, and a link's rate.

    Raises:
        Error: The others do not determine the parameters.
    """
    places = [by(record) for record in records]
    fits = {
        place: fit([r for r, where in zip(records, places, strict=True) if where != place], known)
        for place in dict.fromkeys(places)
    }
    return [
        _seconds(record, fits[place].values) / record.seconds - 1
        for record, place in zip(records, places, strict=True)
    ]


def _seconds(record: Record, values: dict[str, float]) -> float:
    network = Network(
        record.link_bytes_per_second,
        values["link_share"],
        values["latency_seconds"],
        values["local_bytes_per_second"],
        values["local_latency_seconds"],
    )
    machine = Machine(
        values["reduce_seconds_per_byte"],
        record.update_seconds / record.bytes,
        values["contention"],
        lag_bytes=values["lag_bytes"],
    )
    return predict(record.job, record.known_strategy, network, machine).step_seconds


def _ends(kind: Parameter) -> tuple[float, float]:
    return (1 / kind.high, 1 / kind.low) if kind.inverse else (kind.low, kind.high)


def _start(names: Iterable[str]) -> Vector:
    kinds = [PARAMETERS[name] for name in names]
    return np.array([1 / kind.start if kind.inverse else kind.start for kind in kinds])


def _values(names: Sequence[str], point: Vector) -> dict[str, float]:
    inverse = [PARAMETERS[name].inverse for name in names]
    return {n: float(1 / x if i else x) for n, x, i in zip(names, point, inverse, strict=True)}


def _slopes(
    function: Callable[[Vector], Vector],
    point: Vector,
    names: Sequence[str],
    over: float = 1e-7,
) -> Vector:
    """Differentiate by finite differences over a part of each parameter, within the bounds."""
    columns = []
    for index, name in enumerate(names):
        step = over * max(abs(point[index]), _start([name])[0])
        if point[index] + step > _ends(PARAMETERS[name])[1]:
            step = -step
        moved = point.copy()
        moved[index] += step
        columns.append((function(moved) - function(point)) / step)
    return np.stack(columns, axis=1)


def _check_told_apart(slopes: Vector, names: tuple[str, ...]) -> None:
    lengths = np.linalg.norm(slopes, axis=0)
    if lengths.min() > 0:
        _, sizes, directions = np.linalg.svd(slopes / lengths)
        if sizes[0] < ALIKE * sizes[-1]:
            return
        alike = [n for n, part in zip(names, directions[-1], strict=True) if abs(part) > 0.1]
    else:
        alike = [n for n, length in zip(names, lengths, strict=True) if length == 0]
    raise Error(
        f"these records do not tell {', '.join(alike)} (apart).",
        hint=f"give one of them: --known {alike[-1]}=VALUE; or measure other strategies, sizes "
        "and numbers of ranks.",
    )
