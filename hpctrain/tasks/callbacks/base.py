"""Callbacks: what a user has done at the events of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import nn

from hpctrain.config import RunConfig
from hpctrain.data.batch import Batch
from hpctrain.errors import Error, nearest
from hpctrain.registry import Registry
from hpctrain.world.world import World

CALLBACKS = Registry(
    "callback",
    "hpctrain.callbacks",
    {
        "statistics": "hpctrain.tasks.callbacks.statistics:Statistics",
        "summary": "hpctrain.tasks.callbacks.summary:Summary",
        "profiler": "hpctrain.tasks.callbacks.profiler:Profiler",
        "time-budget": "hpctrain.tasks.callbacks.time_budget:TimeBudget",
        "samples": "hpctrain.tasks.callbacks.samples:Samples",
    },
)

EVENTS = ("on_start", "on_step", "on_log", "on_validation", "on_checkpoint", "on_end")


class Run(Protocol):
    """What a callback sees of a run, and may do to it.

    Attributes:
        config: Resolved.
        task: The user's side, a :class:`hpctrain.Task`.
        world: Who takes part, as it is now.
        folder: The run folder.
        model: The one that is trained; in ``on_validation`` the one that was validated, in
            evaluation mode.
        optimizer: The one that the strategy has wrapped.
    """

    config: RunConfig
    task: Any
    world: World
    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def step(self) -> int:
        """Optimizer steps done."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    def epochs(self) -> float:
        """Passes over the data done."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """The last metrics, ``train_loss`` and ``val_loss`` among them."""

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The best validation so far: ``step`` and ``metrics``; None before the first."""

    def predictions(self, samples: int) -> tuple[Batch, dict[str, torch.Tensor]]:
        """Return the first validation samples, and what the task's ``predictions()`` gives of them.

        Where the task gathers, all ranks have to call this.

        Args:
            samples: How many.

        Returns:
            Their batch, after ``transform``; and tensors of shape (samples, ...) by name. All on
            the CPU.

        Raises:
            Error: There are no validation samples, or the task does not define ``predictions()``.
        """

    def record(self, values: Mapping[str, float], kind: str = "callback") -> None:
        """Have values recorded at this step, by every logger; rank 0's are.

        Args:
            values: Numbers by name.
            kind: Of the record in ``metrics.jsonl``.
        """

    def say(self, text: str) -> None:
        """Tell the person who watches; what rank 0 says is shown.

        Args:
            text: A line.
        """

    def stop(self, reason: str) -> None:
        """Have the run end early, completed, at the same step on all ranks: within a second or so.

        Args:
            reason: Shown where rank 0 gives it.
        """


class Callback:
    """Something to be done at the events of a run. Subclass it and write the events you want.

    Events, in a run's order:

    ==================  =========================================================================
    ``on_start``        before the first step of this process; the checkpoint, if any, is restored
    ``on_step``         a step has ended on all ranks; gradients are still there
    ``on_log``          metrics of training were recorded
    ``on_validation``   the model was validated; it is in evaluation mode, without gradients
    ``on_checkpoint``   the state was handed over to be saved
    ``on_end``          the run has ended, completed or interrupted
    ==================  =========================================================================

    A rank is told of an event once a step. Where a rank is lost and a step is taken again by those
    that are left, its events are told when it has ended, and not again.

    Make the subclass a dataclass to give it options: ``--callback NAME,option=value``. Give it
    ``state_dict()`` and ``load_state_dict(state)``, and checkpoints hold what the first returns on
    rank 0; every rank is given it when the run is resumed.

    Attributes:
        ranks: Where events are told: on rank ``"zero"``, whichever process that is, or ``"all"``.

    Example:
        >>> class Often(Callback):
        ...     def on_step(self, run):
        ...         if run.step % 100 == 0:
        ...             run.say(f"step {run.step}: {run.metrics}")
    """

    ranks: ClassVar[Literal["zero", "all"]] = "zero"

    def on_start(self, run: Run) -> None:
        """Act as training begins, or goes on from a checkpoint.

        Args:
            run: The run.
        """

    def on_step(self, run: Run) -> None:
        """Act after a step has ended, and counts. The gradients that it used are still there.

        Args:
            run: The run.
        """

    def on_log(self, run: Run) -> None:
        """Act after the metrics of training were recorded; they are in ``run.metrics``.

        Args:
            run: The run.
        """

    def on_validation(self, run: Run) -> None:
        """Act after the model was validated; the metrics are in ``run.metrics``.

        Args:
            run: The run; ``run.model`` is what was validated.
        """

    def on_checkpoint(self, run: Run) -> None:
        """Act after the state was handed over to be saved; it is on disk a little later.

        Args:
            run: The run.
        """

    def on_end(self, run: Run) -> None:
        """Act at the end of the run, when all ranks have its parameters.

        Args:
            run: The run.
        """


def check_events(callback: Any, name: str) -> None:
    """Refuse what is no callback, or waits for an event that does not come.

    Args:
        callback: To be checked.
        name: It is called.

    Raises:
        Error: It is.
    """
    if not isinstance(callback, Callback):
        raise Error(
            f"callback '{name}' is a {type(callback).__name__}.",
            hint="derive its class from hpctrain.Callback.",
        )
    if callback.ranks not in ("zero", "all"):
        raise Error(
            f"callback '{name}' has ranks = {callback.ranks!r}.", hint="use 'zero' or 'all'."
        )
    for event in dir(type(callback)):
        if event.startswith("on_") and event not in EVENTS:
            raise Error(
                f"callback '{name}' defines {event}(), which nothing calls.",
                hint=nearest(event, EVENTS),
            )


def callbacks_of(task: Any, config: RunConfig) -> dict[str, Callback]:
    """Return the callbacks of a run by name: the task's own, then those that were asked for.

    Args:
        task: May have some.
        config: ``train.callbacks`` names others; ``log.profile`` asks for the profiler.

    Raises:
        Error: One cannot be made, or waits for an event that there is not.
    """
    given: list[tuple[str, Any]] = [(type(each).__name__, each) for each in task.callbacks()]
    specs = [*config.train.callbacks, *(["profiler"] if config.log.profile else [])]
    given += [(spec.partition(",")[0], CALLBACKS.make(spec)) for spec in specs]
    found: dict[str, Callback] = {}
    for name, callback in given:
        check_events(callback, name)
        count = sum(known == name or known.startswith(f"{name}#") for known in found)
        found[name if not count else f"{name}#{count + 1}"] = callback
    return found
