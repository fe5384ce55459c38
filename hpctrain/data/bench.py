"""Measure how fast a shard set is read on this machine, and how well its order mixes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.loader import Loader
from hpctrain.data.order import EpochOrder
from hpctrain.data.quality import amplification, shuffle_quality
from hpctrain.data.shards import ShardSet
from hpctrain.data.source import ArraySource

MEMORY_BYTES = 256 * 2**20
STEP_SECONDS = 0.004
# What ranks read is reckoned up sample by sample; beyond this it takes too long.
MOST_SAMPLES = 500_000
DRIFT_BATCHES = 16


@dataclass(frozen=True)
class Report:
    """The figures of reading a split: speed, and how well its order mixes.

    Attributes:
        samples_per_second: Of batches made in the background and thrown away.
        bytes_per_second: Of the same batches.
        memory_ratio: That, as a part of what gathering samples from memory on one thread gives.
        first_batch_ms: From opening the set to having the first batch.
        stall_ms: Wait for a batch, with a step of 4 ms.
        shuffle_quality: Variance of a batch's class shares, as a multiple of a full permutation's;
            None where there is no label.
        drift: The same over stretches of 16 batches.
        amplification: Blocks that all ranks together read, as a multiple of those there are; None
            where there are too many samples to reckon.
    """

    samples_per_second: float
    bytes_per_second: float
    memory_ratio: float
    first_batch_ms: float
    stall_ms: float
    shuffle_quality: float | None
    drift: float | None
    amplification: float | None


def bench(
    path: Path, split: str, *, batch_size: int, ranks: int, label: str, seconds: float, workers: int
) -> Report:
    """Read a split as training would.

    Args:
        path: Of the shard set.
        split: To read.
        batch_size: Global.
        ranks: Of the world whose reading is reckoned up.
        label: Field by which mixing is measured.
        seconds: To measure for, about.
        workers: Batches made at a time.

    Raises:
        Error: The set cannot be read.
    """
    began = time.perf_counter()
    source = ShardSet(path).split(split)
    batch_size = min(batch_size, len(source))
    loader = Loader(source, batch_size, workers=workers)
    batch = next(iter(loader))
    first = time.perf_counter() - began
    sample_bytes = sum(tensor.nbytes for tensor in batch.values()) / batch.samples
    speed = _speed(loader, seconds)
    stall = _stall(loader, seconds)
    loader.close()
    order = source.order(0, 0, "block", batch_size)
    assert isinstance(order, EpochOrder)
    quality = moved = None
    if label in source.fields and source.fields[label].kind.kind in "biu":
        labels = source.column(label).astype(np.int64)
        quality = shuffle_quality(order, labels, batch_size)
        moved = shuffle_quality(order, labels, batch_size * DRIFT_BATCHES, batches=64)
    few = len(source) <= MOST_SAMPLES
    return Report(
        samples_per_second=speed,
        bytes_per_second=speed * sample_bytes,
        memory_ratio=speed / _memory_speed(int(sample_bytes), batch_size),
        first_batch_ms=1e3 * first,
        stall_ms=1e3 * stall,
        shuffle_quality=quality,
        drift=moved,
        amplification=amplification(order, batch_size, ranks) if few else None,
    )


def _speed(loader: Loader, seconds: float) -> float:
    samples, began = 0, time.perf_counter()
    while True:
        for batch in loader:
            samples += batch.samples
            passed = time.perf_counter() - began
            if passed > seconds:
                return samples / passed


def _stall(loader: Loader, seconds: float) -> float:
    waited, batches = loader.wait_seconds, 0
    while batches * STEP_SECONDS < seconds:
        for _ in loader:
            time.sleep(STEP_SECONDS)
            batches += 1
            if batches * STEP_SECONDS > seconds:
                break
    return (loader.wait_seconds - waited) / batches


def _memory_speed(sample_bytes: int, batch_size: int) -> float:
    """Samples a second, gathered at random into one and the same batch."""
    samples = max(batch_size, MEMORY_BYTES // sample_bytes)
    rng = np.random.default_rng(0)
    memory = ArraySource({"x": rng.integers(0, 255, (samples, sample_bytes), dtype=np.uint8)})
    batch = np.empty((batch_size, sample_bytes), np.uint8)

    def empty(shape: tuple[int, ...], dtype: Any) -> NDArray[np.uint8]:
        return batch

    best = 0.0
    for _ in range(5):
        order = rng.permutation(samples)[: samples // batch_size * batch_size]
        began = time.perf_counter()
        for start in range(0, len(order), batch_size):
            memory.take(order[start : start + batch_size], empty)
        best = max(best, len(order) / (time.perf_counter() - began))
    return best
