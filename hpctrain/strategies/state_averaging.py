"""Average optimizer states over ranks, so that one state serves any world."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hpctrain.strategies.flats import Flats
from hpctrain.world.broadcast import gather_json, gather_numbers
from hpctrain.world.world import Communicator

State = dict[str, Any]


def mean_states(
    comm: Communicator,
    parameters: Sequence[nn.Parameter],
    states: Mapping[torch.Tensor, State],
    weight: float,
) -> list[State]:
    """Return the mean of what the ranks' optimizers keep for each parameter.

    Moments and the like are means, weighted; a rank that keeps none for a parameter counts as
    zeros, as an optimizer begins. Single numbers, such as counts of steps, and integers become
    those of the rank of most weight. Every rank calls this, and gets the same.

    Args:
        comm: Of the world.
        parameters: The same on every rank, in the same order.
        states: Of the optimizer; left as they are.
        weight: Of this rank.
    """
    mine = [dict(states.get(parameter, {})) for parameter in parameters]
    weights, kinds = _agree(comm, [_kinds(state) for state in mine], weight)
    if sum(weights) == 0:
        weights = [1.0] * comm.size
    share = weights[comm.rank] / sum(weights)
    moments, numbers, others = _sorted(kinds)
    found: list[State] = [{} for _ in parameters]
    tensors = [
        state if (state := mine[n].get(name)) is not None else _zeros(parameters[n], kinds[n][name])
        for n, name in moments
    ]
    flats = Flats(tensors)
    sums = [flat.mul_(share) for flat in flats.read()]
    for flat in sums:
        comm.all_reduce(flat)
    for (n, name), tensor, mean in zip(moments, tensors, flats.split(sums), strict=True):
        found[n][name] = torch.empty_like(tensor).copy_(mean)
    table = gather_numbers(comm, [_number(mine[n].get(name)) for n, name in numbers])
    for place, (n, name) in enumerate(numbers):
        having = [rank for rank in range(comm.size) if not math.isnan(table[rank][place])]
        value = table[max(having, key=lambda r: weights[r])][place] if having else math.nan
        found[n][name] = _as(kinds[n][name], value)
    for n, name in others:
        kept = mine[n].get(name)
        tensor = _zeros(parameters[n], kinds[n][name]) if kept is None else kept.clone()
        comm.broadcast(tensor, weights.index(max(weights)))
        found[n][name] = tensor
    return [{**before, **after} for before, after in zip(mine, found, strict=True)]


def put_states(
    parameters: Sequence[nn.Parameter],
    states: dict[torch.Tensor, State],
    means: Sequence[State],
) -> None:
    """Put means in place of what an optimizer keeps for each parameter.

    Args:
        parameters: As given to :func:`mean_states`.
        states: Of the optimizer; changed in place.
        means: As it returned them.
    """
    for parameter, mean in zip(parameters, means, strict=True):
        if not mean:
            continue
        state = states.setdefault(parameter, {})
        for name, value in mean.items():
            if isinstance(value, torch.Tensor) and isinstance(state.get(name), torch.Tensor):
                state[name].copy_(value)
            else:
                state[name] = value


def _kinds(state: State) -> dict[str, list[Any]]:
    """Describe a parameter's state without its values: type and shape by name."""
    kinds: dict[str, list[Any]] = {}
    for name, value in sorted(state.items()):
        if isinstance(value, torch.Tensor):
            kinds[name] = [str(value.dtype).removeprefix("torch."), list(value.shape)]
        elif isinstance(value, (bool, int, float)):
            kinds[name] = [type(value).__name__, None]
    return kinds


def _agree(
    comm: Communicator, kinds: list[dict[str, list[Any]]], weight: float
) -> tuple[list[float], list[dict[str, list[Any]]]]:
    """Gather every rank's weight, and agree on what state there is on any of them."""
    digest = hashlib.sha256(json.dumps(kinds).encode()).digest()
    numbers = [float(int.from_bytes(digest[i : i + 6], "big")) for i in (0, 6)]
    rows = gather_numbers(comm, [weight, *numbers])
    weights = [row[0] for row in rows]
    if all(row[1:] == rows[0][1:] for row in rows):
        return weights, kinds
    every = gather_json(comm, kinds)
    return weights, [
        {name: kind for other in each for name, kind in sorted(other.items())}
        for each in zip(*every, strict=True)
    ]


def _sorted(kinds: list[dict[str, list[Any]]]) -> tuple[list[tuple[int, str]], ...]:
    """Sort the state's places: what is averaged, single numbers, and the rest."""
    moments, numbers, others = [], [], []
    for n, names in enumerate(kinds):
        for name, (kind, shape) in names.items():
            if not shape:
                numbers.append((n, name))
            elif (dtype := getattr(torch, kind)).is_floating_point or dtype.is_complex:
                moments.append((n, name))
            else:
                others.append((n, name))
    return moments, numbers, others


def _zeros(parameter: nn.Parameter, kind: list[Any]) -> torch.Tensor:
    dtype = getattr(torch, kind[0])
    if list(parameter.shape) == kind[1]:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    return torch.zeros(kind[1], dtype=dtype, device=parameter.device)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _as(kind: list[Any], value: float) -> Any:
    name, shape = kind
    if shape is None:
        return {"bool": bool, "int": int, "float": float}[name](value)
    return torch.tensor(value, dtype=getattr(torch, name))
