"""Start every replica from rank 0's model and optimizer, whatever those are made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hpctrain.world.agreement import compare
from hpctrain.world.broadcast import broadcast_tree
from hpctrain.world.world import Communicator


def check_alike(comm: Communicator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse ranks whose models or optimizers are not made alike; every rank calls this.

    Values may differ, as may the options of parameter groups: rank 0's are everybody's.

    Args:
        comm: Of the world.
        model: The model.
        optimizer: To be wrapped.

    Raises:
        Error: The first thing that differs.
    """
    found = {"the optimizer's class": type(optimizer).__name__}
    for name, parameter in model.named_parameters():
        found[f"parameter '{name}'"] = _described(parameter, trained=parameter.requires_grad)
    for name, buffer in model.named_buffers():
        found[f"buffer '{name}'"] = _described(buffer)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        members = [names.get(p) or _described(p, trained=p.requires_grad) for p in group["params"]]
        found[f"parameters of the optimizer's group {number}"] = ", ".join(members)
        found[f"options of the optimizer's group {number}"] = ", ".join(sorted(group))
    compare(comm, found, hint="build the same model and optimizer on every rank.")


def share(comm: Communicator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Start every rank from rank 0's model and optimizer state; every rank calls this.

    Args:
        comm: Of the world.
        model: Its parameters, buffers, and other state are overwritten, but on rank 0.
        optimizer: Likewise.

    Raises:
        Error: There is state that cannot be sent.
    """
    _make_writable(model)
    state = model.state_dict()
    mine = {
        "model": dict(state),
        "versions": getattr(state, "_metadata", {}),
        "rest": dict(enumerate(_not_in(state, model, optimizer))),
        "optimizer": optimizer.state_dict(),
    }
    start = broadcast_tree(comm, mine)
    if comm.rank == 0:
        return
    state = OrderedDict(start["model"])
    state._metadata = start["versions"]  # type: ignore[attr-defined]
    model.load_state_dict(state)
    _copy(_not_in(model.state_dict(), model, optimizer), start["rest"].values())
    optimizer.load_state_dict(start["optimizer"])


def share_rest(comm: Communicator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Broadcast what the optimizer does not train, and the options of its groups.

    Args:
        comm: Of the world.
        model: Its other parameters, buffers, and other state are overwritten, but on rank 0.
        optimizer: Options of its groups are overwritten.

    Raises:
        Error: There is state that cannot be sent.
    """
    _make_writable(model)
    trained = {p for group in optimizer.param_groups for p in group["params"]}
    tensors = [p for p in model.parameters() if p not in trained] + list(model.buffers())
    extra = {
        name: value
        for name, value in model.state_dict().items()
        if not isinstance(value, torch.Tensor)
    }
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    mine = {"rest": dict(enumerate(tensors)), "extra": extra, "groups": groups}
    start = broadcast_tree(comm, mine)
    if comm.rank == 0:
        return
    _copy(tensors, start["rest"].values())
    if extra:
        state = model.state_dict()
        state.update(start["extra"])
        model.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, start["groups"], strict=True):
        for name, value in options.items():
            group[name] = tuple(value) if isinstance(group[name], tuple) else value


def _described(tensor: torch.Tensor, *, trained: bool | None = None) -> str:
    how = "" if trained is None else " trained" if trained else " frozen"
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{how}"


def _make_writable(model: nn.Module) -> None:
    """Give buffers that repeat their memory (``expand``) memory of their own."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if repeats(buffer):
                module._buffers[name] = buffer.contiguous()


def repeats(tensor: torch.Tensor) -> bool:
    """Whether several elements of a tensor are the same memory, so that it cannot be written to."""
    if tensor.layout != torch.strided:
        return False
    return any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _not_in(
    state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[torch.Tensor]:
    """Return buffers that no state dict has, and parameters that are not the model's."""
    known = set(model.parameters())
    buffers = [b for name, b in model.named_buffers() if name not in state]
    return [
        *buffers,
        *(p for group in optimizer.param_groups for p in group["params"] if p not in known),
    ]


def _copy(targets: Iterable[torch.Tensor], values: Iterable[torch.Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)
