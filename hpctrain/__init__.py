"""hpctrain: train PyTorch models on Slurm and MPI clusters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hpctrain.data.batch import Batch as Batch
    from hpctrain.data.loader import Loader as Loader
    from hpctrain.data.shards import ShardSet as ShardSet
    from hpctrain.data.source import ArraySource as ArraySource
    from hpctrain.data.source import Source as Source
    from hpctrain.data.windows import Windows as Windows
    from hpctrain.errors import Error as Error
    from hpctrain.errors import PeerLost as PeerLost
    from hpctrain.inference.trained_model import load as load
    from hpctrain.optim.lamb import Lamb as Lamb
    from hpctrain.run import fit as fit
    from hpctrain.strategies import strategy as strategy
    from hpctrain.strategies.base import Strategy as Strategy
    from hpctrain.tables.table import Table as Table
    from hpctrain.tasks.callbacks.base import Callback as Callback
    from hpctrain.tasks.task import Task as Task
    from hpctrain.train.loggers.base import Logger as Logger
    from hpctrain.train.loop import Trainer as Trainer
    from hpctrain.world.world import World as World
    from hpctrain.world.world import init as init

_PLACES = {
    "ArraySource": "hpctrain.data.source",
    "Batch": "hpctrain.data.batch",
    "Callback": "hpctrain.tasks.callbacks.base",
    "Error": "hpctrain.errors",
    "Lamb": "hpctrain.optim.lamb",
    "Loader": "hpctrain.data.loader",
    "Logger": "hpctrain.train.loggers.base",
    "PeerLost": "hpctrain.errors",
    "ShardSet": "hpctrain.data.shards",
    "Source": "hpctrain.data.source",
    "Strategy": "hpctrain.strategies.base",
    "Table": "hpctrain.tables.table",
    "Task": "hpctrain.tasks.task",
    "Trainer": "hpctrain.train.loop",
    "Windows": "hpctrain.data.windows",
    "World": "hpctrain.world.world",
    "fit": "hpctrain.run",
    "init": "hpctrain.world.world",
    "load": "hpctrain.inference.trained_model",
    "strategy": "hpctrain.strategies",
}
__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    # Public names are found when asked for, so that the command line's help loads no torch.
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'hpctrain' has no attribute {name!r}")
