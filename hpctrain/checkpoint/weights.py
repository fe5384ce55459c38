"""Read a model's weights out of a run or a checkpoint: those that its reported metric is of."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from hpctrain.checkpoint.pieces import INDEX, Checkpoint
from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.checkpoint.tensor_file import DTYPES
from hpctrain.errors import Error
from hpctrain.files import sync

CHECKPOINTS = "checkpoints"
"""The folder of a run that has them."""

WHICH = ("best", "newest")
_MODULE = "module."  # before each name, in an AveragedModel


class Weights(NamedTuple):
    """A model's parameters and buffers.

    Attributes:
        folder: The checkpoint they are of.
        averaged: Whether they are the exponential moving average of the weights, as validation and
            the reported metric are where ``train.ema_decay`` is set.
        state: What the model's ``load_state_dict`` takes.
        tables: How many files of rows of embedding tables the checkpoint has.
    """

    folder: Path
    averaged: bool
    state: dict[str, Any]
    tables: int = 0

    @property
    def kind(self) -> str:
        """In words, what the weights are, for those who are told."""
        return "averaged weights (train.ema_decay)" if self.averaged else "weights"


def read_weights(source: Path, which: str | None, complain: Callable[[str], None]) -> Weights:
    """Read a model's weights, and check them.

    Args:
        source: A run, or a checkpoint.
        which: Of a run's checkpoints: ``best`` or ``newest``; None: the best, or where nothing was
            validated the newest.
        complain: Told of each damaged one that is passed over for the one before.

    Raises:
        Error: There is no such checkpoint, or it is damaged.
    """
    if which not in (None, *WHICH):
        raise Error(f"'{which}' is no checkpoint of a run.", hint=f"say {' or '.join(WHICH)}.")
    if (source / INDEX).exists():
        return _weights_of(source)
    folder = source / CHECKPOINTS if (source / CHECKPOINTS).is_dir() else source
    store = CheckpointStore(folder, keep=1)
    steps = store.steps()
    if not steps:
        raise Error(
            f"{source} is no checkpoint, and no run that has one.",
            hint="name a run's folder, or one of its checkpoints/step-*.",
        )
    best = store.best()
    if which != "newest" and best is not None:
        return _weights_of(best)
    if which == "best":
        raise Error(
            f"{source} has no best checkpoint: nothing was validated.", hint="take the newest."
        )
    for step in reversed(steps):
        try:
            return _weights_of(store.path(step))
        except Error as error:
            complain(f"{error} Going back to the one before.")
    raise Error(f"all {len(steps)} checkpoints in {folder} are damaged.")


def _weights_of(folder: Path) -> Weights:
    with Checkpoint(folder) as checkpoint:
        rest = checkpoint.rest
        if not isinstance(rest, dict) or rest.get("model") is None:
            raise Error(f"checkpoint {folder} has no model.", hint="name one of a training run.")
        if rest.get("ema") is None:
            tables = rest.get("tables") or {}
            return Weights(folder, False, checkpoint.state("model"), int(tables.get("files", 0)))
        state: Any = OrderedDict()
        averaged = checkpoint.state("ema")
        for name, value in averaged.items():
            if name.startswith(_MODULE):  # and not how many were averaged
                state[name.removeprefix(_MODULE)] = value
        versions = getattr(averaged, "_metadata", {})
        state._metadata = OrderedDict(
            (f"{name}.".removeprefix(_MODULE).removesuffix("."), value)
            for name, value in versions.items()
            if name
        )
        return Weights(folder, True, state)


def export(weights: Weights, out: Path) -> list[str]:
    """Write a model's parameters and buffers as a plain safetensors file, whole or not at all.

    Args:
        weights: To be written.
        out: The file; replaced if it exists.

    Returns:
        Names of what is left out as it is no tensor: extra state of modules.

    Raises:
        Error: The model has tables, a tensor is of a kind that safetensors does not know, or the
            file cannot be written.
    """
    if weights.tables:
        raise Error(
            f"the model of {weights.folder} has embedding tables, whose rows are no tensor.",
            hint="take the model by hpctrain.load(); the rows lie in the checkpoint's "
            "tables-*.safetensors.",
        )
    tensors: dict[str, torch.Tensor] = {}
    left_out = []
    for name, value in weights.state.items():
        if not isinstance(value, torch.Tensor):
            left_out.append(name)
            continue
        if value.layout != torch.strided or value.is_quantized or value.dtype not in DTYPES:
            what = "quantized" if value.is_quantized else f"of {value.dtype} and {value.layout}"
            raise Error(
                f"'{name}' is {what}, which safetensors does not know.",
                hint="take the model by hpctrain.load() instead.",
            )
        tensors[name] = value.contiguous()
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        sync(temporary)
        temporary.replace(out)
        sync(out.parent)
    except Exception as error:  # safetensors has an exception of its own for what the disk says
        raise Error(
            f"cannot write {out}: {error}.", hint="check the folder, and its room."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return left_out
