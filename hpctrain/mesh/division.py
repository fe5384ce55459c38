"""A model divided over the ranks of a mesh: stages, matrices, and shards of what is left.

The model keeps its modules and the names of its parameters. What this rank does not hold becomes
empty; of what it holds, :class:`Held` says which part of the whole it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module

from hpctrain.errors import Error, nearest
from hpctrain.mesh.cuts import balanced
from hpctrain.mesh.layers import apart_of, costs_of, given, sequence_of
from hpctrain.mesh.pipeline import Chunk
from hpctrain.mesh.region import Region
from hpctrain.mesh.shape import Place, Shape
from hpctrain.mesh.styles import ROWS

Sharding = Literal["none", "optimizer", "gradients", "parameters"]


class Held(NamedTuple):
    """What this rank holds of a parameter.

    Attributes:
        name: Of the parameter in the model, the first one where it has several.
        local: What the optimizer updates: the parameter of the user's, with this rank's part.
        live: What the model computes with; the same, or a tensor over several ranks.
        region: Where the part lies in the whole; None: this rank has nothing of it.
    """

    name: str
    local: nn.Parameter
    live: nn.Parameter
    region: Region | None


class Division(NamedTuple):
    """What this rank computes, and what it holds.

    Attributes:
        chunks: Its stages of a pipeline; of a mesh without one, the model.
        held: Every parameter of the model, in the model's order.
    """

    chunks: list[nn.Module]
    held: list[Held]


def divide(
    model: nn.Module,
    task: Any,
    mesh: DeviceMesh,
    shape: Shape,
    place: Place,
    *,
    shard: Sharding,
    chunks: int,
) -> Division:
    """Divide a model, in place; every rank calls this with the same values.

    Args:
        model: Whole.
        task: May say how: ``stages``, ``parallelize``, ``blocks``.
        mesh: With the axes ``pp``, ``dp`` and ``tp``.
        shape: Of the mesh.
        place: Of this rank.
        shard: What is divided over replicas.
        chunks: Stages a rank.

    Raises:
        Error: It cannot be divided so.
    """
    named = dict(model.named_parameters())
    regions = {name: Region.whole(p.shape) for name, p in named.items()}
    plan = _plan(model, task, shape)
    mine: list[nn.Module] = [model]
    absent: set[nn.Parameter] = set()
    if shape.pp > 1:
        layers = sequence_of(model, task)
        cuts = balanced(costs_of(layers), shape.pp * chunks)
        mine = [Chunk([layers[n] for n in cut]) for cut in cuts[place.pp :: shape.pp]]
        present = {p for chunk in mine for p in chunk.parameters()}
        absent = {p for p in named.values() if p not in present}
    names = names_of(model)
    places = {names[p][0]: _place_in(mine, model, names[p]) for p in named.values()}
    for name, style in plan.items():
        module = model.get_submodule(name)
        if not any(p in absent for p in module.parameters()):
            parallelize_module(module, mesh["tp"], style)
    live = {name: getattr(module, key) for name, (module, key) in places.items()}
    for name, parameter in named.items():
        if rows := getattr(parameter, ROWS, None):
            regions[name] = regions[name].ordered(rows)
        if isinstance(live[name], DTensor):
            regions[name] = _of_tp(name, live[name], regions[name], place.tp, shape.tp)
    if shard != "none":
        for chunk in mine:
            says = task if chunk is model else None
            _shard(chunk, says, mesh["dp"], whole=shard != "parameters")
        live = {name: getattr(module, key) for name, (module, key) in places.items()}
        for name, parameter in named.items():
            if parameter not in absent:
                regions[name] = _of_dp(regions[name], place.dp, shape.dp)
    held = []
    for name, parameter in named.items():
        here = parameter not in absent
        if not here:
            parameter.data = parameter.data.new_empty(0)
        held.append(Held(name, parameter, live[name], regions[name] if here else None))
        take_local(held[-1])
        for each in names[parameter]:  # also in stages of other ranks
            path, _, key = each.rpartition(".")
            model.get_submodule(path)._parameters[key] = live[name]
    return Division(mine, held)


def take_local(held: Held) -> None:
    """Have the optimizer's parameter be the memory that the model's is made of.

    Args:
        held: Of which parameter.
    """
    if isinstance(held.live, DTensor):
        assert held.region is not None
        local = held.live._local_tensor
        if tuple(local.shape) != held.region.sizes:
            raise Error(
                f"torch holds {tuple(local.shape)} of parameter '{held.name}' on this rank, and "
                f"{held.region.sizes} was expected.",
                hint="this torch divides parameters otherwise; use shard=none and tp=1.",
            )
        held.local.data = local


def local_of(gradient: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a gradient.

    Args:
        gradient: As autograd left it.
        live: Whose it is.
    """
    if not isinstance(gradient, DTensor):
        return gradient
    assert isinstance(live, DTensor)
    return gradient.redistribute(placements=live.placements).to_local()


def sharded_modules(chunks: Sequence[nn.Module]) -> list[FSDPModule]:
    """Return the modules whose parameters are gathered and freed.

    Args:
        chunks: This rank's.
    """
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, FSDPModule)]


def _plan(model: nn.Module, task: Any, shape: Shape) -> dict[str, Any]:
    """Return how modules are divided over tensor-parallel ranks, by name."""
    if shape.tp == 1:
        return {}
    plan = given(task, "parallelize", model)
    if not plan:
        raise Error(
            f"tp={shape.tp}: nothing says how the model is divided.",
            hint="have the task's parallelize(model) return torch's styles by module, as "
            "hpctrain.mesh.styles makes them.",
        )
    names = names_of(model)
    modules = dict(model.named_modules())
    for name in plan:
        if name not in modules:
            raise Error(
                f"parallelize(model) names '{name}', which the model has not.",
                hint=nearest(name, modules),
            )
        for parameter in modules[name].parameters():
            if len(names[parameter]) > 1:
                raise Error(
                    f"'{name}' shares a parameter with '{names[parameter][-1]}', and cannot be "
                    "divided.",
                    hint="leave it out of parallelize(model), or do not tie it.",
                )
    return dict(plan)


def names_of(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return all names of each parameter.

    Args:
        model: Whose they are.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _place_in(
    chunks: Sequence[nn.Module], model: nn.Module, names: Sequence[str]
) -> tuple[nn.Module, str]:
    """Find the module that has a parameter, one of this rank's if possible, and its name there."""
    modules = {module for chunk in chunks for module in chunk.modules()}
    paths = [name.rpartition(".") for name in names]
    found = [(model.get_submodule(path), key) for path, _, key in paths]
    return next((each for each in found if each[0] in modules), found[0])


def _of_tp(name: str, live: DTensor, region: Region, rank: int, ranks: int) -> Region:
    (placement,) = live.placements
    if not isinstance(placement, Shard):
        return region
    size = region.sizes[placement.dim]
    if size % ranks:
        raise Error(
            f"tp={ranks} does not divide the {size} elements of parameter '{name}' along "
            f"dimension {placement.dim}.",
            hint="choose another width, or another tp.",
        )
    each = size // ranks
    return region.narrowed(placement.dim, rank * each, (rank + 1) * each)


def _of_dp(region: Region, rank: int, ranks: int) -> Region:
    """Cut the first dimension as FSDP2 does: runs of as many rows, rounded up; the last fewer."""
    each = -(-region.sizes[0] // ranks)
    return region.narrowed(0, rank * each, (rank + 1) * each)


def _shard(chunk: nn.Module, task: Any, mesh: DeviceMesh, *, whole: bool) -> None:
    """Shard a stage's parameters over replicas, by FSDP2.

    Args:
        chunk: The stage.
        task: May say by ``blocks``; None: nobody does.
        mesh: Of the replicas.
        whole: Whether parameters stay gathered from their use in the forward pass to that in the
            backward pass.
    """
    for name, parameter in chunk.named_parameters():
        if parameter.dim() == 0:
            raise Error(
                f"parameter '{name}' is a single number, which cannot be sharded.",
                hint="give it the shape (1,), or use shard=none.",
            )
    for block in apart_of(chunk, task):
        fully_shard(block, mesh=mesh, reshard_after_forward=not whole)
    fully_shard(chunk, mesh=mesh, reshard_after_forward=not whole)
