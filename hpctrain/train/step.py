"""A training step: forward and backward passes over this rank's samples, and the update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hpctrain.config import RunConfig
from hpctrain.data.batch import Batch
from hpctrain.errors import Error
from hpctrain.mesh.passes import Computed
from hpctrain.optim.schedule import factor
from hpctrain.strategies.base import Agreement, DistributedOptimizer, Strategy
from hpctrain.tasks.checks import checked_loss, checked_weight, weighs
from hpctrain.tasks.seeds import set_seeds
from hpctrain.tasks.task import Task
from hpctrain.train import loss_scale
from hpctrain.train.nonfinite import HINT, all_finite
from hpctrain.train.sample_trace import SampleTrace
from hpctrain.train.state import TrainState
from hpctrain.train.step_timer import StepTimer

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bf16": torch.float32,
    "fp16": torch.float32,
}
"""Of samples."""

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What is computed with where it suits."""

SKIPPED_IN_A_ROW = 100
"""Steps left out one after the other, because their gradients are not finite, that end a run."""


def applied(
    method: Callable[[nn.Module, Batch], Any],
    model: nn.Module,
    batch: Batch,
    device: torch.device,
    dtype: str,
) -> Any:
    """Return what a task's method gives of a batch, in the run's arithmetic.

    Args:
        method: ``loss`` or ``predictions``.
        model: On the device.
        batch: On the CPU.
        device: This rank's.
        dtype: ``float32``, ``float64``, ``bf16`` or ``fp16``.
    """
    with arithmetic(device, dtype):
        return method(model, batch.to(device, DTYPES[dtype]))


def arithmetic(device: torch.device, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which layers compute in the run's arithmetic (autocast).

    Args:
        device: This rank's.
        dtype: ``float32``, ``float64``, ``bf16`` or ``fp16``.
    """
    return torch.autocast(device.type, AUTOCAST.get(dtype), enabled=dtype in AUTOCAST)


def jointly(batch: Batch, parts: int) -> list[Batch]:
    """Split a rank's samples into nearly equal micro-batches, as many on every rank.

    None is empty unless this rank has no samples.

    Args:
        batch: This rank's part of a global batch.
        parts: How many there are, unless a rank has fewer samples.
    """
    return list(batch.split(max(1, min(parts, batch.least)), empty=True))


class TrainStep:
    """Takes the steps of a run.

    Args:
        config: Resolved.
        task: Gives the loss.
        strategy: Connected.
        state: What is trained.
        peaks: Of each parameter group, the learning rate that the schedule multiplies.
        timer: Told where a step's time goes.

    Attributes:
        computed: By the passes of the step under way.
        trace: Of the samples, where that is asked for.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        strategy: Strategy,
        state: TrainState,
        peaks: list[float],
        timer: StepTimer,
    ) -> None:
        self._config = config
        self._task = task
        self._strategy = strategy
        self._state = state
        self._peaks = peaks
        self._timer = timer
        self._weighs = weighs(task)
        self._scales = config.train.dtype == "fp16"
        self._skipped_in_a_row = 0
        self.computed: list[Computed] = []
        self.trace: SampleTrace | None = None

    def take(self, optimizer: DistributedOptimizer, batch: Batch) -> None:
        """Take a step: the parameters are updated by a global batch's gradient.

        Args:
            optimizer: The wrapped one.
            batch: This rank's samples, maybe none.

        Raises:
            PeerLost: Another rank is gone.
            Error: The task's loss is none, or too many steps had to be left out.
        """
        counters, world = self._state.counters, self._strategy.world
        set_seeds(self._config.seed, counters.step, world.rank)
        self._set_rates(optimizer, batch)
        thaw = self._config.train.unfreeze_at_step
        if thaw is not None and counters.step >= thaw:
            self._state.unfreeze()
        if self._scales:
            self._begin_scaled(optimizer)
        optimizer.zero_grad()
        self.computed = []
        if self.trace is not None:
            self.trace.begin(counters.step + 1, self._world()[0], self._state.loader.epoch, batch)
        if optimizer.needs_closure:
            optimizer.step(lambda: self._evaluate(optimizer, batch))
            self._average()
            return
        self._forward_backward(optimizer, batch)
        self._timer.lap("compute")
        if not self._usable(optimizer):
            self._leave_out(optimizer)
        else:
            self._skipped_in_a_row = 0
            # A rank without samples steps too: the others wait for its zeros.
            optimizer.step()
            self._average()

    def _average(self) -> None:
        """Have the averaged weights follow, where there are some."""
        if self._state.ema is not None:
            self._state.ema.update_parameters(self._state.model)

    def _evaluate(self, optimizer: DistributedOptimizer, batch: Batch) -> float:
        """Return a batch's loss anew, and leave its gradient; with the same random numbers.

        What a step computes is its first evaluation, before parameters have changed.
        """
        set_seeds(self._config.seed, self._state.counters.step, self._strategy.world.rank)
        first, self.computed = self.computed, []
        optimizer.zero_grad()
        self._forward_backward(optimizer, batch)
        parts, self.computed = self.computed, first or self.computed
        whole = sum(part.weight for part in parts)
        return sum(float(part.means["loss"]) * part.weight for part in parts) / whole

    def _forward_backward(self, optimizer: DistributedOptimizer, batch: Batch) -> None:
        parts, counters = self._parts(batch), self._state.counters
        scale = counters.loss_scale if self._scales else 1.0
        factors = self._factors(optimizer, batch, parts)
        for number, (part, share) in enumerate(zip(parts, factors, strict=True), start=1):
            with contextlib.nullcontext() if number == len(parts) else optimizer.no_sync():
                self.computed += optimizer.forward_backward(
                    self, self._state.model, part, share * scale
                )

    def weight(self, batch: Batch) -> float:
        """Return what a batch counts for: its samples, or as the task says."""
        return checked_weight(self._task, batch) if self._weighs else float(batch.samples)

    def _factors(
        self, optimizer: DistributedOptimizer, batch: Batch, parts: list[Batch]
    ) -> list[float]:
        """Return what each pass' loss is multiplied by.

        The average over ranks of what the passes then add up to is the gradient of the mean over
        the global batch. Tells the optimizer what this rank's passes count for together.
        """
        optimizer.weight, optimizer.samples = batch.weight, batch.samples
        if not self._weighs:
            return [part.weight for part in parts]
        weights = [self.weight(part) for part in parts]
        mine = sum(weights)
        whole, rest = mine, batch.weight  # where ranks step by themselves
        if self._strategy.agreement is Agreement.ALWAYS:
            comm = self._strategy.world.comm
            total = torch.tensor([mine], dtype=torch.float64)
            comm.all_reduce(total)
            whole, rest = total.item(), float(comm.size)
            optimizer.weight = mine * rest / whole if whole else 0.0
        optimizer.samples = mine
        return [weight / whole * rest if whole else 0.0 for weight in weights]

    def count(self, batch: Batch) -> None:
        """Count a step in, after all ranks have taken it."""
        counters = self._state.counters
        counters.step += 1
        counters.samples += batch.global_samples
        if self.trace is not None:
            self.trace.end(counters.step, *self._world())

    def loss(
        self, model: nn.Module, batch: Batch, *, training: bool
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the task's loss of a batch, and means over its samples by name.

        Args:
            model: The one that is trained, or its average.
            batch: On the CPU.
            training: Whether the loss has to have a gradient.

        Raises:
            Error: The task gives something else.
        """
        device, dtype = self._strategy.world.device, self._config.train.dtype
        try:
            result = applied(self._task.loss, model, batch, device, dtype)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise Error(
                f"BatchNorm cannot take statistics of one sample: step "
                f"{self._state.counters.step + 1}, a batch of {batch.global_samples}.",
                hint="data.drop_last=true leaves an epoch's incomplete batch out; else use another "
                "batch size, fewer ranks or train.sync_batchnorm=true.",
            ) from error
        loss, means = checked_loss(self._task, result, training=training)
        return loss, {"loss": loss.detach(), **means}

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which layers compute in the run's arithmetic (autocast)."""
        return arithmetic(self._strategy.world.device, self._config.train.dtype)

    def _parts(self, batch: Batch) -> list[Batch]:
        """Split this rank's samples of a batch into micro-batches; the rank may have none."""
        passes = self._passes()
        if self._strategy.joint_passes:
            return jointly(batch, passes)
        if self._config.train.sync_batchnorm or self._task.gathers:  # all come to every exchange
            return list(batch.split(passes, empty=True))
        least = self._state.loader.least_part
        return list(batch.split(max(1, min(passes, batch.samples // least))))

    def _passes(self) -> int:
        """Return how many passes a rank takes its part of a batch in: more if the world shrank."""
        passes = self._config.train.accumulate
        if self._strategy.recovery is not None and self._config.elastic.batch == "keep-global":
            first = int(self._state.counters.world[0]["size"])
            passes *= -(-first // self._strategy.world.size)
        return passes

    def _begin_scaled(self, optimizer: DistributedOptimizer) -> None:
        if optimizer.carries_gradients:
            raise Error(
                "train.dtype=fp16 with compressed gradients that keep what they leave out: the "
                "scale of the loss would change under it.",
                hint="use train.dtype=bf16, or horovod.compression=fp16 or bf16.",
            )
        if not self._state.counters.loss_scale:
            self._state.counters.loss_scale = self._config.train.loss_scale

    def _usable(self, optimizer: DistributedOptimizer) -> bool:
        """Whether the world's gradient is to be used; it has its true size then."""
        if not self._scales and self._config.train.nonfinite != "skip":
            return True
        finite = self._gradients_are_finite(optimizer)
        counters = self._state.counters
        if self._scales:
            if finite:
                loss_scale.unscale(optimizer.gradients(self._state.model), counters.loss_scale)
            loss_scale.adjust(counters, finite=finite)
        return finite

    def _gradients_are_finite(self, optimizer: DistributedOptimizer) -> bool:
        """Whether the world's gradient is: the same on every rank; waits for the device."""
        optimizer.synchronize()
        gradients = optimizer.gradients(self._state.model)
        return optimizer.on_all_ranks(all_finite(gradients))

    def _leave_out(self, optimizer: DistributedOptimizer) -> None:
        """Let a step change nothing.

        Raises:
            Error: So many were left out one after the other that no more is to be hoped for.
        """
        counters = self._state.counters
        optimizer.zero_grad()
        self._timer.lap("update")
        counters.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise Error(
                f"step {counters.step + 1}: {self._skipped_in_a_row} steps in a row had a gradient "
                "that is not finite.",
                hint=HINT,
            )

    def _set_rates(self, optimizer: DistributedOptimizer, batch: Batch) -> None:
        """Give each parameter group its learning rate of a step."""
        train, loader = self._config.train, self._state.loader
        epoch_steps, scale = len(loader), 1.0
        if loader.batch_size == train.batch_size and train.steps is not None:
            step = self._state.counters.step
        elif loader.batch_size == train.batch_size:
            # Not by steps done: with another batch size, before a resume, there were others.
            step = loader.epoch * epoch_steps + batch.start // loader.batch_size
        else:
            # Batches have changed with the world: as far as the run is, with steps as at first.
            epoch_steps = -(-loader.samples // train.batch_size)
            step = round((loader.epoch + batch.start / loader.samples) * epoch_steps)
            scale = loader.batch_size / train.batch_size
        if self._state.schedule is not None:
            self._state.schedule.apply(step, loader.epoch, scale)
            first = optimizer.param_groups[0]["lr"]
            optimizer.rate_factor = first / self._peaks[0] if self._peaks[0] else 1.0
            return
        steps = train.steps or train.epochs * epoch_steps
        multiplier = factor(self._config.schedule, step, steps, epoch_steps) * scale
        for group, peak in zip(optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * multiplier
        optimizer.rate_factor = multiplier

    def _world(self) -> tuple[int, list[int]]:
        """Return how often the world was formed anew, and who is in it."""
        recovery = self._strategy.recovery
        if recovery is None:
            return 0, list(range(self._strategy.world.size))
        membership = recovery.membership
        return membership.generation, [member.number for member in membership.members]
