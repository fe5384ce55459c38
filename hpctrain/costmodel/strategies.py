"""The strategies that the model knows, and how they are typed: ``ps:4+ssp:3+int8``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from hpctrain.costmodel.collectives import ALGORITHMS
from hpctrain.errors import Error
from hpctrain.ps.consistency import parse


@dataclass(frozen=True)
class Compression:
    """What compressing gradients saves and costs.

    Attributes:
        name: As ``ps.compression`` has it.
        ratio: Compressed bytes by plain ones.
        encode_seconds_per_byte: For a byte of the plain gradient.
        decode_seconds_per_byte: For a byte of the plain gradient.
    """

    name: str = "none"
    ratio: float = 1.0
    encode_seconds_per_byte: float = 0.0
    decode_seconds_per_byte: float = 0.0


@dataclass(frozen=True)
class StrategyCost:
    """A strategy, as the cost model knows it.

    Attributes:
        kind: ``single``; ``horovod``: an all-reduce in each step; ``ps``; ``averaging``: an
            all-reduce of parameters every so many steps (Stich, "Local SGD converges fast and
            communicates little", ICLR 2019).
        algorithm: Of the all-reduce.
        servers: Of ps.
        colocated: Whether they are threads of workers, or ranks instead of workers.
        ahead: Clocks that a worker may be ahead of the slowest (Ho et al., "More effective
            distributed ML via a stale synchronous parallel parameter server", NIPS 2013). 0: sync;
            infinite: async.
        backups: Workers that a step does not wait for (Chen et al., "Revisiting distributed
            synchronous SGD", arXiv:1604.00981).
        consistency: Of ps, as it is typed.
        every: Steps from one averaging to the next.
        compression: Of what is pushed, or all-reduced.
        label: As it is typed.
    """

    kind: Literal["single", "horovod", "ps", "averaging"] = "single"
    algorithm: str = "ring"
    servers: int = 0
    colocated: bool = False
    ahead: float = 0
    backups: int = 0
    consistency: str = "sync"
    every: int = 1
    compression: Compression = field(default_factory=Compression)
    label: str = "single"

    @property
    def exact(self) -> bool:
        """Whether it takes the very steps that one rank would take with the whole batch."""
        relaxed = self.ahead > 0 or self.backups > 0 or self.every > 1
        return not relaxed and self.compression.name == "none"

    @property
    def family(self) -> str:
        """The strategies that exchange in the same way, whose software is to be fitted as one."""
        parts = [self.kind, self.algorithm] if self.algorithm != "ring" else [self.kind]
        return "+".join([*parts, *["colocated"] * self.colocated, *["async"] * (self.ahead > 0)])

    def workers(self, ranks: int) -> int:
        """Return how many of the ranks compute."""
        return ranks - (self.servers if self.kind == "ps" and not self.colocated else 0)

    def fits(self, ranks: int) -> bool:
        """Whether so many ranks are enough: some to compute, and for each co-located server one."""
        if self.kind == "single":
            return ranks == 1
        enough = self.workers(ranks) > self.backups and ranks > 1
        return enough and (not self.colocated or self.servers <= ranks)


HINT = (
    "single, horovod[+ring|hierarchical|halving|binomial], ps:K or ps:K+colocated with "
    "a consistency "
    "(+async, +ssp:S, +backup:B, ...), averaging:H; each with +fp16, +bf16, +int8 or +topk:F."
)


def strategy_of(text: str, measured: Callable[[str], Compression]) -> StrategyCost:
    """Parse a strategy as it is typed; a plain number after ``ps:`` is of servers, ``ps`` has one.

    Args:
        text: Parts joined by ``+``.
        measured: What a codec does with gradients, by its name.

    Raises:
        Error: There is no such strategy.
    """
    head, *parts = text.split("+")
    kind, _, argument = head.partition(":")
    values: dict[str, object] = {"kind": kind, "label": text}
    if kind == "ps":
        values["servers"] = _count(argument or "1", text)
    elif kind == "averaging":
        values["every"] = _count(argument, text)
    elif kind not in ("single", "horovod") or argument:
        raise Error(f"the model knows no strategy '{text}'.", hint=HINT)
    for part in parts:
        name, _, argument = part.partition(":")
        if kind == "ps" and name == "colocated":
            values["colocated"] = True
        elif kind in ("horovod", "averaging") and part in ALGORITHMS:
            values["algorithm"] = part
        elif name in ("fp16", "bf16", "int8", "topk") and kind != "single":
            if name == "topk" and kind != "ps":
                raise Error(f"'{text}': what top-k leaves cannot be all-reduced.", hint=HINT)
            values["compression"] = measured(part)
        elif kind == "ps":
            values |= _consistency(part, text)
        else:
            raise Error(f"the model knows no strategy '{text}'.", hint=HINT)
    return StrategyCost(**values)  # type: ignore[arg-type]


def _consistency(part: str, whole: str) -> dict[str, object]:
    """What the model is told of a consistency mode."""
    try:
        mode = parse(part)
    except Error as error:
        raise Error(f"the model knows no strategy '{whole}'.", hint=HINT) from error
    return {"ahead": mode.staleness, "backups": mode.backups, "consistency": part}


def _count(text: str, whole: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise Error(f"'{whole}': '{text}' is not a whole number above 0.", hint=HINT)
    return int(text)
