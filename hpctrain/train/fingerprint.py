"""What decides a run's result, as names and short texts that ranks can compare at the start."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpctrain import __version__
from hpctrain.config import RunConfig
from hpctrain.data.source import Source

# Rank 0's is told to the others (out, resume), or it is of a host: where files are is not what is
# in them, and that is compared.
OF_A_RANK = (
    "out", "resume", "data.path", "data.mixture", "data.stage_dir", "data.workers", "init.source",
    "ps.key_file", "ps.record_order", "ps.replay",
)  # fmt: skip


def of_start(config: RunConfig, task: object) -> dict[str, str]:
    """Return what is known before anything is made: settings, versions, the task's source.

    Args:
        config: As this rank resolved it.
        task: The task; the files of its class, and those it imports from beside them, count.

    Returns:
        Short texts by what they describe. Settings that may differ by rank are left out.
    """
    values = _flat(config.model_dump(mode="json", exclude_none=True))
    settings = {name: text for name, text in values.items() if name not in OF_A_RANK}
    mixture = ", ".join(f"{entry.weight:g}" for entry in config.data.mixture)
    versions = {
        "the version of hpctrain": __version__,
        "the version of python": platform.python_version(),
        "the version of torch": torch.__version__,
        "the version of numpy": np.__version__,
    }
    weights = {"the weights of data.mixture": mixture} if mixture else {}
    return {**settings, **weights, **versions, **_sources(type(task))}


def of_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, splits: Mapping[str, Source]
) -> dict[str, str]:
    """Return what was made: each split's samples, the model's tensors, the optimizer's groups.

    Args:
        model: Before it is wrapped; names, shapes and types of its tensors count, not their values.
        optimizer: The plain one.
        splits: The samples by split; their digests count.

    Returns:
        Short texts by what they describe.
    """
    values = {
        f"the samples of split '{name}'": f"{len(source)} samples, digest {source.digest[:16]}"
        for name, source in splits.items()
    }
    group_of: dict[torch.Tensor, int] = {}
    for number, group in enumerate(optimizer.param_groups):
        group_of |= dict.fromkeys(group["params"], number)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        trained = "trained" if parameter.requires_grad else "frozen"
        place = group_of.pop(parameter, -1)
        where = f"in group {place}" if place >= 0 else "in no group"
        values[f"parameter '{name}'"] = f"{_kind(parameter)}, {trained}, {where}, number {number}"
    for name, buffer in model.named_buffers():
        values[f"buffer '{name}'"] = _kind(buffer)
    for tensor, place in group_of.items():  # of no model
        key = f"other parameters of group {place}"
        values[key] = f"{values.get(key, '')}{_kind(tensor)}; "
    values["the optimizer"] = type(optimizer).__name__
    for number, group in enumerate(optimizer.param_groups):
        rest = [f"{name}={value}" for name, value in group.items() if name != "params"]
        values[f"optimizer group {number}"] = ", ".join(rest)
    return values


def _kind(tensor: torch.Tensor) -> str:
    if nn.parameter.is_lazy(tensor):
        return "of no shape yet"
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = str(value)
    return flat


def _sources(kind: type) -> dict[str, str]:
    """Return digests of the task's files: of its classes, and of imports from beside them."""
    files: dict[str, Path] = {}
    for each in kind.__mro__:
        path = getattr(sys.modules.get(each.__module__), "__file__", None)
        if path and not each.__module__.startswith("hpctrain."):
            files.setdefault(Path(path).name, Path(path))
    folder = f"{next(iter(files.values())).resolve().parent}/" if files else None
    for module in list(sys.modules.values()) if folder else ():
        path = getattr(module, "__file__", None)
        if path and path.startswith(folder) and path.endswith(".py"):
            name = path.removeprefix(str(folder))
            if "site-packages/" not in name and not name.startswith("hpctrain/"):
                files[name] = Path(path)
    return {
        f"the source file {name}": hashlib.sha256(files[name].read_bytes()).hexdigest()[:16]
        for name in sorted(files)
        if files[name].is_file()
    }
