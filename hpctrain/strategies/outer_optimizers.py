"""Outer optimizers of periodic averaging: what becomes of the anchor when a round is over.

The *anchor* x is what all ranks started the round from, m the mean of what they came to, each
weighted by its samples of the round. *Change* is m - x: the negative of what DiLoCo calls the outer
gradient. *Velocity* is the momentum, in the direction in which the anchor moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["mean", "nesterov", "slowmo", "bmuf", "easgd"]


@dataclass(frozen=True)
class OuterOptimizer:
    """An outer optimizer: it moves the anchor by the change of a round.

    Attributes:
        kind: ``mean``, local SGD: x <- m (Stich, arXiv:1805.09767). ``nesterov``, DiLoCo:
            v <- mu v + (m - x), x <- x + eta (m - x + mu v) (Douillard et al., arXiv:2311.08105).
            ``slowmo``: v <- mu v + (m - x) / gamma, x <- x + eta gamma v, with gamma the rate of
            the inner steps (Wang et al., arXiv:1910.00643). ``bmuf``: v <- mu v + eta (m - x),
            x <- x + v (Chen & Huo, ICASSP 2016). ``easgd``: x <- x + eta (m - x), with eta n times
            what a rank is drawn to the anchor by (Zhang et al., arXiv:1412.6651).
        lr: eta.
        momentum: mu.
    """

    kind: Kind
    lr: float = 1.0
    momentum: float = 0.0

    @property
    def has_velocity(self) -> bool:
        """Whether it remembers anything from round to round."""
        return self.kind in ("nesterov", "slowmo", "bmuf")

    def move(
        self,
        anchor: Sequence[torch.Tensor],
        velocity: Sequence[torch.Tensor],
        change: Sequence[torch.Tensor],
        rates: Sequence[float | torch.Tensor],
    ) -> None:
        """Move the anchor, and renew the velocity, in place.

        Args:
            anchor: Flat tensors.
            velocity: Shaped like the anchor; empty where there is none.
            change: Shaped like the anchor.
            rates: For each flat the inner rate of the round, or that of each of its elements.
        """
        for n, (x, moved) in enumerate(zip(anchor, change, strict=True)):
            if self.kind == "mean":
                x.add_(moved)
            elif self.kind == "easgd":
                x.add_(moved, alpha=self.lr)
            elif self.kind == "nesterov":
                velocity[n].mul_(self.momentum).add_(moved)
                x.add_(moved, alpha=self.lr).add_(velocity[n], alpha=self.lr * self.momentum)
            elif self.kind == "bmuf":
                velocity[n].mul_(self.momentum).add_(moved, alpha=self.lr)
                x.add_(velocity[n])
            else:
                rate = torch.as_tensor(rates[n], dtype=x.dtype, device=x.device)
                # Where the rate was 0 nothing has moved.
                velocity[n].mul_(self.momentum).add_(torch.where(rate > 0, moved / rate, 0.0))
                x.add_(velocity[n] * rate, alpha=self.lr)
