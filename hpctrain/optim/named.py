"""Optimizers and schedulers by name: hpctrain's own, torch's, and ``package.module:Class``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.optim import lr_scheduler

from hpctrain.config import OptimizerConfig, ScheduleConfig
from hpctrain.errors import Error, nearest
from hpctrain.optim.lamb import Lamb
from hpctrain.optim.patterns import matching
from hpctrain.registry import Registry

Scheduler = lr_scheduler.LRScheduler

PLATEAU = lr_scheduler.ReduceLROnPlateau
_COMPOSED = ("LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler")
"""Schedulers made of functions or of other schedulers, which no configuration can hold."""


def _classes(module: Any, base: type) -> dict[str, str]:
    """Return where the classes of a module are that derive from a base, by name."""
    return {
        name: f"{module.__name__}:{name}"
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base
        if not name.startswith("_")
    }


OPTIMIZERS = Registry(
    "optimizer", "hpctrain.optimizers", _classes(torch.optim, torch.optim.Optimizer)
)
SCHEDULERS = Registry("scheduler", "hpctrain.schedulers", _classes(lr_scheduler, Scheduler))


def optimizer_of(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer that a configuration names, of a model's trained parameters.

    Biases and norms (what has fewer than two dimensions) have no weight decay, unless
    ``optimizer.options`` sets one for all. Of hpctrain's own optimizers every key has a default; of
    others, keys that are not set are left to the class.

    Args:
        config: The section ``[optimizer]``.
        model: Whose parameters require a gradient, or not.

    Returns:
        At its peak rate.

    Raises:
        Error: There is no such optimizer, or it does not take these options.

    Example:
        >>> config = OptimizerConfig(name="RMSprop", options={"alpha": 0.9})
        >>> optimizer_of(config, nn.Linear(2, 1)).param_groups[0]["alpha"]
        0.9
    """
    kind, given = _own(config) if config.name in _OWN else _named(config)
    accepted = _accepted(kind)
    what = f"optimizer {kind.__name__}"
    _check(what, "optimizer.options", kind, config.options)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = _by_pattern(config, model, trained)
    for group in groups:
        _check(what, "optimizer.groups", kind, [key for key in group if key != "params"])
    if "weight_decay" in accepted and "weight_decay" not in config.options:
        decay = {"weight_decay": given.pop("weight_decay")} if "weight_decay" in given else {}
        groups = [part for group in groups for part in _by_decay({**decay, **group})]
    return cast(
        torch.optim.Optimizer,
        _made(what, kind, groups, {**given, **_fitting(kind, config.options)}),
    )


def _by_pattern(
    config: OptimizerConfig, model: nn.Module, trained: Sequence[nn.Parameter]
) -> list[dict[str, Any]]:
    """Group parameters by the first of ``optimizer.groups`` that matches; the others come first."""
    rest = dict.fromkeys(trained)
    groups = []
    for each in config.groups:
        found = [p for p in matching(model, each.match, "optimizer.groups").values() if p in rest]
        for parameter in found:
            del rest[parameter]
        values = each.model_dump(exclude_none=True, exclude={"match"})
        groups.append({"params": found, **values})
    return [group for group in ({"params": list(rest)}, *groups) if group["params"]]


def _by_decay(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Divide a group in two: parameters that have weight decay, and those that have none."""
    parameters = group["params"]
    decayed = {**group, "params": [p for p in parameters if p.ndim >= 2]}
    rest = {**group, "params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    return [part for part in (decayed, rest) if part["params"]]


def _own(config: OptimizerConfig) -> tuple[type, dict[str, Any]]:
    """Return the class behind one of hpctrain's own names, and all its keys."""
    given = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        momentum = config.momentum
        return torch.optim.SGD, {**given, "momentum": momentum, "nesterov": momentum > 0}
    return _OWN[config.name], {**given, "betas": config.betas}


_OWN: dict[str, type] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "lamb": Lamb}


def _named(config: OptimizerConfig) -> tuple[type, dict[str, Any]]:
    """Return the class of another name, and those of its keys that are set."""
    kind = _class(OPTIMIZERS, config.name, torch.optim.Optimizer, list(_OWN))
    accepted = _accepted(kind)
    return kind, {
        name: getattr(config, name)
        for name in ("lr", "momentum", "betas", "weight_decay")
        if config.is_set(name) and name in accepted and name not in config.options
    }


def scheduler_of(
    config: ScheduleConfig, optimizer: torch.optim.Optimizer, steps: int, mode: str
) -> tuple[Scheduler, dict[str, Any]]:
    """Make the scheduler that a configuration names; not one of hpctrain's own.

    What follows from the run is filled in where ``schedule.options`` has nothing else: ``T_max``
    and ``total_steps`` from its length, ``max_lr`` from the optimizer's rates, and the ``mode`` of
    ReduceLROnPlateau from the task.

    Args:
        config: The section ``[schedule]``.
        optimizer: At its peak rates.
        steps: How often the scheduler takes a step in the whole run.
        mode: ``min`` or ``max``, of the monitored metric.

    Returns:
        The scheduler, and what it was made with.

    Raises:
        Error: There is no such scheduler, it does not take these options, or only a task's
            ``schedule()`` can make it.
    """
    kind = _class(SCHEDULERS, config.name, Scheduler, ["constant", "linear", "cosine"])
    what = f"scheduler {kind.__name__}"
    if config.name in _COMPOSED:
        raise Error(
            f"{what} is made of functions or of other schedulers, which no file of settings holds.",
            hint="return it from schedule(optimizer) of the task.",
        )
    if config.final:
        raise Error(
            f"schedule.final = {config.final:g} is of 'linear' and 'cosine', not of {what}.",
            hint="schedule.options has its own arguments.",
        )
    _check(what, "schedule.options", kind, config.options)
    given = _fitting(kind, config.options)
    accepted = _accepted(kind)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    known: dict[str, Any] = {"T_max": steps, "max_lr": rates}
    if kind is PLATEAU:
        known["mode"] = mode
    if not {"epochs", "steps_per_epoch"} & given.keys():
        known["total_steps"] = steps
    given = {**{name: value for name, value in known.items() if name in accepted}, **given}
    return cast(Scheduler, _made(what, kind, optimizer, given)), given


def _class(registry: Registry, name: str, base: type, own: Sequence[str]) -> type:
    if registry.place(name) is None and ":" not in name:
        raise Error(
            f"there is no {registry.kind} '{name}'.", hint=nearest(name, [*own, *registry.names()])
        )
    kind: Any = registry.get(name)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise Error(
            f"'{name}' is no {registry.kind}.", hint=f"name a class that derives from {base}."
        )
    return kind


def _accepted(kind: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of a class, but for the first and those that the run decides."""
    parameters = inspect.signature(kind).parameters
    return {name: parameters[name] for name in list(parameters)[1:] if name != "last_epoch"}


def _check(what: str, key: str, kind: type, options: Iterable[str]) -> None:
    """Refuse options that a class does not take, by name.

    Raises:
        Error: The first of them, and the nearest of those that there are.
    """
    accepted = _accepted(kind)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        return
    for name in options:
        if name not in accepted:
            raise Error(f"{what} has no option '{name}' ({key}).", hint=nearest(name, accepted))


def _fitting(kind: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert lists to tuples where the class has them, which a TOML file cannot write."""
    accepted = _accepted(kind)
    return {
        name: tuple(value)
        if isinstance(value, list)
        and name in accepted
        and isinstance(accepted[name].default, tuple)
        else value
        for name, value in options.items()
    }


def _made(what: str, kind: type, first: Any, given: Mapping[str, Any]) -> Any:
    try:
        return kind(first, **given)
    except (TypeError, ValueError) as error:
        values = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise Error(
            f"{what} cannot be made with {values or 'no options'}: {error}.",
            hint="see its documentation, at pytorch.org.",
        ) from error
