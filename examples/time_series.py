"""Time series: a convolution foretells a series from windows of it, which share its memory.

    hpctrain train examples/time_series.py

time_series_plain.py is the same in plain PyTorch.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import hpctrain

LENGTH = 48  # what the model sees; the row after it is what it foretells


def series():
    """Two waves and noise, of shape (rows, 1)."""
    t = np.arange(2000)
    noise = np.random.default_rng(0).normal(scale=0.05, size=2000)
    return (np.sin(t / 7) + 0.5 * np.sin(t / 31) + noise)[:, None]


class Forecast(hpctrain.Task):
    defaults = {"train.epochs": 4, "train.batch_size": 64, "optimizer.name": "sgd",
                "optimizer.lr": 0.02, "optimizer.weight_decay": 0.0, "schedule.name": "constant",
                "data.order": "none", "train.dtype": "float64"}  # fmt: skip
    monitor = "rmse"

    def data(self, config):
        x = series()
        return {
            "train": hpctrain.Windows({"x": x[:1500]}, LENGTH + 1),
            "validation": hpctrain.Windows({"x": x[1500:]}, LENGTH + 1),
        }

    def model(self):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(1, 8, 8, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(88, 1)
        )

    def loss(self, model, batch):
        seen, coming = batch["x"][:, :LENGTH, 0], batch["x"][:, LENGTH]
        return F.mse_loss(model(seen[:, None]), coming)

    def predictions(self, model, batch):
        return {"error": model(batch["x"][:, None, :LENGTH, 0]) - batch["x"][:, LENGTH]}

    def metrics(self):
        return {"rmse": lambda error: error.square().mean().sqrt()}
