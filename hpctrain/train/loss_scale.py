"""Losses of 16-bit floats scaled up, so that small gradients do not vanish.

Micikevicius et al., "Mixed Precision Training", ICLR 2018: a loss is multiplied by a power of two,
and the gradient divided by it before it is clipped and used. A gradient that is not finite halves
the scale, and its step is left out; so many good steps in a row double it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hpctrain.train.state import Counters

GOOD_STEPS = 2000
"""After so many good steps in a row the scale is doubled."""

LARGEST = 2.0**24
"""Beyond this a float32 loss would lose its range rather than win some."""


def unscale(gradients: Iterable[torch.Tensor], scale: float) -> None:
    """Divide gradients by the scale of the loss, in place.

    Args:
        gradients: Dense or sparse.
        scale: A power of two, so that nothing is rounded.
    """
    for gradient in gradients:
        gradient.mul_(1.0 / scale)


def adjust(counters: Counters, *, finite: bool) -> None:
    """Choose the next step's scale; every rank has seen the same gradient, and does the same.

    Args:
        counters: Hold the scale, and are saved with the run.
        finite: Whether this step's gradient was.
    """
    counters.good_steps = counters.good_steps + 1 if finite else 0
    if not finite:
        counters.loss_scale = max(counters.loss_scale / 2, 1.0)
    elif counters.good_steps == GOOD_STEPS:
        counters.loss_scale = min(counters.loss_scale * 2, LARGEST)
        counters.good_steps = 0
