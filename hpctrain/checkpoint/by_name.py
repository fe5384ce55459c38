"""An optimizer's state by its parameters' names, whatever their order and however they are divided.

torch's own ``state_dict()`` numbers parameters in the order of the groups. A process that holds a
part of a model, or of its parameters, numbers them otherwise than one that holds all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hpctrain.errors import Error, nearest


def state_by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what ``optimizer.state_dict()`` does, with names of parameters for their numbers.

    Args:
        model: Whose parameters they are.
        optimizer: Of all or some of them.

    Returns:
        A tree: ``state`` by name, and ``param_groups``, whose ``params`` are names. Its tensors are
        the live ones.

    Raises:
        Error: The optimizer has a parameter that is not the model's.
    """
    names = _names(model, optimizer)
    given = optimizer.state_dict()
    return {
        "state": {names[number]: values for number, values in given["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]}
            for group in given["param_groups"]
        ],
    }


def load_by_name(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state that is kept by name; of groups, only settings are taken over.

    Args:
        model: Whose parameters they are.
        optimizer: Of all or some of those that the state is of, in as many groups.
        state: As ``state_by_name`` returned it, on this or another division of the model.

    Raises:
        Error: The state lacks a parameter of this optimizer, or has other groups.
    """
    names = _names(model, optimizer)
    own = optimizer.state_dict()["param_groups"]
    groups = state["param_groups"]
    if len(groups) != len(own):
        raise Error(f"the optimizer has {len(own)} groups, and its saved state {len(groups)}.")
    known = {name for group in groups for name in group["params"]}
    for name in names:
        if name not in known:
            raise Error(
                f"the optimizer's saved state has no parameter '{name}'.",
                hint=nearest(name, known),
            )
    optimizer.load_state_dict(
        {
            "state": {
                number: state["state"][name]
                for number, name in enumerate(names)
                if name in state["state"]
            },
            "param_groups": [
                {**group, "params": mine["params"]} for group, mine in zip(groups, own, strict=True)
            ],
        }
    )


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the names of the optimizer's parameters, by their numbers."""
    named = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        if parameter not in named:
            raise Error(
                f"parameter {number} of the optimizer, of shape {tuple(parameter.shape)}, is not "
                "the model's, and has no name to be saved by.",
                hint="register it with the model.",
            )
    return [named[parameter] for parameter in parameters]
