"""A pool of memory for batches, used again and again.

A fresh array of some megabytes costs a page fault for every page of it, several times what filling
it costs. A buffer is given out again only when nothing refers to it any more, so a batch may be
kept as long as one likes.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# Smaller ones come from the C library's free lists, without a fault.
SMALL_BYTES = 128 * 2**10


class Buffers:
    """Gives out arrays; safe to use from any number of threads.

    Args:
        pinned: In page-locked memory, from which GPUs copy while the CPU goes on. PyTorch keeps
            such memory for reuse itself, and waits for copies under way.
    """

    def __init__(self, pinned: bool = False) -> None:
        self.pinned = pinned
        self._held: dict[int, list[NDArray[np.uint8]]] = {}
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return an array with any content, in memory that is used again.

        Args:
            shape: Of the array.
            dtype: What numpy takes for a dtype.
        """
        kind = np.dtype(dtype)
        size = kind.itemsize * math.prod(shape)
        if self.pinned and size:
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        elif size < SMALL_BYTES:
            return np.empty(shape, kind)
        else:
            memory = self._memory(size)
        array: NDArray[Any] = memory[:size].view(kind).reshape(shape)
        return array

    def _memory(self, size: int) -> NDArray[np.uint8]:
        # A quarter more than asked for at most, so that batches of nearly equal size share.
        grain = 1 << max(12, size.bit_length() - 3)
        size = -(-size // grain) * grain
        with self._lock:
            held = self._held.setdefault(size, [])
            for number in range(len(held)):
                if _references(held, number) == _UNUSED:
                    return held[number]
            held.append(np.empty(size, np.uint8))
            return held[-1]


def _references(arrays: list[NDArray[np.uint8]], number: int) -> int:
    return sys.getrefcount(arrays[number])


# What an array has to which only its list refers; it differs between versions of Python.
_UNUSED = _references([np.empty(1, np.uint8)], 0)
