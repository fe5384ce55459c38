"""The knobs of periodic averaging, and the outer optimizer that they ask for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hpctrain.config import Section
from hpctrain.errors import Error
from hpctrain.strategies.outer_optimizers import Kind, OuterOptimizer


class AveragingConfig(Section):
    """Periodic averaging of parameters."""

    every: int = Field(20, ge=1, description="Steps of a round, at whose end ranks agree.")
    start: int = Field(
        0,
        ge=0,
        description="Steps before the first round, whose gradients are averaged (post-local).",
    )
    outer: Kind = Field(
        "mean",
        description="What the mean of a round does: `mean`, parameters become it; `nesterov` "
        "(DiLoCo), `slowmo`, `bmuf`: a step with momentum towards it; `easgd`: ranks and a centre "
        "draw each other.",
    )
    outer_lr: float | None = Field(
        None, gt=0, description="Of that step. Unset: 0.7 with nesterov, 1 with slowmo and bmuf."
    )
    outer_momentum: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Of that step. Unset: 0.9 with nesterov, 0.5 with slowmo, 1 - 1/ranks with "
        "bmuf.",
    )
    alpha: float | None = Field(
        None,
        gt=0,
        le=1,
        description="With easgd, how far a rank is drawn to the centre. Unset: 0.9/ranks.",
    )
    fragments: int = Field(
        1,
        ge=1,
        description="Parts of the parameters, each with rounds of its own, which end one after the "
        "other (streaming DiLoCo).",
    )
    delay: int = Field(
        0, ge=0, description="Steps that are taken while a round's exchange is under way."
    )
    mixing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="What a rank keeps of its own parameters at the end of a round.",
    )
    state: Literal["mean", "local"] = Field(
        "mean",
        description="Of the optimizer: averaged with the parameters, so that one state serves any "
        "number of ranks; or each rank's own, all of which a checkpoint holds.",
    )


def check_knobs(config: AveragingConfig) -> None:
    """Refuse knobs that do not go together, or that nothing would read.

    Args:
        config: Each knob is in its range.

    Raises:
        Error: The first two that do not.
    """
    outer = config.outer
    if outer in ("mean", "easgd"):
        for name in ("outer_lr", "outer_momentum"):
            if getattr(config, name) is not None:
                raise Error(
                    f"averaging.{name} is set, and averaging.outer={outer} has none.",
                    hint="leave it unset, or choose nesterov, slowmo or bmuf.",
                )
    if config.alpha is not None and outer != "easgd":
        raise Error(
            f"averaging.alpha is set, and averaging.outer={outer} has none.",
            hint="leave it unset, or choose easgd.",
        )
    streaming = config.fragments > 1 or config.delay > 0 or config.mixing > 0
    if streaming and outer not in ("mean", "nesterov"):
        raise Error(
            f"averaging.fragments, delay and mixing do not go with averaging.outer={outer}.",
            hint="use outer=mean or nesterov.",
        )
    for name in ("fragments", "delay"):
        value, most = getattr(config, name), config.every - (name == "delay")
        if value > most:
            raise Error(
                f"averaging.{name}={value} is too many for rounds of {config.every} steps.",
                hint=f"use {most} at most, or a larger averaging.every.",
            )
    if config.delay and config.state == "mean":
        raise Error(
            "averaging.delay does not go with averaging.state=mean: a mean of states that comes "
            "late would undo the steps between.",
            hint="set averaging.state=local.",
        )


def outer_optimizer(config: AveragingConfig, ranks: int) -> OuterOptimizer:
    """Return the outer optimizer of a configuration.

    Args:
        config: The knobs.
        ranks: Of the world.
    """
    lr = {"nesterov": 0.7}.get(config.outer, 1.0)
    momentum = {"nesterov": 0.9, "slowmo": 0.5, "bmuf": 1 - 1 / ranks}.get(config.outer, 0.0)
    if config.outer == "easgd":
        lr = ranks * pull_of(config, ranks)
    return OuterOptimizer(
        config.outer,
        lr if config.outer_lr is None else config.outer_lr,
        momentum if config.outer_momentum is None else config.outer_momentum,
    )


def pull_of(config: AveragingConfig, ranks: int) -> float:
    """Return how far EASGD draws a rank to the centre.

    Args:
        config: The knobs.
        ranks: Of the world.
    """
    return 0.9 / ranks if config.alpha is None else config.alpha
