"""Metrics of a whole set, such as AUC, F1 or perplexity: right however its samples are divided.

All ranks' rows are gathered batch by batch, in the order of the samples, and every rank updates its
metrics with all of them. So an object with ``update``, ``compute`` and ``reset`` needs to know
nothing of ranks, and a metric is the same, bit for bit, wherever its predictions are.
"""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hpctrain.data.batch import Batch
from hpctrain.errors import Error, nearest
from hpctrain.tasks.checks import OWN_NAMES, checked_predictions
from hpctrain.tasks.task import Task
from hpctrain.train.step import applied
from hpctrain.world.broadcast import gather_tensors
from hpctrain.world.communicator import Communicator

Rows = dict[str, torch.Tensor]
_METHODS = ("update", "compute", "reset")


class SetMetrics:
    """The metrics that a task's ``metrics()`` gives, over one set at a time.

    Args:
        task: Whose they are.
        device: Of the model.
        dtype: The run's: ``float32``, ``float64``, ``bf16`` or ``fp16``.

    Raises:
        Error: What ``metrics()`` gives is none, or has a name that is taken.
    """

    def __init__(self, task: Task, device: torch.device, dtype: str) -> None:
        self._task = task
        self._device = device
        self._dtype = dtype
        given: Any = task.metrics()
        self._who = f"of task {type(task).__name__}"
        if not isinstance(given, Mapping):
            raise Error(
                f"metrics() {self._who} returned a {type(given).__name__}.",
                hint='return metrics by name, such as {"auc": roc_auc_score}.',
            )
        self._metrics = {name: self._checked(name, metric) for name, metric in given.items()}
        self._mine: list[Rows] = []

    def _checked(self, name: Any, metric: Any) -> Any:
        if not isinstance(name, str) or name in OWN_NAMES:
            raise Error(
                f"metrics() {self._who} gives a metric of the name {name!r}.",
                hint="use text that records have not of their own.",
            )
        if not inspect.isclass(metric):
            if all(callable(getattr(metric, method, None)) for method in _METHODS):
                return metric
            if callable(metric):
                return _OfAllRows(metric)
        raise Error(
            f"metrics() {self._who} gives '{name}', which is no metric.",
            hint="give an object with update(), compute() and reset(), or a function of all rows.",
        )

    def reset(self) -> None:
        """Begin with a set."""
        self._mine = []
        for metric in self._metrics.values():
            metric.reset()

    def add(self, model: nn.Module, batch: Batch) -> None:
        """Take the predictions of this rank's samples.

        Args:
            model: In evaluation mode.
            batch: On the CPU.

        Raises:
            Error: ``predictions()`` does not give what it must.
        """
        if self._metrics:
            self._mine.append(predicted(self._task, model, batch, self._device, self._dtype))

    def gather(self, comm: Communicator) -> None:
        """Update the metrics with what all ranks have added since the last time.

        Args:
            comm: Of the ranks that share the set; each calls this as often.
        """
        if not self._metrics:
            return
        parts = gather_parts(comm, self._task, self._mine)
        self._mine = []
        rows = joined(self._task, parts)
        if not rows:
            return
        for name, metric in self._metrics.items():
            metric.update(**self._chosen(name, metric, rows))

    def _chosen(self, name: str, metric: Any, rows: Rows) -> Rows:
        """Return the rows that a metric's parameters are named after."""
        function = metric.function if isinstance(metric, _OfAllRows) else metric.update
        parameters = inspect.signature(function).parameters.values()
        if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
            return rows
        named = [each for each in parameters if each.kind is not inspect.Parameter.VAR_POSITIONAL]
        chosen = {each.name: rows[each.name] for each in named if each.name in rows}
        needed = [each.name for each in named if each.default is each.empty]
        missing = [each for each in needed if each not in rows]
        if not chosen and not missing:
            missing = ["**rows"]
        if missing:
            raise Error(
                f"metric '{name}' {self._who} takes '{missing[0]}', which predictions() does not "
                "give.",
                hint=nearest(missing[0], rows),
            )
        return chosen

    def join(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return a set's metrics, beside its means over samples.

        Args:
            means: By name.

        Raises:
            Error: A name is taken, or a metric is no number.
        """
        found = dict(means)
        for name, metric in self._metrics.items():
            value = metric.compute()
            several = value.items() if isinstance(value, Mapping) else ()
            named = {f"{name}_{key}": each for key, each in several} or {name: value}
            for key, each in named.items():
                if key in found:
                    raise Error(
                        f"metric '{key}' {self._who} is given twice: by loss() or another metric, "
                        "and by metrics().",
                        hint="leave one out.",
                    )
                found[key] = self._number(key, each)
        return found

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, numbers.Real):
            return float(value)
        if getattr(value, "size", None) == 1 or (
            isinstance(value, torch.Tensor) and value.numel() == 1
        ):
            return float(value.item())
        shape = getattr(value, "shape", None)
        what = f"of shape {tuple(shape)}" if shape is not None else f"a {type(value).__name__}"
        raise Error(
            f"metric '{name}' {self._who} is {what}, not a number.",
            hint="have compute() return one number, or several by name in a dict.",
        )


class _OfAllRows:
    """A metric that is a function of all samples' rows, kept until it is asked for."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._rows: list[Rows] = []

    def update(self, **rows: torch.Tensor) -> None:
        self._rows.append(rows)

    def compute(self) -> Any:
        names = self._rows[0] if self._rows else ()
        return self.function(**{name: torch.cat([r[name] for r in self._rows]) for name in names})

    def reset(self) -> None:
        self._rows = []


def predicted(task: Task, model: nn.Module, batch: Batch, device: torch.device, dtype: str) -> Rows:
    """Return what a task's ``predictions()`` gives of a batch, checked, on the CPU.

    Args:
        task: The user's side.
        model: In evaluation mode, on the device.
        batch: On the CPU.
        device: Of the model.
        dtype: The run's.

    Raises:
        Error: It is not what ``predictions()`` must give.
    """
    result = applied(task.predictions, model, batch, device, dtype)
    return checked_predictions(task, result, batch.samples)


def gather_parts(comm: Communicator, task: Task, mine: Sequence[Rows]) -> list[Rows]:
    """Return all ranks' rows, rank by rank; nothing of those that have none.

    Args:
        comm: Of the world; every rank calls this.
        task: Whose predictions they are.
        mine: This rank's, batch by batch.
    """
    return [rows for rows in gather_tensors(comm, joined(task, mine)) if rows]


def joined(task: Task, parts: Iterable[Rows]) -> Rows:
    """Return rows one part's after another's.

    Args:
        task: Whose predictions they are.
        parts: Each with the same names.

    Raises:
        Error: Parts have other names, or rows of other shapes.
    """
    parts = list(parts)
    if not parts:
        return {}
    for part in parts:
        for name in part.keys() | parts[0].keys():
            shapes = [tuple(p[name].shape[1:]) if name in p else None for p in (parts[0], part)]
            if shapes[0] != shapes[1]:
                raise Error(
                    f"predictions() of task {type(task).__name__} gives '{name}' with rows of "
                    f"shape {shapes[0]} in one batch and {shapes[1]} in another.",
                    hint="give the same names, and rows of the same shape, of every batch.",
                )
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
