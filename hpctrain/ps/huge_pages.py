"""Memory for large tensors, in huge pages where the system gives them.

MPI copies from one process of a host to another page by page, and an update walks through several
tensors at once: both go faster with few pages.
"""

from __future__ import annotations

import contextlib
import mmap
import sys

import torch

HUGE_PAGE = 2**21


def zeros(size: int) -> torch.Tensor:
    """Return so many bytes of memory, all zero."""
    if size < HUGE_PAGE or sys.platform != "linux":
        return torch.zeros(size, dtype=torch.uint8)
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE
    memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]
