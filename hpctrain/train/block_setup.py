"""Blocks of a model recomputed in the backward pass, to save memory, or compiled, to save time."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hpctrain.config import TrainConfig
from hpctrain.errors import Error, nearest
from hpctrain.tasks.blocks import blocks_of
from hpctrain.tasks.task import Task


def set_up_blocks(config: TrainConfig, model: nn.Module, task: Task) -> None:
    """Have a model's blocks recomputed or compiled; names of parameters stay what they are.

    Activation checkpointing is that of Chen et al., "Training Deep Nets with Sublinear Memory
    Cost", arXiv:1604.06174: of a block only the input is kept, and the rest is computed once more,
    with the same random numbers.

    Args:
        config: Says which.
        model: On its device.
        task: May give the blocks.

    Raises:
        Error: The model has no blocks, or torch has no such compiler.
    """
    if config.recompute == "blocks":
        for block in _blocks(model, task, "train.recompute=blocks"):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if config.compile != "none":
        backends = torch.compiler.list_backends(exclude_tags=())
        if config.compile not in backends:
            raise Error(
                f"torch has no compiler '{config.compile}'.",
                hint=nearest(config.compile, ["none", *backends]),
            )
        for block in _blocks(model, task, f"train.compile={config.compile}"):
            block.compile(backend=config.compile)


def _blocks(model: nn.Module, task: Task, what: str) -> list[nn.Module]:
    blocks = [block for block in blocks_of(model, task) if any(True for _ in block.parameters())]
    if not blocks:
        raise Error(
            f"{what}: no blocks were found in the model ({type(model).__name__}).",
            hint="have the task's blocks(model) return them, or use nn.Sequential or ModuleList.",
        )
    return blocks
