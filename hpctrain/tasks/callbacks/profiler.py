"""Where the time of a few steps goes, by torch's profiler."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from hpctrain.tasks.callbacks.base import Callback, Run


@dataclass
class Profiler(Callback):
    """Traces a few steps on every rank, then stops.

    Each rank writes ``profile/rank-R-step-S.json`` in the run folder, S being the last step in it:
    open it in https://ui.perfetto.dev, or chrome://tracing.

    Args:
        steps: To be traced.
        after: Steps to be left out before, from the first one of this process on.
    """

    ranks: ClassVar[Literal["zero", "all"]] = "all"
    steps: int = 5
    after: int = 10
    _profile: Any = field(default=None, init=False, repr=False)
    _seen: int = field(default=0, init=False, repr=False)

    def on_start(self, run: Run) -> None:
        """Begin to trace at the first step, if none is to be left out.

        Args:
            run: The run.
        """
        if self.after == 0:
            self._begin(run)

    def on_step(self, run: Run) -> None:
        """Begin, or write the trace, if it is time to.

        Args:
            run: The run.
        """
        self._seen += 1
        if self._seen == self.after:
            self._begin(run)
        elif self._seen == self.after + self.steps:
            self._write(run)

    def on_end(self, run: Run) -> None:
        """Write what there is, where the run was shorter.

        Args:
            run: The run.
        """
        self._write(run)

    def _begin(self, run: Run) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if run.world.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(activities=kinds)
        self._profile.start()

    def _write(self, run: Run) -> None:
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        folder: Path = run.folder / "profile"
        folder.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(folder / f"rank-{run.world.rank}-step-{run.step}.json"))
        run.say(f"profile of {self._seen - self.after} steps: {folder}")
