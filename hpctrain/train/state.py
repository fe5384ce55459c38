"""The train state: everything that a run needs to go on as if it had never stopped."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hpctrain.checkpoint import state_tree
from hpctrain.checkpoint.tensor_file import DTYPES
from hpctrain.data.loader import Loader
from hpctrain.errors import Error, nearest
from hpctrain.tasks.task import Task
from hpctrain.train.scheduling import Scheduling


@dataclass
class Counters:
    """The plain values of a train state.

    Attributes:
        step: Optimizer steps done.
        samples: Samples they consumed, over all ranks.
        best: The best validation so far: ``step`` and ``metrics``; None before the first.
        validations_since_best: For early stopping.
        stopped_early: Whether that has happened.
        metrics: The last train and validation metrics.
        world: Sizes the world has had: ``step``, ``size`` and ``reason`` of each change.
        nonfinite_losses: Losses that were no numbers, each rank's counting by itself.
        skipped_steps: Steps left out because their gradient was not finite.
        loss_scale: With ``fp16``, what the next step's loss is multiplied by; 0: nothing yet.
        good_steps: Steps in a row with that scale, and a finite gradient.
    """

    step: int = 0
    samples: int = 0
    best: dict[str, Any] | None = None
    validations_since_best: int = 0
    stopped_early: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    world: list[dict[str, Any]] = field(default_factory=list)
    nonfinite_losses: int = 0
    skipped_steps: int = 0
    loss_scale: float = 0.0
    good_steps: int = 0

    def judge(self, metrics: dict[str, float], task: Task, patience: int | None) -> bool:
        """Compare a validation with the best so far; whether it is better.

        Args:
            metrics: Of the validation, the same on every rank, so that all decide alike.
            task: Says which one counts, and whether more of it is better.
            patience: Validations without a better one after which to stop early.

        Raises:
            Error: The task monitors what it does not give.
        """
        monitored = f"val_{task.monitor}"
        if monitored not in metrics:
            raise Error(
                f"task {type(task).__name__} monitors '{task.monitor}', which neither its loss() "
                f"nor its metrics() gives.",
                hint=nearest(task.monitor, [name.removeprefix("val_") for name in metrics]),
            )
        sign = 1 if task.mode == "max" else -1
        value = metrics[monitored]
        before = self.best["metrics"][monitored] if self.best else -sign * math.inf
        if sign * value > sign * before:
            self.best = {"step": self.step, "metrics": metrics}
            self.validations_since_best = 0
            return True
        self.validations_since_best += 1
        self.stopped_early = patience is not None and self.validations_since_best >= patience
        return False


@dataclass
class TrainState:
    """Model, optimizer, averaged weights, place in the data, and counters, as one object.

    Two things that others keep are not here, because they are functions of what is: the learning
    rate (of the step, where no scheduler of torch gives it), and the random generators (seeded anew
    from seed, step and rank).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    ema: AveragedModel | None = None
    counters: Counters = field(default_factory=Counters)
    schedule: Scheduling | None = None
    frozen: list[nn.Parameter] = field(default_factory=list)

    def unfreeze(self) -> None:
        """Train what was frozen, from the next step on."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.frozen = []

    def state_dict(self) -> dict[str, Any]:
        """Return the state as a tree of tensors (the live ones, not copies) and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "loader": self.loader.state_dict(),
            "counters": asdict(self.counters),
            "schedule": self.schedule.state_dict() if self.schedule is not None else None,
        }

    def tensors(self) -> dict[str, Any]:
        """Return the part of the state's tree that a checkpoint may be read into in place."""
        modules = {"model": self.model, "ema": self.ema}
        return {
            key: {
                name: value
                for name, value in module.state_dict().items()
                if isinstance(value, torch.Tensor) and value.dtype in DTYPES
                if value.layout == torch.strided and not value.is_quantized
            }
            for key, module in modules.items()
            if module is not None
            and not any(nn.parameter.is_lazy(tensor) for tensor in module.parameters())
        }

    def check(self) -> None:
        """Try whether a checkpoint can hold the state, before training has cost anything.

        Raises:
            Error: It has something that no file can hold; its place is named.
        """
        if not any(nn.parameter.is_lazy(p) for p in self.model.parameters()):
            state_tree.split(self.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Raises:
            Error: It is of another model, optimizer or data.
        """
        try:
            self.loader.load_state_dict(state["loader"])
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None and state["ema"] is not None:
                self.ema.load_state_dict(state["ema"])
            self.counters = Counters(**state["counters"])
            if self.schedule is not None:
                self.schedule.load_state_dict(state.get("schedule"))
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise Error(
                f"the checkpoint is of another model or optimizer: {error}.",
                hint="resume with the task, options and optimizer the run was started with.",
            ) from error


def parameters_sha256(
    model: nn.Module, values: Mapping[nn.Parameter, torch.Tensor] | None = None
) -> str:
    """Hash the names, types, shapes and bytes of all parameters, in the model's order.

    Args:
        model: Whose they are.
        values: What they are, where the model does not have it.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        value = (values or {}).get(parameter, parameter)
        tensor = value.detach().cpu().resolve_conj().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
