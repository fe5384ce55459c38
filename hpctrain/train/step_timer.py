"""Where the time of a training step goes."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PARTS = ("input", "compute", "exchange", "update", "other")
"""Of a step: waiting for the batch; forward and backward; what the exchange of gradients, and
waiting for slower ranks, adds to that (what backward hides is no part of it); the optimizer; and
all between steps, as logging and validation. With a parameter server the update is the servers',
and within the exchange."""

MOST_MARKS = 1000


class StepTimer:
    """Adds up what passes between one call of ``lap`` and the next.

    On a GPU, where Python only launches work, that is the time between events on its stream.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        if self._gpu:
            from torch.cuda import Event

            self._event: Any = Event
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._marks: list[tuple[str, Any]] = []
        self.lap("other")

    def lap(self, part: str) -> None:
        """Book the time since the last call under a part of the step."""
        if self._gpu:
            mark: Any = self._event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._marks.append((part, mark))
        if len(self._marks) > MOST_MARKS:
            self.read()

    def read(self) -> dict[str, float]:
        """Return the seconds of each part so far, up to the last lap."""
        if self._gpu:
            self._marks[-1][1].synchronize()
        for (_, begun), (part, ended) in itertools.pairwise(self._marks):
            passed = begun.elapsed_time(ended) / 1e3 if self._gpu else ended - begun
            self._seconds[part] += passed
        del self._marks[:-1]
        return dict(self._seconds)
