"""Advise which strategy a cluster wants, by predictions for a task that was measured here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hpctrain.costmodel.inputs import Job, Machine, Network
from hpctrain.costmodel.step import Breakdown, predict
from hpctrain.costmodel.strategies import Compression, StrategyCost, strategy_of
from hpctrain.errors import Error
from hpctrain.files import read_json
from hpctrain.ps.consistency import relaxed

if TYPE_CHECKING:
    from hpctrain.costmodel.measure import Measured

SPANS = {
    "link_share": (0.8, 0.97),
    "latency_seconds": (0.5, 2.0),
    "contention": (0.0, 0.6),
}
"""What is not known lies in: shares as they are; latency as a multiple of what is assumed."""
CONTENTION = 0.3
WORTH_TELLING = 1.05
"""So many times as fast must a relaxed strategy be to be named beside the best exact one."""


class Span(NamedTuple):
    """A value, and the ends between which it is taken to be, the favourable one first."""

    value: float
    good: float
    bad: float


Assumed = dict[str, Span]
"""By name: link_share, latency_seconds, contention, reduce_seconds_per_byte."""


class Prediction(NamedTuple):
    """A step's prediction for a strategy on a number of nodes.

    Attributes:
        nodes: How many.
        ranks: On all of them.
        strategy: What is predicted.
        step: With what is assumed.
        good: With the favourable ends of everything.
        bad: With the unfavourable ones.
    """

    nodes: int
    ranks: int
    strategy: StrategyCost
    step: Breakdown
    good: Breakdown
    bad: Breakdown


def assumptions(measured: Measured, network: Network, given: str) -> Assumed:
    """Return what is not measured, and how far it may be off; what was typed is taken as it is.

    Args:
        measured: The task here.
        network: As it was read.
        given: As it was typed.
    """
    latency, share = network.latency_seconds, network.link_share
    low, high = SPANS["latency_seconds"]
    reduce = measured.reduce_seconds_per_byte
    spans = {
        "link_share": Span(share, SPANS["link_share"][1], SPANS["link_share"][0]),
        "latency_seconds": Span(latency, low * latency, high * latency),
        "contention": Span(CONTENTION, *SPANS["contention"]),
        "reduce_seconds_per_byte": Span(reduce, reduce, reduce),
    }
    if ",latency=" in given.replace(" ", ""):
        spans["latency_seconds"] = Span(latency, latency, latency)
    if ",share=" in given.replace(" ", ""):
        spans["link_share"] = Span(share, share, share)
    return spans


def read_fit(path: Path) -> dict[str, Assumed]:
    """Read what ``python -m benchmarks.fit`` found, by strategy.

    Raises:
        Error: The file is not one of its.
    """
    try:
        records = read_json(path)["records"]
        return {
            record["strategy"]: {
                **{name: Span(value, value, value) for name, value in record["known"].items()},
                **{
                    name: _span(name, each["value"], each["low"], each["high"])
                    for name, each in record["parameters"].items()
                },
            }
            for record in records
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Error(
            f"{path} is not what a fit leaves: {type(error).__name__}: {error}.",
            hint="python -m benchmarks.fit RECORDS.json --out DIR writes DIR/fit.json.",
        ) from error


def _span(name: str, value: float, low: float, high: float) -> Span:
    more_is_good = name in ("link_share", "local_bytes_per_second")
    return Span(value, *((high, low) if more_is_good else (low, high)))


def sweep(nodes: int) -> list[int]:
    """Return the numbers of nodes to look at: 1, 2, 4 and so on, and the last one."""
    powers = [2**power for power in range(nodes.bit_length()) if 2**power < nodes]
    return [*powers, nodes]


class Adviser:
    """Predicts steps of a task on a cluster.

    Args:
        measured: The task here.
        network: There.
        assumed: What is not known.
        fits: By strategy, in place of that; under ``all``, for any.
        ranks_per_node: There.
        speedup: Of a rank there, by one here.
    """

    def __init__(
        self,
        measured: Measured,
        network: Network,
        assumed: Assumed,
        fits: dict[str, Assumed],
        *,
        ranks_per_node: int = 1,
        speedup: float = 1.0,
    ) -> None:
        self.measured = measured
        self.network = network
        self.assumed = assumed
        self.fits = fits
        self.ranks_per_node = ranks_per_node
        self.speedup = speedup

    def predict(self, nodes: int, strategy: StrategyCost) -> Prediction:
        """Predict the step of a strategy on a number of nodes.

        Args:
            nodes: How many.
            strategy: What to predict.

        Raises:
            Error: It needs more ranks.
        """
        value, good, bad = (self._step(nodes, strategy, end) for end in Span._fields)
        return Prediction(nodes, nodes * self.ranks_per_node, strategy, value, good, bad)

    def _step(self, nodes: int, strategy: StrategyCost, end: str) -> Breakdown:
        names = (strategy.family, strategy.kind, "all")
        known = next((self.fits[name] for name in names if name in self.fits), {})
        values = {name: getattr(span, end) for name, span in {**self.assumed, **known}.items()}
        machine = Machine(
            values.pop("reduce_seconds_per_byte") / self.speedup,
            self.measured.update_seconds / self.measured.parameter_bytes / self.speedup,
            values.pop("contention"),
            self.measured.flat_update_seconds / self.measured.parameter_bytes / self.speedup,
            values.pop("lag_bytes", Machine.lag_bytes),
        )
        network = dataclasses.replace(self.network, **values)
        measured = self.measured
        middle = measured.forward_seconds + measured.backward_seconds
        whole = {"value": middle, "good": measured.low_seconds, "bad": measured.high_seconds}[end]
        scale = whole / middle / self.speedup
        job = Job(
            measured.parameter_bytes,
            measured.forward_seconds * scale,
            measured.backward_seconds * scale,
            nodes * self.ranks_per_node,
            self.ranks_per_node,
            measured.samples,
            measured.buckets,
            measured.jitter,
        )
        return predict(job, strategy, network, machine)

    def named(
        self, nodes: int, specs: Sequence[str], codec: Callable[[str], Compression]
    ) -> list[Prediction]:
        """Predict strategies as they are typed, those that so many nodes have ranks for.

        Args:
            nodes: How many.
            specs: Strategies, such as ``ps:4+ssp:3+int8``.
            codec: Measures what a codec does to gradients, by its name.
        """
        strategies = [strategy_of(spec, codec) for spec in specs]
        ranks = nodes * self.ranks_per_node
        return [self.predict(nodes, each) for each in strategies if each.fits(ranks)]

    def usual(self, nodes: int, codec: Callable[[str], Compression]) -> list[Prediction]:
        """Predict what hpctrain has for so many nodes, with the best number of servers.

        Args:
            nodes: How many.
            codec: Measures what a codec does to gradients, by its name.
        """
        ranks = nodes * self.ranks_per_node
        if ranks == 1:
            return self.named(nodes, ["single"], codec)
        powers = sweep(max(1, ranks // 2))
        dedicated = self._fastest(self.named(nodes, [f"ps:{k}" for k in powers], codec))
        colocated = self.named(nodes, [f"ps:{nodes}+colocated"], codec)[0]
        server = self._fastest([dedicated, colocated]).strategy.label
        looser = [f"{server}+{how}" for how in relaxed()]
        return [
            *self.named(nodes, ["horovod"], codec), colocated, dedicated,
            *self.named(nodes, looser, codec),
        ]  # fmt: skip

    @staticmethod
    def _fastest(predictions: Sequence[Prediction]) -> Prediction:
        return max(predictions, key=lambda each: each.step.samples_per_second)

    def verdict(self, predictions: Sequence[Prediction]) -> str:
        """Say which prediction of those for as many nodes is best, and why."""
        exact = [each for each in predictions if each.strategy.exact] or list(predictions)
        best = self._fastest(exact)
        others = [each for each in exact if each is not best]
        lines = [
            f"best on {_count(best.nodes, 'node')}: {best.strategy.label}, "
            f"{percent(best.step.efficiency)} efficient; {_reason(best)}"
        ]
        close = [each for each in others if each.good.step_seconds < best.bad.step_seconds]
        near = ", ".join(
            each.strategy.label
            for each in close
            if each.good.samples_per_second > best.bad.samples_per_second
        )
        if near:
            lines.append(f"within what is not known, it could as well be {near}.")
        fastest = self._fastest(predictions)
        ratio = fastest.step.samples_per_second / best.step.samples_per_second
        if ratio > WORTH_TELLING:
            lines.append(
                f"{fastest.strategy.label} would see {ratio:.2f} times as many samples a second, "
                "but does not take the same steps: what they are worth, only training tells."
            )
        return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def percent(share: float) -> str:
    """Return a share in per cent, of two digits more or less."""
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _reason(best: Prediction) -> str:
    step = best.step
    if step.bound == "computing":
        return "the exchange hides behind computing."
    if step.bound == "slowest rank":
        return f"{step.wait / step.step_seconds:.0%} of a step is waiting for the slowest rank."
    share = step.exposed / step.step_seconds
    return f"{share:.0%} of a step is exchange that does not hide, bound by {step.bound}."


def row_of(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as a row for JSON, independent variables first."""
    ends: dict[str, float] = {}
    for name in ("step_seconds", "samples_per_second", "efficiency"):
        # Not in order: where computing takes longer, less of the exchange shows.
        each = [getattr(step, name) for step in (prediction.step, prediction.good, prediction.bad)]
        ends |= {f"{name}_low": min(each), f"{name}_high": max(each)}
    return {
        "nodes": prediction.nodes,
        "ranks": prediction.ranks,
        "strategy": prediction.strategy.label,
        "exact": prediction.strategy.exact,
        **prediction.step._asdict(),
        **ends,
    }
