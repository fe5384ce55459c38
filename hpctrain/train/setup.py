"""What a rank trains: the task's model and optimizer, made ready, and loaders of its samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from hpctrain.config import OWN_SCHEDULES, RunConfig
from hpctrain.data.loader import Loader
from hpctrain.data.source import Source
from hpctrain.errors import Error
from hpctrain.optim.named import scheduler_of
from hpctrain.optim.patterns import matching
from hpctrain.optim.schedule import peak_scale
from hpctrain.strategies.base import Agreement, Strategy, no_tables
from hpctrain.tables.table import tables_of
from hpctrain.tasks.checks import (
    Read,
    check_defined,
    model_of,
    optimizer_of,
    schedule_of,
    splits_of,
    warnings_of,
    weighs,
)
from hpctrain.tasks.seeds import set_start_seeds
from hpctrain.tasks.task import Task, TaskTransform
from hpctrain.train.block_setup import set_up_blocks
from hpctrain.train.model_setup import averaged, prepared
from hpctrain.train.scheduling import Scheduling
from hpctrain.train.state import TrainState
from hpctrain.train.sync_batchnorm import has_batchnorm, synchronize_batchnorm
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World


class Setup(NamedTuple):
    """What a rank trains.

    Attributes:
        splits: The task's samples.
        state: Model, optimizer, and the loader of the training samples.
        validation: The loader of the validation samples, in their own order; None without any.
        peaks: Of each parameter group, the learning rate that the schedule multiplies.
        warnings: What the task or the configuration has, and nothing reads.
    """

    splits: Mapping[str, Source]
    state: TrainState
    validation: Loader | None
    peaks: list[float]
    warnings: list[str]


def set_up(config: RunConfig, task: Task, strategy: Strategy) -> Setup:
    """Make what a rank trains; the same start on every rank.

    Args:
        config: Resolved.
        task: The user's side.
        strategy: Connected.

    Raises:
        Error: The task gives what cannot be trained, or settings do not go together.
    """
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    check_defined(task)
    _check_together(config, task, strategy)
    strategy.prepare(config, task)
    world = strategy.world
    set_start_seeds(config.seed)
    read = Read(config)
    splits = splits_of(task, read)
    validation = _validation(config, task, splits)
    set_start_seeds(config.seed)
    model = prepared(model_of(task, world.comm.size), world.device, config.train.dtype)
    _check_tables(config, model, strategy)
    if config.train.sync_batchnorm:
        synchronize_batchnorm(model, world)
    set_up_blocks(config.train, model, task)
    frozen = _to_freeze(config, model)
    for parameter in frozen:
        # What is to be trained later is of the optimizer from the start.
        parameter.requires_grad_(config.train.unfreeze_at_step is not None)
    plain = config.train.nonfinite != "skip" and config.train.dtype != "fp16"
    optimizer = optimizer_of(task, model, read, closures=plain and strategy.takes_closures)
    scale = peak_scale(config.optimizer, config.train.batch_size)
    for group in optimizer.param_groups:
        group["lr"] *= scale
    for parameter in frozen:
        parameter.requires_grad_(False)
    loader = Loader(
        splits["train"],
        config.train.batch_size,
        world=world,
        seed=config.seed,
        shuffle=config.data.order,
        transform=_transform(config, task, training=True),
        workers=config.data.workers,
        worker_kind=config.data.worker_kind,
        timeout_seconds=config.timeout_seconds,
        drop_last=config.data.drop_last,
        least_part=_least_part(config, model),
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    state = TrainState(model, optimizer, loader, frozen=frozen)
    state.schedule = _scheduling(config, task, optimizer, loader, strategy, validation)
    if config.train.ema_decay is not None:
        state.ema = averaged(model, config.train.ema_decay)
    state.check()
    return Setup(
        splits,
        state,
        validation,
        peaks,
        [*warnings_of(task), *read.unread(task), *_unread_schedule(config, task, state)],
    )


def join_world(task: Task, strategy: Strategy) -> None:
    """Give a task the world, to gather from all ranks where they come to that together.

    Args:
        task: The user's side.
        strategy: Connected.
    """
    task.world = strategy.world
    refused = None
    if not strategy.agreement.in_step:
        why = f"with strategy '{strategy.name}' no rank waits for others"
        refused = why, "use --strategy horovod."
    elif not task.gathers:
        why = f"task {type(task).__name__} does not say that it gathers"
        refused = why, "write `gathers = True` in the class: then ranks without samples come, too."
    task.world.no_gathers = refused


def _check_together(config: RunConfig, task: Task, strategy: Strategy) -> None:
    if weighs(task) and strategy.agreement is Agreement.ON_SERVERS:
        raise Error(
            f"weight() of task {type(task).__name__} cannot be used with strategy "
            f"'{strategy.name}': no rank knows what the others' samples count for.",
            hint="use --strategy horovod.",
        )
    if strategy.averages_gradients and strategy.agreement is Agreement.ALWAYS:
        return
    refused = f"cannot be used with strategy '{strategy.name}'"
    for key, value, instead in (("nonfinite", "skip", "stop or allow"), ("dtype", "fp16", "bf16")):
        if getattr(config.train, key) == value:
            raise Error(
                f"train.{key}={value} {refused}: no rank knows the world's gradient before it is "
                "used.",
                hint=f"use {instead}, or --strategy horovod.",
            )
    if config.train.sync_batchnorm:
        raise Error(
            f"train.sync_batchnorm {refused}.",
            hint="use --strategy horovod.",
        )


def _check_tables(config: RunConfig, model: nn.Module, strategy: Strategy) -> None:
    for table in tables_of(model):
        if not strategy.holds_tables:
            raise no_tables(f"strategy '{strategy.name}'", table.spec.name)
        if config.train.dtype == "fp16":
            raise Error(
                f"train.dtype=fp16 is not for models with embedding tables, such as "
                f"'{table.spec.name}': gradients of rows are not scaled.",
                hint="use bf16.",
            )
        if config.train.ema_decay is not None:
            raise Error(
                f"train.ema_decay is not for models with embedding tables, such as "
                f"'{table.spec.name}': there is no average of rows.",
                hint="leave it unset.",
            )


def _validation(config: RunConfig, task: Task, splits: Mapping[str, Source]) -> Loader | None:
    samples = splits.get("validation")
    if samples is None:
        for key in ("patience", "validate_every_steps"):
            if getattr(config.train, key) is not None:
                raise Error(
                    f"train.{key} is set, but task {type(task).__name__} has no "
                    "validation samples.",
                    hint="have data() give a split 'validation', or leave it unset.",
                )
        return None
    return Loader(
        samples,
        config.train.batch_size,
        world=World(ALONE),
        shuffle="none",
        transform=_transform(config, task, training=False),
        workers=config.data.workers,
        worker_kind=config.data.worker_kind,
        timeout_seconds=config.timeout_seconds,
    )


def _to_freeze(config: RunConfig, model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a configuration freezes, for the run or at its start."""
    train = config.train
    if train.unfreeze_at_step is not None and not train.freeze:
        raise Error(
            "train.unfreeze_at_step is set, but nothing is frozen.",
            hint='say what is: train.freeze = ["backbone.*"].',
        )
    return list(matching(model, train.freeze, "train.freeze").values())


def _unread_schedule(config: RunConfig, task: Task, state: TrainState) -> list[str]:
    """Say that the task's own scheduler counts, where another was named for this run."""
    name = config.schedule.name
    kind = type(state.schedule.scheduler).__name__ if state.schedule is not None else name
    if kind == name or "name" not in config.schedule.model_fields_set:
        return []
    if task.defaults.get("schedule.name") == name or ":" in name:
        return []
    return [f"schedule.name = {name} changes nothing: schedule() of this task gives a {kind}."]


def _scheduling(
    config: RunConfig,
    task: Task,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    strategy: Strategy,
    validation: Loader | None,
) -> Scheduling | None:
    """Return the torch scheduler that gives the learning rate, or None.

    Raises:
        Error: It wants a metric that is not measured, or that not every rank knows.
    """
    schedule, train = config.schedule, config.train
    made: dict[str, Any] = {}
    warmup = schedule.warmup_steps or round(schedule.warmup_epochs * len(loader))
    scheduler = schedule_of(task, optimizer)
    if scheduler is not None:
        warmup = 0
    elif schedule.name in OWN_SCHEDULES:
        return None
    else:
        steps = train.steps or train.epochs * len(loader)
        count = -(-steps // len(loader)) if schedule.every == "epoch" else steps - warmup
        scheduler, made = scheduler_of(schedule, optimizer, max(1, count), task.mode)
    scheduling = Scheduling(scheduler, made, schedule.every, warmup)
    if scheduling.by_metric and validation is None:
        raise Error(
            f"scheduler {type(scheduler).__name__} goes by the monitored metric, but task "
            f"{type(task).__name__} has no validation samples.",
            hint="have data() give a split 'validation', or choose another schedule.name.",
        )
    if scheduling.by_metric and not strategy.agreement.in_step:
        raise Error(
            f"scheduler {type(scheduler).__name__} goes by the monitored metric, which with "
            f"strategy '{strategy.name}' rank 0 alone knows.",
            hint="choose another schedule.name, --consistency sync, or --strategy horovod.",
        )
    return scheduling


def _least_part(config: RunConfig, model: nn.Module) -> int:
    """Return the fewest samples a pass may have: 2 where there is BatchNorm, else 1."""
    return 1 if config.train.sync_batchnorm or not has_batchnorm(model) else 2


def _transform(config: RunConfig, task: Task, *, training: bool) -> TaskTransform:
    return TaskTransform(task, training, config.task, config.options, config.seed)
