"""Parameters that are exchanged together, and what has come of them since their last round."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn

from hpctrain.strategies.flats import Flats


class Pending(NamedTuple):
    """An exchange under way: sums of changes times samples, each with that of samples at its end.

    Attributes:
        due: The step after which the fragment takes them in.
        handles: To wait for; none are left of what has arrived.
        wires: The sums.
        rates: The inner rate of the round, for each parameter.
    """

    due: int
    handles: list[Any]
    wires: list[torch.Tensor]
    rates: list[float]


class Fragment:
    """Parameters that are exchanged together, and what has come of them since their last round.

    Attributes:
        parameters: At least one.
        offset: The step of a round at whose end they are sent, from 1.
        flats: Their layout.
        anchor: What all ranks started the round from.
        velocity: Of the outer optimizer.
        samples: Of this rank, in this round.
        steps: The same of all ranks.
        rates: The sum of the inner rates of these steps, for each parameter.
        pending: What was sent and is not applied yet.
        alike: Whether all ranks had the same at the end of the last round.
    """

    def __init__(self, parameters: list[nn.Parameter], offset: int, *, velocity: bool) -> None:
        self.parameters = parameters
        self.offset = offset
        self.flats = Flats(parameters)
        self.anchor = self.flats.read()
        self.velocity = [torch.zeros_like(flat) for flat in self.anchor] if velocity else []
        self.samples = 0.0
        self.steps = 0
        self.rates = [0.0] * len(parameters)
        self.pending: Pending | None = None
        self.alike = True

    @property
    def weight(self) -> float:
        """The weight of this rank in the mean: its samples, or 1 where no rank has taken a step."""
        return self.samples if self.steps else 1.0

    def count(self, samples: float, rates: dict[nn.Parameter, float]) -> None:
        """Count a step in.

        Args:
            samples: Of this rank.
            rates: Of the inner optimizer, where they are of use.
        """
        self.samples += samples
        self.steps += 1
        if rates:
            self.rates = [
                total + rates[p] for total, p in zip(self.rates, self.parameters, strict=True)
            ]

    def begin(self) -> list[float]:
        """Begin a round; returns the mean inner rate of the one before, for each parameter."""
        rates = [total / max(self.steps, 1) for total in self.rates]
        self.samples, self.steps = 0.0, 0
        self.rates = [0.0] * len(self.parameters)
        return rates

    def wires(self) -> list[torch.Tensor]:
        """Return this rank's terms of the sums: weighted differences, and the weight itself."""
        weight = self.weight
        return [
            torch.cat([(now - x) * weight, x.new_tensor([weight])])
            for now, x in zip(self.flats.read(), self.anchor, strict=True)
        ]


def divided(parameters: Sequence[nn.Parameter], count: int) -> list[list[nn.Parameter]]:
    """Divide parameters into runs of neighbours with nearly as many elements each.

    Args:
        parameters: In order.
        count: How many runs, unless there are fewer parameters.
    """
    count = min(count, len(parameters))
    ends = list(accumulate(p.numel() for p in parameters))
    cuts = [0]
    for number in range(1, count):
        # Where the middle of a parameter is past the line, it is the next one's first.
        line = ends[-1] * number / count
        cut = sum(end - p.numel() / 2 <= line for p, end in zip(parameters, ends, strict=True))
        cuts.append(min(max(cut, cuts[-1] + 1), len(parameters) - count + number))
    return [list(parameters[a:b]) for a, b in zip(cuts, [*cuts[1:], len(parameters)], strict=True)]


def means_of(sums: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the weighted means of sums that have the sum of weights at their end."""
    return [flat[:-1] / flat[-1].clamp(min=torch.finfo(flat.dtype).tiny) for flat in sums]
