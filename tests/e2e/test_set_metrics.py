"""Metrics of a whole set, `evaluate` and `predict`, as a user meets them."""

import json

import h5py
import pytest
from sklearn.metrics import roc_auc_score

from tests.e2e.conftest import result_of

TASK = """
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F
import hpctrain


class Auc(hpctrain.Task):
    monitor, mode = "auc", "max"
    defaults = {"train.epochs": 1, "train.batch_size": 64, "optimizer.lr": 1e-3}

    def data(self, config):
        x, y = load_breast_cancer(return_X_y=True)
        x = (x - x.mean(0)) / x.std(0)
        return {"train": {"x": x[:440], "y": y[:440]}, "validation": {"x": x[440:], "y": y[440:]}}

    def model(self):
        return nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))

    def loss(self, model, batch):
        return F.binary_cross_entropy_with_logits(model(batch["x"]), batch["y"].float())

    def predictions(self, model, batch):
        return {"y_true": batch["y"], "y_score": model(batch["x"])}

    def metrics(self):
        return {"auc": roc_auc_score}
"""


@pytest.mark.parametrize("strategy", ["horovod", "ps"])
def test_auc_of_the_whole_set(hpctrain, strategy):
    (hpctrain.folder / "auc.py").write_text(TASK)
    hpctrain.train(
        "auc.py", "--strategy", strategy, "--out", "run", "--set", "log.tensorboard=false", ranks=2
    )
    metrics = result_of(hpctrain.folder / "run")["metrics"]
    done = hpctrain("predict", "run", "--which", "newest", "--out", "alone.h5")
    assert done.returncode == 0, done.stdout
    with h5py.File(hpctrain.folder / "alone.h5") as file:
        auc = roc_auc_score(file["y_true"], file["y_score"])
    assert metrics["final"]["val_auc"] == pytest.approx(auc)
    assert metrics["best"]["metrics"]["val_auc"] == metrics["final"]["val_auc"]
    if strategy == "horovod":
        words = ["run", "--which", "newest"]
        done = hpctrain("predict", *words, "--out", "two.h5", ranks=2)
        assert done.returncode == 0, done.stdout
        alone, two = (hpctrain.folder / f"{name}.h5" for name in ("alone", "two"))
        assert alone.read_bytes() == two.read_bytes()
        done = hpctrain("evaluate", *words, "--json", ranks=2)
        assert json.loads(done.stdout.splitlines()[-1])["auc"] == pytest.approx(auc), done.stdout
