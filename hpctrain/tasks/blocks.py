"""A model's blocks: its layers that are alike, and are dealt with one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from hpctrain.errors import Error


def blocks_of(model: nn.Module, task: Any) -> list[nn.Module]:
    """Return the blocks of a model, such as a transformer's layers.

    >>> layers = [nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())]
    >>> len(blocks_of(nn.ModuleDict({"body": nn.Sequential(*layers)}), None))
    2

    Args:
        model: The whole one, or a stage of it.
        task: May give them by ``blocks(model)``; else they are the children of the outermost
            ``nn.Sequential`` and ``nn.ModuleList``. None: nobody gives them.

    Raises:
        Error: The task gives something else than modules.
    """
    method = getattr(task, "blocks", None)
    given = method(model) if callable(method) else None
    found = list(_children_of_lists(model)) if given is None else list(given)
    if not all(isinstance(block, nn.Module) for block in found):
        raise Error(
            f"blocks() of task {type(task).__name__} gives what is no module.",
            hint="return a list of the model's modules.",
        )
    return found


def _children_of_lists(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.Sequential | nn.ModuleList):
            yield child
        else:
            yield from _children_of_lists(child)
