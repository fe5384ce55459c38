"""A run's model, in a program of one's own: no launcher, no trainer, one process."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from hpctrain.checkpoint.weights import read_weights
from hpctrain.config import Layer, RunConfig, read_toml, resolve
from hpctrain.data.source import Source
from hpctrain.errors import Error
from hpctrain.run_folder import CONFIG
from hpctrain.tables import files
from hpctrain.tables.table import tables_of
from hpctrain.tasks.checks import Read, model_of, splits_of
from hpctrain.tasks.seeds import set_start_seeds
from hpctrain.tasks.task import Task, load_task, make_task
from hpctrain.train.model_setup import prepared

_READ = RunConfig.model_fields.keys() - {"strategy"}


def load(source: str | Path, which: str | None = None) -> nn.Module:
    """Return a trained model, in evaluation mode, on the CPU.

    The task and its options are those of the run's ``config.toml``; the weights are those that the
    reported metric is of, so the averaged ones where ``train.ema_decay`` was set. The task's
    ``data()`` is called before its ``model()``, as in training; where the data are not there, the
    model is made without them if it can be. Random generators are left as they were.

    Args:
        source: A run's folder, or one of its checkpoints.
        which: Of a run's checkpoints: ``best`` or ``newest``; None: the best, or where nothing was
            validated the newest.

    Raises:
        Error: There is no such checkpoint, it is damaged, or it is of another model than the task
            makes now.

    Example:
        >>> model = hpctrain.load("runs/digits-1", "best")  # doctest: +SKIP
        >>> model(torch.zeros(1, 64)).argmax()  # doctest: +SKIP
    """
    return open_trained(
        Path(source), which, complain=lambda text: warnings.warn(text, stacklevel=4)
    ).model


class Trained(NamedTuple):
    """A run's model, and what it was trained by.

    Attributes:
        model: In evaluation mode, on the CPU.
        task: Which made it.
        config: Of the run, without its strategy.
        read: What the task has read of the configuration.
        splits: The task's samples; or why there are none.
        checkpoint: The folder of the weights.
    """

    model: nn.Module
    task: Task
    config: RunConfig
    read: Read
    splits: dict[str, Source] | Exception
    checkpoint: Path


def open_trained(
    source: Path,
    which: str | None,
    *,
    changes: Layer | None = None,
    complain: Callable[[str], None],
) -> Trained:
    """Make a run's model as the run did, and load its weights.

    Args:
        source: A run's folder, or one of its checkpoints.
        which: Of a run's checkpoints, as in :func:`load`.
        changes: What is to differ from the run's configuration.
        complain: Told of each damaged checkpoint that is passed over.

    Raises:
        Error: As in :func:`load`.
    """
    weights = read_weights(source, which, complain)
    path = _config_beside(weights.folder)
    layer = read_toml(path)
    # A strategy of one's own, and its knobs, need not be there.
    layers = [(str(path), {k: v for k, v in layer.items() if k in _READ})]
    config = resolve([*layers, ("command line", changes or {})])
    read = Read(config)
    with _generators_kept():
        set_start_seeds(config.seed)
        task = make_task(load_task(config.task, config.seed), config.options)
        splits = _splits(task, read)
        set_start_seeds(config.seed)
        try:
            model = prepared(model_of(task, 1), torch.device("cpu"), config.train.dtype)
            model.load_state_dict(weights.state)
            files.load(weights.folder, weights.tables, tables_of(model))
        except Exception as error:
            if isinstance(splits, Exception):
                raise Error(
                    f"the model of {path.parent} cannot be made without its data: {splits}.",
                    hint="have the data where the run had them.",
                ) from error
            if not isinstance(error, (RuntimeError, KeyError)):
                raise
            raise Error(
                f"checkpoint {weights.folder} is of another model than task {config.task} makes: "
                f"{error}.",
                hint="load it with the task's file as it was in the run.",
            ) from error
    return Trained(model.eval(), task, config, read, splits, weights.folder)


def _config_beside(checkpoint: Path) -> Path:
    """Return the configuration's path of the run that a checkpoint is of."""
    path = checkpoint.resolve().parent.parent / CONFIG
    if not path.is_file():
        raise Error(
            f"checkpoint {checkpoint} is not in a run's folder: there is no {path}.",
            hint="name the run, or load the tensors of `hpctrain export` into a model of your own.",
        )
    return path


def _splits(task: Task, read: Read) -> dict[str, Source] | Exception:
    """A task's samples, from which it may learn what model to make; or why it has none."""
    try:
        return splits_of(task, read)
    except Exception as error:
        return error


@contextlib.contextmanager
def _generators_kept() -> Iterator[None]:
    own, numpys = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)
