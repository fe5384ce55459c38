"""The learning rate as a pure function of the step, so that no scheduler state needs saving."""

from __future__ import annotations

import math

from hpctrain.config import OptimizerConfig, ScheduleConfig


def peak_scale(config: OptimizerConfig, batch_size: int) -> float:
    """Return by what the peak learning rate is multiplied for the global batch: linear scaling.

    Goyal et al., "Accurate, large minibatch SGD", 2017.

    Args:
        config: Its ``lr_batch_size`` is the batch that the rate was chosen for; None: any.
        batch_size: The global batch, in samples.

    Example:
        >>> peak_scale(OptimizerConfig(lr_batch_size=256), 1024)
        4.0
    """
    return batch_size / config.lr_batch_size if config.lr_batch_size else 1.0


def factor(config: ScheduleConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step, as a fraction of the peak.

    Args:
        config: Shape and warm-up.
        step: The step to come, counted from 0.
        steps: Of the whole run.
        steps_per_epoch: For a warm-up given in epochs.

    Example:
        >>> config = ScheduleConfig(name="linear", warmup_steps=2)
        >>> [factor(config, step, steps=4, steps_per_epoch=1) for step in range(5)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = config.warmup_steps or round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant" or steps <= warmup:
        return 1.0
    done = min(1.0, (step - warmup) / (steps - warmup))
    fall = (1 - done) if config.name == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.final + (1 - config.final) * fall
