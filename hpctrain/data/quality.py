"""Measure how well an order mixes, and how much it makes a rank read."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.order import WINDOW_BLOCKS, EpochOrder, Order, share


def shuffle_quality(
    order: Order, labels: NDArray[np.int64], batch_size: int, batches: int = 512
) -> float:
    """Return the variance of a batch's class shares over that of a full permutation (1: as good).

    The mean over batches, spread over the epoch, of Pearson's chi-squared over its degrees of
    freedom, between the batch's labels and all labels, corrected for drawing without replacement.
    It is the "design effect" of Kish, Survey Sampling, 1965.

    Args:
        order: Of an epoch.
        labels: Of every sample, shape (samples,).
        batch_size: Global.
        batches: How many to look at.
    """
    classes, labels = np.unique(labels, return_inverse=True)
    samples = len(labels)
    if len(classes) < 2 or samples <= batch_size:
        return 1.0
    expected = np.bincount(labels, minlength=len(classes)) / samples * batch_size
    starts = np.unique(np.linspace(0, samples // batch_size - 1, batches).astype(np.int64))
    values = []
    for start in (starts * batch_size).tolist():
        indices = order.indices(np.arange(start, start + batch_size, dtype=np.uint64))
        counts = np.bincount(labels[indices], minlength=len(classes))
        values.append(((counts - expected) ** 2 / expected).sum() / (len(classes) - 1))
    return float(np.mean(values) / ((samples - batch_size) / (samples - 1)))


def amplification(order: EpochOrder, batch_size: int, ranks: int) -> float:
    """Return the blocks that ranks read in an epoch, as a multiple of the blocks there are.

    Each rank keeps the blocks it used last: as many as its lanes have in their windows, and half as
    many again.

    Args:
        order: Of an epoch.
        batch_size: Global.
        ranks: Of the world.
    """
    block = order.block_samples
    room = -(-batch_size // ranks) * WINDOW_BLOCKS * 3 // 2
    read = 0
    for rank in range(ranks):
        kept: OrderedDict[int, None] = OrderedDict()
        for start in range(0, order.samples, batch_size):
            part = share(start, min(start + batch_size, order.samples), rank, ranks)
            for number in np.unique(order.indices(np.arange(*part, dtype=np.uint64)) // block):
                if int(number) in kept:
                    kept.move_to_end(int(number))
                    continue
                read += 1
                kept[int(number)] = None
                if len(kept) > room:
                    kept.popitem(last=False)
    return read / -(-order.samples // block)
