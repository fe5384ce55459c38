"""One batch through all of a training: what is said, and that nothing is written."""

import re

import pytest
import torch

from hpctrain.errors import Error
from hpctrain.run import configure
from hpctrain.train.dry_run import dry_run

TASK = """
import numpy as np
import torch
from torch import nn
import hpctrain

X = np.random.default_rng(0).normal(size=(40, 3)).astype("float32")


class Mine(hpctrain.Task):
    monitor = "spread"

    def data(self, config):
        return {"train": {"x": X, "y": X[:, :1]}, "validation": {"x": X[:9], "y": X[:9, :1]}}

    def transform(self, batch, training):
        return batch.replace(x=batch["x"].double())

    def model(self):
        return nn.Linear(3, 1)

    def loss(self, model, batch):
        error = (model(batch["x"]) - batch["y"]).square()
        return LOSS

    def predictions(self, model, batch):
        return {"score": model(batch["x"])}

    def metrics(self):
        return {"spread": lambda score: METRIC}

    def scheduler(self):
        pass
"""


def rehearsed(folder, monkeypatch, loss="error.mean()", metric="score.std()", **more):
    monkeypatch.chdir(folder)
    (folder / "mine.py").write_text(TASK.replace("LOSS", loss).replace("METRIC", metric))
    said = []
    train = {"batch_size": 16, "epochs": 4, **more.pop("train", {})}
    config = configure([("test", {"task": "mine.py", "train": train, **more})])
    try:
        dry_run(config, said.append)
    finally:
        left = sorted(path.name for path in folder.iterdir())
        assert left in (["mine.py"], ["__pycache__", "mine.py"])
    return "\n".join(said)


def test_says_what_a_training_would_do(tmp_path, monkeypatch):
    text = rehearsed(tmp_path, monkeypatch, world_size=2, strategy="horovod")
    for line in (
        "warning: nothing reads Mine.scheduler: did you mean schedule(optimizer)?",
        "split 'train': 40 samples",
        "batch of 8: x float64 (8, 3), y float32 (8, 1)",  # one of two ranks' part
        "model: 4 parameters of float32 in 2 tensors, 4 of them trained",
        "optimizer: AdamW, lr 0.001; schedule: cosine",
        "validation of 8: loss ",
        "memory: model 16 B, gradients 16 B, optimizer 40 B; this process had at most ",
    ):
        assert line in text
    assert re.search(r"step: loss \d", text) and re.search(r"spread 0\.\d", text)
    assert re.search(r"time: [\d.e+-]+ ms a step; 20 steps take about ", text)
    assert text.endswith("nothing was written.")


def test_what_only_a_whole_set_has_is_no_failure(tmp_path, monkeypatch):
    text = rehearsed(tmp_path, monkeypatch, metric="[][1]")
    assert "warning: metrics() of one batch: IndexError" in text
    text = rehearsed(tmp_path, monkeypatch, loss="error.mean() / 0")
    assert "warning: the loss is no number" in text


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("None", "returned None"),
        ("error.mean().item()", "takes the gradient away"),
        ("error[:, 0]", r"tensor of shape \(16,\). HINT: return its mean .*mean"),
        ("(error.mean(), error)", "a tuple of 2: .* HINT: return the loss alone"),
        ("{'loss': error.mean()}", """a dict with loss. HINT: return what it has as "loss\""""),
        (
            "__import__('types').SimpleNamespace(loss=error.mean())",
            "a SimpleNamespace. HINT: return its attribute `loss`",
        ),
        ("error @ error", "a training step of task Mine failed: RuntimeError: .*line 24 of mine"),
    ],
)
def test_what_fails_is_said_in_a_line(tmp_path, monkeypatch, loss, message):
    with pytest.raises(Error, match=message) as raised:
        rehearsed(tmp_path, monkeypatch, loss=loss)
    assert raised.value.hint and "\n" not in str(raised.value) and raised.value.exit_code == 2


def test_begins_with_given_weights(tmp_path, monkeypatch):
    folder = tmp_path / "other"
    folder.mkdir()
    torch.save({"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, folder / "a.pt")
    (tmp_path / "run").mkdir()
    text = rehearsed(tmp_path / "run", monkeypatch, init={"source": str(folder / "a.pt")})
    assert "init: 2 of 2 tensors" in text
