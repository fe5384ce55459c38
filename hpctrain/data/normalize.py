"""Normalise images from bytes to floats, at the speed of memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

# What is converted at a time stays in the cache until it is scaled.
FLOATS_AT_A_TIME = 2**20


def normalize(
    images: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``(images - mean) / std``, by channel.

    The mean and deviation are laid out along a whole image row first: arithmetic that repeats three
    numbers cannot be vectorised, and takes several times as long.

    Args:
        images: uint8, shape (n, height, width, channels), contiguous.
        mean: By channel, of values 0 to 255.
        std: Standard deviation by channel, of values 0 to 255.
        out: float32, of the images' shape, contiguous; None: a new one. ``batch.empty`` gives one
            that is used again.

    Returns:
        ``out``.
    """
    if out is None:
        out = torch.empty(images.shape, dtype=torch.float32)
    height, width = images.shape[1], images.shape[2]
    scale, bias = _row(tuple(mean), tuple(std), width)
    rows = max(1, FLOATS_AT_A_TIME // max(1, len(bias)))
    source, target = images.view(-1, len(bias)), out.view(-1, len(bias))
    for start in range(0, len(images) * height, rows):
        # Few calls: each gives Python's lock away and has to get it back from other threads.
        part = target[start : start + rows] if len(target) > rows else target
        part.copy_(source[start : start + rows] if len(target) > rows else source)
        torch.addcmul(bias, part, scale, out=part)
    return out


@lru_cache(maxsize=16)
def _row(
    mean: tuple[float, ...], std: tuple[float, ...], width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and summand of each number of an image row."""
    scale = (1 / torch.tensor(std, dtype=torch.float64)).repeat(width)
    bias = -torch.tensor(mean, dtype=torch.float64).repeat(width) * scale
    return scale.float(), bias.float()
