"""Metrics of a whole set are scikit-learn's, however its samples are divided."""

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import nn
from torch.nn import functional as F

from hpctrain.errors import Error
from hpctrain.tasks.task import Task
from hpctrain.train.loop import Trainer
from hpctrain.train.set_metrics import SetMetrics
from hpctrain.world.communicator import Alone
from tests.unit.test_ranks import on, single

RNG = np.random.default_rng(1)
X, Y = RNG.normal(size=(19, 4)), RNG.integers(0, 3, 19)
VX = RNG.normal(size=(13, 4))
VY = (VX[:, 0] > 0).astype(int) + (VX[:, 1] > 0)


class Perplexity:
    """Of a state that sums."""

    def __init__(self):
        self.reset()

    def update(self, logits, target):
        self.sum += F.cross_entropy(logits, target, reduction="sum").double()
        self.count += len(target)

    def compute(self):
        return (self.sum / self.count).exp()

    def reset(self):
        self.sum, self.count = torch.zeros((), dtype=torch.float64), 0


class IoU:
    """Of a confusion matrix; several numbers."""

    def __init__(self, classes):
        self.classes = classes
        self.reset()

    def update(self, target, logits, weight=None):
        assert weight is None
        places = target * self.classes + logits.argmax(1)
        self.table += places.bincount(minlength=self.classes**2).view(self.table.shape)

    def compute(self):
        both = self.table.diag()
        each = both / (self.table.sum(0) + self.table.sum(1) - both)
        return {**{f"of_{k}": v for k, v in enumerate(each)}, "mean": each.mean()}

    def reset(self):
        self.table = torch.zeros(self.classes, self.classes, dtype=torch.int64)


def f1(logits, target):
    return sk.f1_score(target, logits.argmax(1), average="macro")


class Judged(Task):
    monitor, mode = "auc", "max"

    def model(self):
        return nn.Linear(4, 3)

    def data(self, config):
        return {"train": {"x": X, "y": Y}, "validation": {"x": VX, "y": VY}}

    def loss(self, model, batch):
        return F.cross_entropy(model(batch["x"]), batch["y"])

    def predictions(self, model, batch):
        logits = model(batch["x"])
        scores = logits.softmax(1)
        return {
            "logits": logits, "target": batch["y"], "y_true": batch["y"] == 1,
            "y_score": scores[:, 1], "y_pred": scores[:, 1],
        }  # fmt: skip

    def metrics(self):
        return {
            "auc": sk.roc_auc_score, "r2": sk.r2_score, "f1": f1, "perplexity": Perplexity(),
            "iou": IoU(3),
        }  # fmt: skip


def expected(model):
    logits = model.double()(torch.tensor(VX)).detach()
    scores, chosen = logits.softmax(1).numpy(), logits.argmax(1)
    each = sk.jaccard_score(VY, chosen, average=None)
    return {
        "auc": sk.roc_auc_score(VY == 1, scores[:, 1]),
        "r2": sk.r2_score(VY == 1, scores[:, 1]),
        "f1": sk.f1_score(VY, chosen, average="macro"),
        "perplexity": np.exp(sk.log_loss(VY, scores)),
        "iou_mean": each.mean(),
        **{f"iou_of_{k}": value for k, value in enumerate(each)},
    }


@pytest.mark.parametrize("size", [1, 2, 3])
def test_metrics_of_a_set_are_scikit_learns(tmp_path, size):
    """Batches of 4 samples over 3 ranks, and a last one of one: some ranks have none."""
    settings = {"batch_size": 4, "epochs": 2, "accumulate": 2}
    if size == 1:
        trained = [single(tmp_path, Judged(), **settings)]
    else:
        trained = on(size, tmp_path, Judged, **settings)
    for each in trained:
        assert isinstance(each, Trainer), each
        counters = each.state.counters
        for name, value in expected(each.state.model).items():
            assert counters.metrics[f"val_{name}"] == pytest.approx(value, abs=1e-6), name
        assert counters.best["metrics"]["val_auc"] >= counters.metrics["val_auc"]


def test_torchmetrics_as_they_are():
    torchmetrics = pytest.importorskip("torchmetrics")

    class Task(Judged):
        def metrics(self):
            return {"iou": torchmetrics.JaccardIndex("multiclass", num_classes=3)}

        def predictions(self, model, batch):
            return {"preds": batch["x"][:, :3], "target": batch["y"]}

    found = measured(Task())
    assert found["iou"] == pytest.approx(sk.jaccard_score(VY, VX[:, :3].argmax(1), average="macro"))


class Rows:
    """Of a batch, what is used of it."""

    samples = 13

    def to(self, device, dtype):
        return {"x": torch.tensor(VX), "y": torch.tensor(VY)}


def measured(task, means=()):
    of_set = SetMetrics(task, torch.device("cpu"), "float32")
    of_set.reset()
    of_set.add(nn.Linear(4, 3).double(), Rows())
    of_set.gather(Alone())
    return of_set.join(dict(means))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": lambda self: [1]}, "metrics.. of task Mine returned a list"),
        ({"metrics": lambda self: {"lr": f1}}, "a metric of the name 'lr'"),
        ({"metrics": lambda self: {"a": Perplexity}}, "'a', which is no metric"),
        ({"metrics": lambda self: {"a": 0.5}}, "'a', which is no metric"),
        ({"metrics": lambda self: {"a": lambda targt: 0}}, "takes 'targt', .*mean 'target'"),
        ({"metrics": lambda self: {"a": lambda x=0: 0}}, "takes '..rows', which predictions"),
        ({"metrics": lambda self: {"a": lambda target: target}}, r"'a' .*of shape \(13,\), not a"),
        ({"metrics": lambda self: {"a": lambda target: "b"}}, "'a' .*a str, not a number"),
        ({"metrics": lambda self: {"mine": lambda target: 1}}, "'mine' .*given twice"),
        ({"predictions": Task.predictions}, r"must define predictions\(model, batch\)"),
        ({"predictions": lambda self, m, b: b["y"]}, r"returned a tensor of shape \(13,\)"),
        ({"predictions": lambda self, m, b: {"a": b["y"][:2]}}, r"shape \(2,\) for 13 samples"),
        ({"predictions": lambda self, m, b: {"a": 1.0}}, "gives 'a' as a float"),
    ],
)
def test_what_is_no_metric_is_refused_in_a_line(changes, message):
    with pytest.raises(Error, match=message) as raised:
        measured(type("Mine", (Judged,), changes)(), {"mine": 1.0})
    assert raised.value.hint and "\n" not in str(raised.value)


def test_rows_of_other_shapes_are_refused(tmp_path):
    class Padded(Judged):
        def metrics(self):
            return {"n": lambda tokens: len(tokens)}

        def predictions(self, model, batch):
            return {"tokens": torch.zeros(len(batch["x"]), 2 + int(batch["x"][0, 0] > 0))}

    Padded.monitor = "loss"
    for error in on(2, tmp_path, Padded, batch_size=4, epochs=1):
        assert isinstance(error, Error) and "'tokens' with rows of shape" in error.message
