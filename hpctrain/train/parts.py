"""The parts of a training loop, made and given to each other."""

from __future__ import annotations

from typing import NamedTuple

from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.config import RunConfig
from hpctrain.strategies.base import Strategy
from hpctrain.tasks.callbacks.base import callbacks_of
from hpctrain.tasks.task import Task
from hpctrain.train.after_step import AfterStep
from hpctrain.train.callbacks import Callbacks, RunView
from hpctrain.train.checkpointing import Checkpointing
from hpctrain.train.evaluation import Evaluation
from hpctrain.train.extent import Extent
from hpctrain.train.membership_log import MembershipLog
from hpctrain.train.nonfinite import Health
from hpctrain.train.rejoin import Rejoin
from hpctrain.train.run_end import RunEnd
from hpctrain.train.run_metrics import RunMetrics
from hpctrain.train.setup import Setup
from hpctrain.train.step import TrainStep
from hpctrain.train.step_timer import StepTimer


class Parts(NamedTuple):
    """What a training loop consists of.

    Attributes:
        extent: How long the run is.
        timer: Where the time of a step goes.
        step: Takes steps.
        metrics: Of the run.
        checkpointing: Saves, and restores.
        changes: Who was lost, and who joined.
        rejoin: Brings the ranks of a new world to the same state.
        after_step: Does what is due after a step.
        end: Brings ranks together after their last steps.
        callbacks: Are told of a run's events.
    """

    extent: Extent
    timer: StepTimer
    step: TrainStep
    metrics: RunMetrics
    checkpointing: Checkpointing
    changes: MembershipLog
    rejoin: Rejoin
    after_step: AfterStep
    end: RunEnd
    callbacks: Callbacks


def make_parts(
    config: RunConfig, task: Task, strategy: Strategy, store: CheckpointStore, setup: Setup
) -> Parts:
    """Make the parts of a training loop.

    Args:
        config: Resolved.
        task: The user's side.
        strategy: Connected.
        store: Where checkpoints go.
        setup: What is trained.
    """
    state = setup.state
    extent = Extent(config.train, strategy, state)
    timer = StepTimer(strategy.world.device)
    step = TrainStep(config, task, strategy, state, setup.peaks, timer)
    view = RunView(config, task, strategy, setup, extent, store.folder.parent)
    callbacks = Callbacks(callbacks_of(task, config), view)
    health = Health(state.model, lambda: state.counters, config.train.nonfinite)
    metrics = RunMetrics(strategy, state, timer)
    evaluation = Evaluation(
        config, task, strategy, state, setup.validation, step, metrics, callbacks
    )
    checkpointing = Checkpointing(strategy, state, store, metrics, health, callbacks)
    changes = MembershipLog(strategy.world)
    rejoin = Rejoin(strategy, state, checkpointing, callbacks)
    after_step = AfterStep(
        config,
        strategy,
        state,
        extent,
        health,
        metrics,
        evaluation,
        checkpointing,
        changes,
        rejoin,
        callbacks,
    )
    end = RunEnd(strategy, state, extent, health, checkpointing, after_step, callbacks)
    return Parts(
        extent, timer, step, metrics, checkpointing, changes, rejoin, after_step, end, callbacks
    )
