"""Where a model begins other than at random: the weights of a run, a checkpoint, or a file."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hpctrain.checkpoint.weights import read_weights
from hpctrain.config import InitConfig
from hpctrain.errors import Error, nearest

_WITHIN = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which files of training programs have a model's weights, beside other things."""

_SHOWN = 3
"""Names in a line, of those that do not fit."""


class Fit(NamedTuple):
    """How the weights of a source fit a model.

    Attributes:
        taken: By the model's name, the source's value.
        missing: Names in the model that the source does not have.
        unexpected: Names in the source, renamed, that the model does not have.
        misshapen: Names of which the source's value has another shape, with both.
    """

    taken: dict[str, Any]
    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    @property
    def whole(self) -> bool:
        """Whether there is nothing that does not fit."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        parts = (
            ("missing in it", self.missing),
            ("not in the model", self.unexpected),
            ("of another shape", self.misshapen),
        )
        return "; ".join(f"{what}: {_listed(names)}" for what, names in parts if names)


def initialize(model: nn.Module, config: InitConfig, say: Callable[[str], None]) -> None:
    """Give a model the weights that a configuration names, parameters and buffers, by name.

    Args:
        model: To be changed, in place.
        config: The section ``[init]``, with a source.
        say: Told what was taken, and what was not.

    Raises:
        Error: The source cannot be read, or does not fit and ``init.partial`` is not set; the model
            is as it was.
    """
    assert config.source is not None
    state, what = read_source(config.source, say)
    given = renamed(state, config.rename)
    if not given:
        raise Error(
            f"{config.source} has no tensor by name.",
            hint="save weights so: torch.save(model.state_dict(), PATH).",
        )
    fit = fitted(model, given)
    if not fit.taken or not (fit.whole or config.partial):
        raise Error(
            f"{config.source} does not fit the model: {fit}.",
            hint=_advice(model, given, fit),
        )
    matched: Any = OrderedDict(fit.taken)
    matched._metadata = getattr(state, "_metadata", OrderedDict())
    model.load_state_dict(matched, strict=False)
    count = f"{len(fit.taken)} of {len(_tensors(model.state_dict()))} tensors"
    say(f"init: {count} from {what}" + ("" if fit.whole else f"; {fit}"))


def read_source(source: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Read the weights of a run or a checkpoint, of a safetensors file, or of one of torch's.

    Of a run they are what its reported metric is of: of the best checkpoint if there is one, and
    averaged where ``train.ema_decay`` was set. A file of torch is read without executing anything.

    Args:
        source: Which.
        say: Told of damaged checkpoints that are passed over.

    Returns:
        Values by name, and what they are in words.

    Raises:
        Error: It is none of these, or cannot be read.
    """
    if source.is_dir():
        weights = read_weights(source, None, say)
        return weights.state, f"{weights.folder}, {weights.kind}"
    try:
        if source.suffix == ".safetensors":
            return load_file(source), str(source)
        state: Any = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Error(
            f"{source} does not exist.", hint="name a run's folder, a checkpoint, or a file."
        ) from None
    except (OSError, SafetensorError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise Error(
            f"{source} cannot be read as weights: {error}.",
            hint="name a run's folder, a checkpoint, a .safetensors file, or one of torch.save().",
        ) from error
    except pickle.UnpicklingError as error:
        raise Error(
            f"{source} has more than tensors and plain values, or is no file of torch.save().",
            hint="save the weights alone: torch.save(model.state_dict(), PATH).",
        ) from error
    for key in _WITHIN:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            return dict(state[key]), f"'{key}' of {source}"
    if not isinstance(state, Mapping):
        raise Error(
            f"{source} holds a {type(state).__name__}, and no weights by name.",
            hint="save them so: torch.save(model.state_dict(), PATH).",
        )
    return dict(state), str(source)


def renamed(state: Mapping[str, Any], rules: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Give tensors other names: the first rule that a name begins with gives it a new beginning.

    Args:
        state: Values by name; what is no tensor is left out.
        rules: By old beginning, the new one.

    Raises:
        Error: A rule is of no name, or two tensors come to the same one.

    Example:
        >>> list(renamed({"backbone.w": torch.ones(1)}, {"backbone.": "encoder."}))
        ['encoder.w']
    """
    found: dict[str, torch.Tensor] = {}
    unused = set(rules)
    for name, value in _tensors(state).items():
        rule = next((old for old in rules if name.startswith(old)), None)
        unused.discard(rule or "")
        new = name if rule is None else rules[rule] + name.removeprefix(rule)
        if new in found:
            raise Error(
                f"init.rename gives two tensors the name '{new}'.", hint="have one rule for each."
            )
        found[new] = value
    unused.discard("")
    if unused:
        first = min(unused)
        beginnings = {f"{name.partition('.')[0]}." for name in state}
        raise Error(f"init.rename: no name begins with '{first}'.", hint=nearest(first, beginnings))
    return found


def fitted(model: nn.Module, given: Mapping[str, torch.Tensor]) -> Fit:
    """Compare a model's parameters and buffers with tensors, by name and shape.

    Args:
        model: Its tied weights are there when one of their names is.
        given: To be taken over.
    """
    wanted = _tensors(model.state_dict())
    for name, tensor in wanted.items():
        if nn.parameter.is_lazy(tensor):
            raise Error(
                f"'{name}' of the model has no shape yet.",
                hint="have model() call a lazy module once, on a sample of zeros.",
            )
    both = [name for name in wanted if name in given]
    taken = {name: given[name] for name in both if given[name].shape == wanted[name].shape}
    there = {_memory(wanted[name]) for name in both}
    return Fit(
        taken,
        [n for n, tensor in wanted.items() if n not in given and _memory(tensor) not in there],
        [name for name in given if name not in wanted],
        [
            f"'{name}' is {tuple(wanted[name].shape)} in the model and {tuple(given[name].shape)} "
            "there"
            for name in both
            if name not in taken
        ],
    )


def _tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _memory(tensor: torch.Tensor) -> object:
    return (tensor.data_ptr(), tensor.shape) if tensor.numel() else tensor


def _advice(model: nn.Module, given: Mapping[str, torch.Tensor], fit: Fit) -> str:
    """Return what would make a source fit: renaming by prefix, or taking a part."""
    names = _tensors(model.state_dict())
    for mine in fit.missing:
        for theirs in fit.unexpected:
            if theirs.endswith(f".{mine}"):
                return _rule(theirs.removesuffix(mine), "")
            if mine.endswith(f".{theirs}"):
                return _rule("", mine.removesuffix(theirs))
    if not fit.taken and given:
        return f"the model's first name is '{next(iter(names), '')}', theirs '{next(iter(given))}'."
    return "--init-partial takes what fits, and leaves the rest as it was made."


def _rule(old: str, new: str) -> str:
    return f'names begin otherwise: --set \'init.rename={{"{old}" = "{new}"}}\'.'


def _listed(names: Iterable[str]) -> str:
    names = [name if name.startswith("'") else f"'{name}'" for name in names]
    return f"{len(names)} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
