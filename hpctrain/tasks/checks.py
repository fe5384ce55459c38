"""Check what a task gives where it comes: one line says what was expected."""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from hpctrain.config import DataConfig, OptimizerConfig, RunConfig
from hpctrain.data.batch import Batch
from hpctrain.data.source import ArraySource, Source
from hpctrain.errors import Error
from hpctrain.optim.named import Scheduler
from hpctrain.tasks.division import divided
from hpctrain.tasks.task import Task

SPLITS = ("train", "validation", "test")
"""What is read of ``Task.data()``; the last not by the loop, but by `hpctrain evaluate`."""

OWN_NAMES = (
    "kind", "step", "time", "epoch", "lr", "loss", "grad_norm", "samples_per_second",
    "input_wait_ms", "input_wait_share", "lost_samples", "nonfinite_losses",
    "skipped_steps", "loss_scale",
)  # fmt: skip
"""What records have of their own."""

_WHAT_LOSS_RETURNS = (
    "return the mean loss over the batch's samples as a tensor of one number, alone or as "
    '(loss, {"accuracy": ...}) with further means by name.'
)
_MEANT = {
    **dict.fromkeys(("training", "train_set", "trainset", "x_train", "fit"), "train"),
    **dict.fromkeys(
        ("val", "valid", "validate", "dev", "eval", "evaluation", "test", "testing", "holdout"),
        "validation",
    ),
}
# Of other frameworks; what is meant, in this one.
_FOREIGN = {
    **dict.fromkeys(("training_step", "validation_step", "test_step", "forward", "compute_loss"),
        "loss(model, batch)"),
    **dict.fromkeys(("configure_optimizers", "optimizers", "get_optimizer"),
        "optimizer(model, config)"),
    **dict.fromkeys(("train_dataloader", "val_dataloader", "test_dataloader", "prepare_data",
        "setup", "get_data", "dataset"), "data(config)"),
    **dict.fromkeys(("lr_scheduler", "scheduler", "get_scheduler", "configure_schedulers",
        "create_scheduler", "lr_schedule"), "schedule(optimizer)"),
    **dict.fromkeys(("criterion", "loss_fn", "get_loss", "calculate_loss", "eval_step"),
        "loss(model, batch)"),
    **dict.fromkeys(("configure_model", "build_model", "get_model", "create_model"), "model()"),
    **dict.fromkeys(("collate_fn", "collate", "augment", "preprocess"),
        "transform(batch, training)"),
    **dict.fromkeys(("compute_metrics", "validation_epoch_end", "test_epoch_end"), "metrics()"),
    **dict.fromkeys(("predict_step", "prediction_step"), "predictions(model, batch)"),
}  # fmt: skip
# Of all samples, and not the mean of their values over batches.
_NO_MEAN = re.compile(
    r"(^|_)(auc|auroc|auprc|ap|map|f1|fbeta|precision|recall|ppl|perplexity|r2|mcc|kappa|rmse|"
    r"pearson|spearman|correlation)(_|$)",
    re.IGNORECASE,
)
_OWN = (
    "model", "loss", "data", "transform", "optimizer", "schedule", "metrics", "predictions",
    "callbacks", "defaults", "monitor", "mode", "gathers", "world",
)  # fmt: skip
_OF_A_MESH = ("stages", "blocks", "parallelize")
"""Of tasks whose models are divided; a task may use the names for what it likes."""


def check_defined(task: Task) -> None:
    """Refuse a task that lacks what every task must have.

    Raises:
        Error: It does.
    """
    kind = type(task)
    missing = [n for n in ("model", "loss") if getattr(kind, n) is getattr(Task, n)]
    if missing:
        raise Error(
            f"task {kind.__name__} must define {' and '.join(f'{name}()' for name in missing)}.",
            hint="the README has a task in about 20 lines.",
        )
    if kind.world is not Task.world or "world" in getattr(kind, "__dataclass_fields__", ()):
        raise Error(
            f"task {kind.__name__} has something of its own by the name 'world'.",
            hint="call it otherwise: self.world says who takes part.",
        )


class Read:
    """The sections of a configuration that a task is handed, and a record of what it reads of them.

    Args:
        config: Of the run.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self.data = _Reading(config.data)
        self.optimizer = _Reading(config.optimizer)

    @property
    def divides(self) -> bool:
        """Whether ``data.split`` makes splits."""
        return self._config.data.split is not None

    def divided(self, splits: dict[str, Source]) -> dict[str, Source]:
        """Divide splits as ``data.split`` says, where it is set.

        Args:
            splits: As the task gives them.
        """
        how = self._config.data.split
        return splits if how is None else divided(splits, how, self._config.seed)

    def unread(self, task: Task) -> list[str]:
        """Say what was set for this run, and the task did not look at; a line each."""
        said = []
        for section, method, names in (
            ("data", "data", ("path", "mixture", "weights")),
            (
                "optimizer",
                "optimizer",
                ("name", "lr", "momentum", "betas", "weight_decay", "options", "groups"),
            ),
        ):
            reading: _Reading = getattr(self, section)
            for name in names:
                key = f"{section}.{name}"
                value = getattr(getattr(self._config, section), name)
                was_set = name in getattr(self._config, section).model_fields_set
                if was_set and task.defaults.get(key) != value and not reading.has_read(name):
                    said.append(f"{key} = {value} changes nothing: {method}() of this task does "
                                "not read it.")  # fmt: skip
        return said


class _Reading:
    """A section that notes what is read of it."""

    def __init__(self, section: Any) -> None:
        self.__dict__["_section"] = section
        self.__dict__["_names"] = set()

    def __getattr__(self, name: str) -> Any:
        self._names.add(name)
        return getattr(self._section, name)

    def has_read(self, name: str) -> bool:
        """Whether it was, or the section as a whole."""
        return name in self._names or any(each.startswith(("model_", "__")) for each in self._names)


def splits_of(task: Task, read: Read) -> dict[str, Source]:
    """Return the task's samples by split, checked.

    Args:
        task: Gives them.
        read: What it is handed of the configuration.

    Raises:
        Error: There are none to train on, or there is a split that nothing reads.
    """
    name = type(task).__name__
    given: Any = task.data(cast(DataConfig, read.data))
    expected = 'return {"train": samples, "validation": samples}; the second may be left out.'
    if not isinstance(given, Mapping):
        raise Error(f"data() of task {name} returned {_described(given)}.", hint=expected)
    for split in given:
        # A test set alone was meant to be validated on: nothing else would be.
        alone = split == "test" and given.get("validation") is None and not read.divides
        if split not in SPLITS or alone:
            meant = _MEANT.get(str(split).lower()) or _close(str(split), SPLITS)
            hint = f"did you mean '{meant}'?" if meant and meant not in given else expected
            raise Error(f"data() of task {name} gives '{split}', which nothing reads.", hint=hint)
    if given.get("train") is None:
        raise Error(f"data() of task {name} gives nothing to train on.", hint=expected)
    splits = {
        split: _source(name, split, given[split]) for split in given if given[split] is not None
    }
    return read.divided(splits)


def _source(task: str, split: str, samples: Any) -> Source:
    if isinstance(samples, Source):
        return samples
    if isinstance(samples, Mapping) and samples:
        return ArraySource(samples)
    raise Error(
        f"split '{split}' of task {task} is {_described(samples)}.",
        hint='give arrays or tensors by field, such as {"x": x, "y": y}, or an hpctrain Source.',
    )


def model_of(task: Task, ranks: int) -> nn.Module:
    """Return the task's model, checked.

    Args:
        task: Makes it.
        ranks: How many have to begin with the same one.

    Raises:
        Error: It is none, or has no values yet.
    """
    model: Any = task.model()
    name = type(task).__name__
    if not isinstance(model, nn.Module):
        hint = "return an instance of torch.nn.Module"
        hint += ", not its class." if inspect.isclass(model) else "; is a `return` missing?"
        raise Error(f"model() of task {name} returned {_described(model)}.", hint=hint)
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if ranks > 1 and nn.parameter.is_lazy(tensor):
            raise Error(
                f"'{key}' of the model of task {name} has no shape yet: ranks cannot begin alike.",
                hint="have model() call a lazy module once, on a sample of zeros.",
            )
        if tensor.device.type == "meta":
            raise Error(
                f"model() of task {name} left '{key}' on the meta device, without values.",
                hint="make it on the CPU; hpctrain moves it to this rank's device.",
            )
    return model


def optimizer_of(
    task: Task, model: nn.Module, read: Read, *, closures: bool = False
) -> torch.optim.Optimizer:
    """Return the task's optimizer, checked.

    Args:
        task: Makes it.
        model: Whose parameters it updates.
        read: The section that the task is handed.
        closures: Whether it may evaluate the loss by itself.

    Raises:
        Error: There is nothing to train, it is none, or it needs a closure.
    """
    name = type(task).__name__
    if not any(p.requires_grad for p in model.parameters()):
        raise Error(
            f"the model of task {name} has no parameter that requires a gradient.",
            hint="leave some unfrozen.",
        )
    optimizer: Any = task.optimizer(model, cast(OptimizerConfig, read.optimizer))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise Error(
            f"optimizer() of task {name} returned {_described(optimizer)}.",
            hint="return a torch.optim.Optimizer alone; [schedule] sets the learning rate.",
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty and not closures:
        raise Error(
            f"optimizer {type(optimizer).__name__} of task {name} evaluates the loss again and "
            "again in a step, for which it wants a closure; here it is given one gradient.",
            hint="use one that steps once per gradient, such as SGD or AdamW; or one process, with "
            "--strategy single, without train.nonfinite=skip and fp16.",
        )
    return optimizer


def schedule_of(task: Task, optimizer: torch.optim.Optimizer) -> Scheduler | None:
    """Return the task's scheduler, or None where it gives none.

    Args:
        task: The user's side.
        optimizer: The plain one, which the scheduler has to be of.

    Raises:
        Error: It is none, or of another optimizer.
    """
    made: Any = task.schedule(optimizer) if callable(task.schedule) else None
    name = type(task).__name__
    if made is None:
        return None
    if not isinstance(made, Scheduler):
        raise Error(
            f"schedule() of task {name} returned {_described(made)}.",
            hint="return a scheduler of torch.optim.lr_scheduler, or None.",
        )
    if getattr(made, "optimizer", optimizer) is not optimizer:
        raise Error(
            f"schedule() of task {name} returned a scheduler of another optimizer.",
            hint="make it with the optimizer that schedule(optimizer) is given.",
        )
    return made


def checked_loss(
    task: Task, result: Any, *, training: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
    """Return what ``loss()`` gave, as the loss and the other means by name, checked.

    Args:
        task: Whose it is.
        result: As it came.
        training: Whether gradients are wanted.

    Raises:
        Error: It is not what ``loss()`` must return.
    """
    name = type(task).__name__
    means: Any = {}
    loss: Any = result
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
        loss, means = result
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or loss.is_complex():
        what = _described(result if not isinstance(loss, torch.Tensor) else loss)
        if result is None:
            what += " (is a `return` missing?)"
        if isinstance(loss, numbers.Number | np.generic):
            what += " (.item() takes the gradient away)"
        raise Error(f"loss() of task {name} returned {what}.", hint=_loss_hint(result))
    if training and not loss.requires_grad:
        raise Error(
            f"loss() of task {name} returned a loss without gradient.",
            hint="it was detached, computed under torch.no_grad(), or of frozen parameters alone.",
        )
    return loss.reshape(()), {key: _mean(name, key, value) for key, value in means.items()}


def _loss_hint(result: Any) -> str:
    """Say what to return instead of a result that is no loss."""
    if isinstance(getattr(result, "loss", None), torch.Tensor):
        return "return its attribute `loss`."
    if isinstance(result, Mapping) and isinstance(result.get("loss"), torch.Tensor):
        return 'return what it has as "loss", alone or as (loss, {further means by name}).'
    if isinstance(result, torch.Tensor) and result.ndim == 1 and not result.is_complex():
        return "return its mean over the batch's samples: `.mean()`."
    if isinstance(result, tuple) and result and isinstance(result[0], torch.Tensor):
        return "return the loss alone, or with a dict of further means by name."
    return _WHAT_LOSS_RETURNS


def weighs(task: Task) -> bool:
    """Return whether a task says itself what a batch counts for."""
    return type(task).weight is not Task.weight


def checked_weight(task: Task, batch: Batch) -> float:
    """Return what a batch counts for in means over batches, as the task says.

    Args:
        task: Asked only where the batch has samples.
        batch: On the CPU.

    Raises:
        Error: ``weight()`` returned something else than a number of at least 0.
    """
    if not batch.samples:
        return 0.0
    result: Any = task.weight(batch)
    number = result.item() if isinstance(result, torch.Tensor) and result.numel() == 1 else result
    if isinstance(number, numbers.Real) and 0 <= float(number) < math.inf:
        return float(number)
    raise Error(
        f"weight() of task {type(task).__name__} returned {_described(result)}.",
        hint="return how many targets the batch has: one number of at least 0.",
    )


def _mean(task: str, name: Any, value: Any) -> torch.Tensor | float:
    if not isinstance(name, str) or name in OWN_NAMES or re.fullmatch(r"lr_\d+", name):
        why = "which records have of their own" if isinstance(name, str) else "which is not text"
        raise Error(
            f"loss() of task {task} gives a metric of the name {name!r}, {why}.",
            hint="the loss is recorded by itself; call other means by other names.",
        )
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.reshape(())[()]
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        return value.detach().reshape(())
    if isinstance(value, numbers.Real | np.bool_):
        return float(value)
    raise Error(
        f"loss() of task {task} gives metric '{name}' as {_described(value)}.",
        hint="give its mean over the batch's samples: one number.",
    )


def checked_predictions(task: Task, result: Any, samples: int) -> dict[str, torch.Tensor]:
    """Return what ``predictions()`` gave, by name, on the CPU, checked.

    Args:
        task: Whose it is.
        result: As it came.
        samples: Of the batch.

    Raises:
        Error: It is not what ``predictions()`` must return.
    """
    name = type(task).__name__
    hint = 'return {"preds": ..., "target": ...}: tensors with a row for each sample.'
    if not isinstance(result, Mapping) or not result:
        raise Error(f"predictions() of task {name} returned {_described(result)}.", hint=hint)
    rows = {}
    for key, value in result.items():
        if not isinstance(value, torch.Tensor) or not isinstance(key, str):
            raise Error(
                f"predictions() of task {name} gives {key!r} as {_described(value)}.", hint=hint
            )
        if value.ndim == 0 or len(value) != samples:
            raise Error(
                f"predictions() of task {name} gives '{key}' as {_described(value)} for "
                f"{samples} samples.",
                hint=hint,
            )
        rows[key] = value.detach().cpu()
    return rows


def warnings_of(task: Task) -> list[str]:
    """Say what a task defines, and nothing reads, one line each."""
    said = []
    kind = type(task)
    for each in kind.__mro__[: kind.__mro__.index(Task)]:
        for name in vars(each):
            if name.startswith("_") or name in (*_OWN, *_OF_A_MESH) or hasattr(Task, name):
                continue
            if name.startswith("on_") and callable(getattr(each, name)):
                said.append(f"{kind.__name__}.{name}() is called by nothing: there are no hooks.")
            elif meant := _FOREIGN.get(name) or _close(name, _OWN):
                said.append(f"nothing reads {kind.__name__}.{name}: did you mean {meant}?")
    return said


def no_means(names: Iterable[str]) -> str:
    """Say which metrics are, by their names, no means over samples; or nothing."""
    found = [name for name in names if _NO_MEAN.search(name)]
    if not found:
        return ""
    shown = ", ".join(f"'{name}'" for name in found)
    return (
        f"{shown} is recorded as the mean of its values over batches, which is not that of all "
        "samples: have metrics() give it (docs/tasks.md)."
    )


def _close(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.75)), None)


def _described(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor):
        kind = "a complex tensor" if value.is_complex() else "a tensor"
        return f"{kind} of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"a {kind} with {', '.join(map(str, list(value)[:4]))}" if value else f"a {kind}"
    if isinstance(value, tuple | list):
        return f"a {kind} of {len(value)}: {', '.join(type(v).__name__ for v in value[:4])}"
    return f"a {kind}"
