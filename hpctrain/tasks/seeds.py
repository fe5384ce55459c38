"""Seed random generators from numbers: nothing to save, nothing to lose."""

from __future__ import annotations

import random

import numpy as np
import torch

from hpctrain.data.random import key


def set_seeds(*parts: int) -> None:
    """Seed torch's, numpy's and Python's global generators as a function of these numbers."""
    seed = key(*parts)
    # Not torch.manual_seed: it notes a stack trace for every kind of device it cannot reach.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


def set_start_seeds(seed: int) -> None:
    """Seed for what every rank does alike before training: the task, its data, its model."""
    set_seeds(seed, -1, 0)
