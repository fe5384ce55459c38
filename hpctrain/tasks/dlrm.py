"""Will it be clicked? A recommendation model with an embedding table, on drawn samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from hpctrain.config import DataConfig
from hpctrain.data.batch import Batch
from hpctrain.data.random import key, mix
from hpctrain.data.source import ArraySource, Source
from hpctrain.tables.rules import rule_of
from hpctrain.tables.table import Table
from hpctrain.tasks.task import Loss, Task

_VALIDATION = 1 / 5
_FIELD_BITS = 40  # ids of a field are below; above is the field's number


@dataclass
class Dlrm(Task):
    """DLRM (Naumov et al., 2019): perceptrons below and above dot products of embeddings.

    Without ``data.path`` samples are drawn: ids of Zipf's law, and clicks of a hidden truth in
    which each id has an effect of its own. A shard set has fields ``dense`` (float, ``[numbers]``),
    ``ids`` (int64, ``[fields]``) and ``click`` (0 or 1). All fields share one table, whose rows are
    made as ids are seen.

    Attributes:
        samples: Drawn.
        fields: Categorical ones.
        numbers: Dense ones.
        ids: Of each categorical field.
        dim: Of an embedding.
        rule: The optimizer of the table; see :class:`hpctrain.Table`.
        table_lr: Its learning rate.
        admit_after: Sights of an id after which it has a row.
    """

    samples: int = 20_000
    fields: int = 6
    numbers: int = 4
    ids: int = 2_000
    dim: int = 8
    rule: str = "rowwise_adagrad"
    table_lr: float = 0.1
    admit_after: int = 1

    defaults = {
        "train.epochs": 3,
        "train.batch_size": 256,
        "optimizer.lr": 5e-3,
        "schedule.warmup_steps": 10,
    }
    monitor = "auc"
    mode = "max"

    def model(self) -> nn.Module:
        """Return the model: two perceptrons and one embedding table for all fields."""
        rule = type(rule_of(self.rule))(lr=self.table_lr)
        table = Table(
            "categories", self.dim, hashed=True, mode=None, optimizer=rule, init="uniform:0.1",
            admit_after=self.admit_after,
        )  # fmt: skip
        return Interaction(table, self.numbers, self.fields)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the binary cross entropy of clicks.

        Args:
            model: An :class:`Interaction`.
            batch: With ``dense`` ``[n, numbers]``, ``ids`` ``[n, fields]``, and ``click`` ``[n]``.
        """
        scores = model(batch["dense"], batch["ids"])
        return F.binary_cross_entropy_with_logits(scores, batch["click"].to(scores.dtype)), {}

    def predictions(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the score of each sample, and whether it was clicked, both ``[n]``.

        Args:
            model: In evaluation mode.
            batch: As for ``loss``.
        """
        return {"scores": model(batch["dense"], batch["ids"]), "clicks": batch["click"]}

    def metrics(self) -> Mapping[str, Callable[..., Any]]:
        """Return the area under the receiver operating characteristic, as ``auc``."""
        return {"auc": auc}

    def data(self, config: DataConfig) -> dict[str, Source]:
        """Return samples of a hidden truth, or those of the shard set at ``data.path``."""
        if config.path is not None:
            return super().data(config)
        drawn = _drawn(self.samples, self.numbers, self.fields, self.ids)
        held = round(self.samples * _VALIDATION)
        return {
            "train": ArraySource({name: values[held:] for name, values in drawn.items()}),
            "validation": ArraySource({name: values[:held] for name, values in drawn.items()}),
        }


class Interaction(nn.Module):
    """Dot products of all pairs of embeddings, between two perceptrons.

    Args:
        table: Of all categorical fields.
        numbers: Dense fields.
        fields: Categorical fields.
    """

    def __init__(self, table: Table, numbers: int, fields: int) -> None:
        super().__init__()
        dim = table.spec.dim
        self.table = table
        self.bottom = nn.Sequential(
            nn.Linear(numbers, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim), nn.ReLU()
        )
        pairs = fields * (fields + 1) // 2
        self.top = nn.Sequential(nn.Linear(dim + pairs, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, 1))
        self.fields = fields

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the scores of samples, ``[n]``: logits of a click.

        Args:
            dense: ``[n, numbers]``.
            ids: ``[n, fields]``, integers; the same id in two fields has two rows.
        """
        low = self.bottom(dense)
        offsets = torch.arange(self.fields, device=ids.device) << _FIELD_BITS
        vectors = torch.cat([low[:, None], self.table(ids + offsets)], dim=1)
        products = vectors @ vectors.transpose(1, 2)
        one, other = torch.tril_indices(self.fields + 1, self.fields + 1, -1, device=ids.device)
        crossed = products[:, one, other]
        out: torch.Tensor = self.top(torch.cat([low, crossed], dim=1))[:, 0]
        return out


def auc(scores: torch.Tensor, clicks: torch.Tensor) -> float:
    """Return the chance that a clicked sample has a higher score than another; ties count half.

    Args:
        scores: ``[n]``.
        clicks: 0 or 1, ``[n]``.

    Example:
        >>> auc(torch.tensor([0.1, 0.4, 0.4, 0.9]), torch.tensor([0, 0, 1, 1]))
        0.875
    """
    _, place, counts = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]
    positive = int(clicks.sum())
    negative = len(clicks) - positive
    above = float(ranks[clicks.bool()].sum()) - positive * (positive + 1) / 2
    return above / (positive * negative) if positive and negative else float("nan")


def _uniform(purpose: int, *shape: int) -> NDArray[np.float64]:
    """Return pseudo-random numbers in [0, 1), the same everywhere."""
    count = int(np.prod(shape))
    words = mix(np.arange(count, dtype=np.uint64) ^ np.uint64(key(purpose)))
    values: Any = (words >> np.uint64(11)) * 2.0**-53
    return np.asarray(values, np.float64).reshape(shape)


def _drawn(samples: int, numbers: int, fields: int, ids: int) -> dict[str, NDArray[Any]]:
    """Draw samples: ids by Zipf's law, and clicks by effects of ids and of dense numbers."""
    mass = 1.0 / np.arange(1, ids + 1)
    chosen = np.searchsorted(np.cumsum(mass) / mass.sum(), _uniform(1, samples, fields))
    dense = 2 * _uniform(2, samples, numbers) - 1
    effects = 4 * _uniform(3, fields, ids) - 2
    logits = effects[np.arange(fields), chosen].sum(1) + dense.sum(1)
    clicks = _uniform(4, samples) < 1 / (1 + np.exp(-logits))
    return {
        "dense": dense.astype(np.float32),
        "ids": chosen.astype(np.int64),
        "click": clicks.astype(np.int64),
    }
