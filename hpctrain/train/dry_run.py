"""One batch through all of a training, to see whether it would work; nothing is written."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpctrain.config import RunConfig
from hpctrain.data.batch import Batch
from hpctrain.errors import Error
from hpctrain.strategies.base import DistributedOptimizer
from hpctrain.strategies.single import Single
from hpctrain.tasks.seeds import set_start_seeds
from hpctrain.tasks.task import Task, load_task, make_task
from hpctrain.train.initial_weights import initialize
from hpctrain.train.model_setup import UnusedParameters, begin_training, evaluating
from hpctrain.train.run_metrics import rates_of
from hpctrain.train.set_metrics import SetMetrics
from hpctrain.train.setup import Setup, join_world, set_up
from hpctrain.train.step import TrainStep
from hpctrain.train.step_timer import StepTimer
from hpctrain.world.communicator import Alone
from hpctrain.world.world import init

STEPS = 4
"""Of which the first is not timed: it makes what later ones use again."""

SECONDS = 20.0
"""After which no further step is taken for the sake of timing."""


def dry_run(config: RunConfig, say: Callable[[str], None]) -> None:
    """Take a batch through data, transform, model, loss, backward, update and validation.

    Whatever the run's strategy, it is done by this process alone. Where ``world_size`` is set, the
    batch is what one of so many ranks has of it.

    Args:
        config: Resolved.
        say: Told what was found, line by line.

    Raises:
        Error: Something of it failed; which, and where in the task's file.
    """
    world = init()
    if world.size > 1:
        raise Error(
            f"a dry run on a world of {world.size} ranks.",
            hint="start one process, without mpirun; world_size=N takes one of N ranks' part.",
        )
    train = config.train
    part = -(-train.batch_size // (config.world_size or 1))
    config = config.model_copy(
        update={
            "strategy": "single",
            "train": train.model_copy(update={"batch_size": part}),
            "data": config.data.model_copy(update={"stage_dir": None}),  # as nothing is staged
        }
    )
    kind = load_task(config.task, config.seed)
    set_start_seeds(config.seed)
    task = make_task(kind, config.options)
    rehearsal = _Rehearsal(config, task, Single(world), say)
    try:
        rehearsal.take_place()
    finally:
        rehearsal.close()
    say("dry run: all of this works; nothing was written.")


class _Rehearsal:
    """What a dry run does, one thing after the other."""

    def __init__(
        self, config: RunConfig, task: Task, how: Single, say: Callable[[str], None]
    ) -> None:
        self._config = config
        self._task = task
        self._how = how
        self._say = say
        join_world(task, how)
        with self._part("task"):
            self._setup: Setup = set_up(config, task, how)
        self._state = self._setup.state
        self._step = TrainStep(
            config, task, how, self._state, self._setup.peaks, StepTimer(how.world.device)
        )

    def take_place(self) -> None:
        """Run all parts of the rehearsal, and tell what each finds."""
        say, state, config = self._say, self._state, self._config
        for warning in self._setup.warnings:
            say(f"warning: {warning}")
        for name, source in self._setup.splits.items():
            say(f"split '{name}': {len(source)} samples")
        with self._part("data() and transform()"):
            batch = next(iter(state.loader))
        say(f"batch of {batch.samples}: {_fields(batch)}")
        if config.init.source is not None:
            initialize(state.model, config.init, say)
        say(f"model: {_parameters(state.model)}")
        optimizer = self._how.wrap(state.model, state.optimizer, clip_norm=config.train.clip_norm)
        rates = ", ".join(f"{name} {rate:g}" for name, rate in rates_of(optimizer).items())
        schedule = config.schedule.name
        if state.schedule is not None:
            schedule = type(state.schedule.scheduler).__name__
        say(f"optimizer: {type(state.optimizer).__name__}, {rates}; schedule: {schedule}")
        begin_training(state.model)
        unused = UnusedParameters(state.model)
        with self._part("a training step"):
            seconds = self._train(optimizer, batch)
        if warning := unused.warning(None):
            say(f"warning: {warning}")
        if self._setup.validation is not None:
            with self._part("validation"):
                self._validate()
        self._tell_costs(seconds)

    def _train(self, optimizer: DistributedOptimizer, batch: Batch) -> float:
        """Take steps with the same batch; the seconds of one."""
        times: list[float] = []
        device = self._how.world.device
        while len(times) < STEPS and (len(times) < 2 or sum(times) < SECONDS):
            began = time.perf_counter()
            self._step.take(optimizer, batch)
            self._step.count(batch)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
            if len(times) == 1:
                means = self._step.computed[0][0]
                self._say(f"step: {_means(means)}")
                if not math.isfinite(float(means["loss"])):
                    self._say("warning: the loss is no number: with train.nonfinite=stop, the run "
                              "would end at its first log line.")  # fmt: skip
        return min(times[1:])

    def _validate(self) -> None:
        """Measure on the first batch."""
        state, task, loader = self._state, self._task, self._setup.validation
        assert loader is not None
        of_set = SetMetrics(task, self._how.world.device, self._config.train.dtype)
        of_set.reset()
        model: nn.Module = state.model if state.ema is None else state.ema
        with evaluating(model), torch.no_grad(), contextlib.closing(loader):
            batch = next(iter(loader))
            means = {
                name: float(value)
                for name, value in self._step.loss(model, batch, training=False)[1].items()
            }
            of_set.add(model, batch)
            of_set.gather(Alone())
        try:
            means = of_set.join(means)
        except Error:
            raise
        except Exception as error:  # such as of an AUC, where one batch has samples of one class
            self._say(f"warning: metrics() of one batch: {type(error).__name__}: {error}")
            means.setdefault(task.monitor, math.nan)
        state.counters.judge({f"val_{name}": value for name, value in means.items()}, task, None)
        self._say(f"validation of {batch.samples}: {_means(means)}")

    def _tell_costs(self, seconds: float) -> None:
        state, train = self._state, self._config.train
        model = [*state.model.parameters(), *state.model.buffers()]
        optimizer = [
            value
            for values in state.optimizer.state.values()
            for value in values.values()
            if isinstance(value, torch.Tensor)
        ]
        ema = list(state.ema.parameters()) if state.ema is not None else []
        gradients = [p for p in model if p.requires_grad]
        parts: dict[str, list[Any]] = {
            "model": model, "gradients": gradients, "optimizer": optimizer, "average": ema,
        }  # fmt: skip
        sizes = ", ".join(f"{name} {_size(_bytes(each))}" for name, each in parts.items() if each)
        say = self._say
        say(f"memory: {sizes}; {_peak(self._how.world.device)}")
        say(f"checkpoint: about {_size(_bytes(model) + _bytes(optimizer) + _bytes(ema))}")
        steps = train.steps or train.epochs * len(state.loader)
        say(
            f"time: {1e3 * seconds:.3g} ms a step; {steps} steps take about "
            f"{_duration(steps * seconds)}, without validation and waits for data"
        )

    def close(self) -> None:
        """End what works in the background."""
        for loader in (self._state.loader, self._setup.validation):
            if loader is not None:
                loader.close()

    @contextlib.contextmanager
    def _part(self, what: str) -> Iterator[None]:
        """Turn a failure within this part into one line, with its place in the task's file."""
        try:
            yield
        except Error:
            raise
        except Exception as error:
            raise Error(
                f"{what} of task {type(self._task).__name__} failed: {type(error).__name__}: "
                f"{error}{_place(error, type(self._task))}.",
                hint="without --dry-run the whole traceback is shown.",
            ) from error


def _place(error: BaseException, kind: type) -> str:
    """Return the last line of the task's own file that an error came through, if any."""
    module = traceback.extract_tb(error.__traceback__)
    own = getattr(sys.modules.get(kind.__module__), "__file__", None)
    lines = [frame for frame in module if frame.filename == own]
    return f", line {lines[-1].lineno} of {Path(lines[-1].filename).name}" if lines else ""


def _fields(batch: Batch) -> str:
    return ", ".join(
        f"{name} {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        for name, value in batch.items()
    )


def _parameters(model: nn.Module) -> str:
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    count = sum(p.numel() for p in parameters)
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    return (
        f"{count:,} parameters of {', '.join(kinds)} in {len(parameters)} tensors, "
        f"{trained:,} of them trained"
    )


def _means(means: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {float(value):.5g}" for name, value in means.items())


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def _peak(device: torch.device) -> str:
    """Return the peak memory so far: of the GPU, where there is one; else of this process."""
    if device.type == "cuda":
        return f"at most {_size(torch.cuda.max_memory_allocated(device))} of the GPU's"
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"this process had at most {_size(1024 * kilobytes)}"
