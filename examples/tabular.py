"""Tabular data: a perceptron that finds malignant tumours, judged by its AUC and F1.

    hpctrain train examples/tabular.py
    horovodrun -np 2 hpctrain train examples/tabular.py

tabular_plain.py is the same in plain PyTorch.
"""

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn
from torch.nn import functional as F

import hpctrain

HELD = 169  # rows that the model is judged on


class Tumours(hpctrain.Task):
    defaults = {"train.epochs": 15, "train.batch_size": 50, "optimizer.lr": 1e-3,
                "schedule.name": "constant", "data.order": "none",
                "train.dtype": "float64"}  # fmt: skip
    monitor, mode = "auc", "max"

    def data(self, config):
        x, y = load_breast_cancer(return_X_y=True)
        x = (x - x[HELD:].mean(0)) / x[HELD:].std(0)
        return {
            "train": {"x": x[HELD:], "benign": y[HELD:]},
            "validation": {"x": x[:HELD], "benign": y[:HELD]},
        }

    def model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0))

    def loss(self, model, batch):
        return F.binary_cross_entropy_with_logits(model(batch["x"]), batch["benign"].double())

    def predictions(self, model, batch):
        return {"score": model(batch["x"]), "benign": batch["benign"]}

    def metrics(self):  # of the whole set, on any number of ranks
        return {
            "auc": lambda score, benign: roc_auc_score(benign, score),
            "f1": lambda score, benign: f1_score(benign, score > 0),
        }
