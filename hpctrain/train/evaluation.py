"""Validation: metrics of the validation samples, each taken once, of the model that ranks mean."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from hpctrain.config import RunConfig
from hpctrain.data.batch import Batch
from hpctrain.data.loader import Loader
from hpctrain.strategies.base import Agreement, DistributedOptimizer, Strategy, having
from hpctrain.tasks.checks import no_means
from hpctrain.tasks.task import Task
from hpctrain.train.callbacks import Callbacks
from hpctrain.train.model_setup import evaluating
from hpctrain.train.recorder import Recorder
from hpctrain.train.run_metrics import RunMetrics
from hpctrain.train.set_metrics import SetMetrics
from hpctrain.train.state import TrainState
from hpctrain.train.step import TrainStep, jointly
from hpctrain.world.agreement import check_tensors
from hpctrain.world.world import Alone, Even


class Evaluation:
    """Measures the model on the validation samples, and judges whether it is the best so far.

    Args:
        config: Resolved.
        task: Says which metric counts.
        strategy: Connected.
        state: What is trained.
        loader: Of the validation samples; None: there are none.
        step: Gives the loss of a batch.
        metrics: Of the run.
        callbacks: Are told.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        strategy: Strategy,
        state: TrainState,
        loader: Loader | None,
        step: TrainStep,
        metrics: RunMetrics,
        callbacks: Callbacks,
    ) -> None:
        self._config = config
        self._task = task
        self._strategy = strategy
        self._state = state
        self._loader = loader
        self._step = step
        self._metrics = metrics
        self._callbacks = callbacks
        self._of_set = SetMetrics(task, strategy.world.device, config.train.dtype)

    @property
    def takes_part(self) -> bool:
        """Whether this rank validates: all do together, or where nobody waits, rank 0 alone."""
        together = self._strategy.agreement.in_step
        return self._loader is not None and (together or self._strategy.world.leads)

    def _parts(self, batch: Batch) -> list[Batch]:
        parts = self._config.train.accumulate
        if self._strategy.joint_passes:
            return jointly(batch, parts)
        return list(batch.split(parts, empty=self._task.gathers))

    def validate(
        self,
        optimizer: DistributedOptimizer,
        recorder: Recorder,
        prepare: Callable[[], None],
    ) -> bool:
        """Measure on the validation samples, each once; True where it is the best so far.

        Args:
            optimizer: The wrapped one.
            recorder: Takes the metrics.
            prepare: Makes buffers the world's; called before.
        """
        if not self.takes_part:
            return False
        prepare()
        model = self._state.model if self._state.ema is None else self._state.ema
        parameters = agreed_parameters(self._strategy, optimizer, self._state)
        with evaluating(model), torch.no_grad(), having(parameters):
            metrics = self._measure(optimizer, model, recorder)
            improved = self._judge(metrics, recorder)
            self._callbacks.tell("on_validation", model)
        if self._state.counters.stopped_early and not self._strategy.agreement.in_step:
            self._strategy.world.comm.stop()
        return improved

    def _measure(
        self, optimizer: DistributedOptimizer, model: torch.nn.Module, recorder: Recorder
    ) -> dict[str, float]:
        """Return the metrics of the whole set, by name, over all ranks that take part."""
        loader, meter = self._loader, self._metrics.validation
        assert loader is not None
        world, counters = self._strategy.world, self._state.counters
        in_step = self._strategy.agreement.in_step
        comm = world.comm if in_step else Alone()
        loader.world.comm = Even(comm, world.rank, world.size) if in_step else Alone()
        loader.epoch = loader.cursor = 0
        meter.clear()
        self._of_set.reset()
        for batch in loader:
            for part in self._parts(batch):
                for computed in optimizer.evaluate(self._step, model, part):
                    meter.add(computed.means, computed.weight)
                self._of_set.add(model, part)
            self._of_set.gather(comm)
        known = self._metrics.names
        metrics = meter.read(comm)
        if self._metrics.names != known:
            self._metrics.remember()
        warning = no_means(metrics) if counters.best is None else ""
        metrics = self._of_set.join(metrics)
        recorder.write("validation", counters.step, metrics)
        if warning:
            recorder.say(f"warning: {warning}")
        return metrics

    def _judge(self, metrics: dict[str, float], recorder: Recorder) -> bool:
        """Whether they are the best so far; the run may end early by them."""
        counters, patience = self._state.counters, self._config.train.patience
        for name, value in metrics.items():
            if not math.isfinite(value):
                recorder.say(f"warning: step {counters.step}: val_{name} is {value}.")
        named = {f"val_{name}": value for name, value in metrics.items()}
        counters.metrics |= named
        before = counters.stopped_early
        improved = counters.judge(named, self._task, patience)
        if counters.stopped_early and not before and counters.best is not None:
            recorder.say(
                f"stopped early at step {counters.step}: no better {self._task.monitor} in "
                f"{patience} validations; the best is of step {counters.best['step']}"
            )
        if self._state.schedule is not None:
            self._state.schedule.validated(metrics[self._task.monitor], counters.step)
        return improved


def agreed_parameters(
    strategy: Strategy, optimizer: DistributedOptimizer, state: TrainState
) -> dict[torch.nn.Parameter, torch.Tensor] | None:
    """Return what "the model" means, where ranks differ; None: what each rank has.

    Args:
        strategy: Says whether they may differ.
        optimizer: The wrapped one.
        state: What is trained.

    Raises:
        Error: Ranks that are to mean the same parameters do not.
    """
    if strategy.agreement is Agreement.ALWAYS:
        return None
    parameters = optimizer.world_parameters()
    if strategy.agreement is Agreement.AT_ROUNDS:
        check_agreed(strategy, state, parameters)
    return parameters


def check_agreed(
    strategy: Strategy,
    state: TrainState,
    parameters: dict[torch.nn.Parameter, torch.Tensor] | None = None,
) -> None:
    """Refuse ranks that say they agree on parameters, and do not; every rank calls this.

    Args:
        strategy: Whose promise it is.
        state: What is trained.
        parameters: What "the model" means; None: what each rank has.

    Raises:
        Error: The first parameter that differs.
    """
    if strategy.agreement is Agreement.ALWAYS:
        strategy.check_parameters(state.model)
        return
    named = state.model.named_parameters()
    given = parameters or {}
    check_tensors(
        strategy.world.comm,
        [(name, given.get(parameter, parameter)) for name, parameter in named],
        hint=f"world_parameters() and finish() of strategy '{strategy.name}' must give every "
        "rank the same bits.",
    )
