"""Plans of faults for fault injection, as `hpctrain chaos` takes them.

A fault is ``KIND:TARGET[,xFACTOR][@WHEN]``, several are separated by blanks::

    kill:rank=3@step=40       SIGKILL, when some rank has ended step 40 (0: when one begins)
    stop:rank=1@step=80+0.01  SIGSTOP, 10 ms after that
    slow:rank=2,x3@time=5     from 5 s after the first step on, three times slower
    node:n2@step=100          a node is lost, by the command that --kill-node names
"""

from __future__ import annotations

import random
import re
from typing import Literal, NamedTuple, cast

from hpctrain.errors import Error

Kind = Literal["kill", "stop", "slow", "node"]

_FAULT = re.compile(
    r"(?:(?P<kind>kill|stop|slow):rank=(?P<rank>\d+)|node:(?P<node>[\w.-]+))"
    r"(?:,x(?P<factor>[\d.]+))?"
    r"(?:@(?:step=(?P<step>\d+)|time=(?P<time>[\d.]+))(?:\+(?P<delay>[\d.]+))?)?"
)


class Fault(NamedTuple):
    """A fault to inject: what goes wrong, where, and when.

    Attributes:
        kind: ``kill``, ``stop``, ``slow`` or ``node``.
        target: A process's number (its first rank), or a node's name.
        step: It comes when some rank has ended this step,
        seconds: and so many seconds have gone by since.
        factor: How many times slower, for ``slow``.
    """

    kind: Kind
    target: str
    step: int = 0
    seconds: float = 0.0
    factor: float = 1.0

    def __str__(self) -> str:
        target = self.target if self.kind == "node" else f"rank={self.target}"
        factor = f",x{self.factor:g}" if self.kind == "slow" else ""
        return f"{self.kind}:{target}{factor}@step={self.step}+{self.seconds:.3f}"


def parse(text: str) -> list[Fault]:
    """Parse a plan of faults.

    Raises:
        Error: It is not one.
    """
    faults = []
    for word in text.split():
        match = _FAULT.fullmatch(word)
        if match is None or (match["kind"] == "slow") != (match["factor"] is not None):
            raise Error(
                f"'{word}' is no fault.",
                hint="such as kill:rank=3@step=40, stop:rank=1@step=80+0.01, slow:rank=2,x3, "
                "node:n2@time=5.",
            )
        kind = cast(Kind, match["kind"] or "node")
        seconds = float(match["delay"] or 0) + float(match["time"] or 0)
        faults.append(
            Fault(
                kind,
                match["node"] or match["rank"],
                int(match["step"] or (1 if match["time"] else 0)),
                seconds,
                float(match["factor"] or 1),
            )
        )
    return faults


def draw(ranks: int, steps: int, mtbf_steps: float, generator: random.Random) -> list[Fault]:
    """Draw random faults, after intervals that are exponentially distributed.

    One in four comes right after the one before, while the others recover. One rank is spared.

    Args:
        ranks: Of the run.
        steps: Of the run.
        mtbf_steps: Mean number of steps between faults.
        generator: Where the randomness comes from.
    """
    left = list(range(ranks))
    generator.shuffle(left)
    faults: list[Fault] = []
    step = 0.0
    while len(left) > 1:
        if not faults or generator.random() > 0.25:
            step += generator.expovariate(1 / mtbf_steps)
            seconds = generator.uniform(0, 0.02)
        else:
            seconds = faults[-1].seconds + generator.uniform(0, 0.15)
        if step >= steps:
            break
        kind: Kind = generator.choice(["kill", "kill", "stop"])
        faults.append(Fault(kind, str(left.pop()), int(step), seconds))
    return faults
