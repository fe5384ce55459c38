"""Contrastive learning: two noisy views of a digit are nearer than those of two digits.

The loss compares each view with those of the whole global batch, on all ranks: ``all_gather``
brings their embeddings together, and the gradient is that of one process.

    horovodrun -np 2 hpctrain train examples/contrastive.py

contrastive_plain.py is the same in plain PyTorch.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hpctrain


class Contrastive(hpctrain.Task):
    defaults = {"train.epochs": 3, "train.batch_size": 100, "optimizer.name": "sgd",
                "optimizer.lr": 0.05, "optimizer.momentum": 0.0, "optimizer.weight_decay": 0.0,
                "schedule.name": "constant", "data.order": "none",
                "train.dtype": "float64"}  # fmt: skip
    gathers = True  # loss() calls all_gather

    def data(self, config):
        pixels = load_digits().data[:1500] / 16
        noise = np.random.default_rng(0).normal(scale=0.1, size=(2, *pixels.shape))
        return {"train": {"one": pixels + noise[0], "two": pixels + noise[1]}}

    def model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))

    def loss(self, model, batch):
        one, two = (F.normalize(model(batch[view]), dim=1) for view in ("one", "two"))
        every = self.world.all_gather(two)
        first = sum(self.world.gather_object(len(one))[: self.world.rank])
        own = torch.arange(first, first + len(one))
        return F.cross_entropy(one @ every.T / 0.1, own)
