"""A model's layers: which are one after another, and which are sharded one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from hpctrain.errors import Error
from hpctrain.mesh.blocks import blocks_of


def given(task: Any, name: str, *arguments: Any) -> Any:
    """Return what an optional method of a task gives; None: it has none, or gives nothing.

    Args:
        task: The user's side; None: there is none.
        name: Of the method.
        arguments: For it.
    """
    method = getattr(task, name, None)
    return method(*arguments) if callable(method) else None


def sequence_of(model: nn.Module, task: Any) -> list[nn.Module]:
    """Return a model's layers, each of which takes what the one before gives.

    Args:
        model: The whole one.
        task: May say by ``stages(model)``; else the model is an ``nn.Sequential``.

    Raises:
        Error: Neither; or the layers are not modules, or lack some of the parameters.
    """
    layers = given(task, "stages", model)
    if layers is None:
        if not isinstance(model, nn.Sequential):
            raise Error(
                f"the model ({type(model).__name__}) cannot be cut into stages.",
                hint="make it an nn.Sequential, or have the task's stages(model) return its "
                "layers, one after another.",
            )
        layers = list(model)
    if not all(isinstance(layer, nn.Module) for layer in layers):
        raise Error("stages(model) gives what is no module.", hint="return a list of modules.")
    known = {p for layer in layers for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        if parameter not in known:
            raise Error(
                f"parameter '{name}' is in no layer that stages(model) gives.",
                hint="have the layers make up the whole model.",
            )
    return list(layers)


def apart_of(model: nn.Module, task: Any) -> list[nn.Module]:
    """Return the blocks of a model that are gathered one at a time where parameters are sharded.

    Args:
        model: The whole one, or a stage.
        task: May give the blocks; None: nobody does.

    Returns:
        Those that have parameters, and share none with another part of the model.
    """
    return [block for block in blocks_of(model, task) if _is_apart(block, model)]


def _is_apart(block: nn.Module, model: nn.Module) -> bool:
    mine = set(block.parameters())
    inner = set(block.modules())
    return bool(mine) and not any(
        p in mine for m in model.modules() if m not in inner for p in m.parameters(recurse=False)
    )


def costs_of(layers: Sequence[nn.Module]) -> list[float]:
    """Return what each layer costs: its parameters, and one for being there.

    Args:
        layers: Of the whole model.
    """
    return [1.0 + sum(p.numel() for p in layer.parameters()) for layer in layers]
