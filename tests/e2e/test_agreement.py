"""Ranks that are not alike are refused at the start, in one line that says what differs."""

import os

import pytest

from hpctrain.process import run
from tests.waiting import SECONDS

TASK = """
import hpctrain
from hpctrain.world.launcher import detect
import numpy as np
from torch import nn

class Mine(hpctrain.Task):
    defaults = {"train.epochs": 2, "train.batch_size": 20}

    def model(self):
        return nn.Linear(6, 1, bias=not BIAS or detect().rank == 0)

    def data(self, config):
        x = np.random.randn(80, 6)[:: -1 if DATA and detect().rank else 1]
        return {"train": {"x": x}, "validation": {"x": x[:9]}}

    def loss(self, model, batch):
        return model(batch["x"]).square().mean()
"""
# Variables of one rank alone.
ONLY = 'test "${OMPI_COMM_WORLD_RANK:-$PMI_RANK}" = 1 && export "$0"; exec "$@"'


def refused(hpctrain, *arguments, ranks=2, only="NOTHING=1"):
    command = ["sh", "-c", ONLY, only, "hpctrain", "train", *arguments, "--out", "run"]
    result = run(
        [*hpctrain.prefix(ranks), *command],
        timeout_seconds=SECONDS, cwd=hpctrain.folder, env=dict(os.environ),
    )  # fmt: skip
    assert result.returncode == 2, result.stdout
    assert "Traceback" not in result.stdout
    assert not (hpctrain.folder / "run" / "result.json").exists()
    return result.stdout


@pytest.mark.parametrize(
    ("arguments", "variable", "message"),
    [
        (["digits"], "HPCTRAIN__OPTIMIZER__LR=0.5",
         "ranks differ in optimizer.lr: rank 0 has 0.005, rank 1 has 0.5."),
        (["digits"], "HPCTRAIN__TRAIN__EPOCHS=3",
         "ranks differ in train.epochs: rank 0 has 20, rank 1 has 3."),
    ],
)  # fmt: skip
def test_other_settings(hpctrain, arguments, variable, message):
    assert message in refused(hpctrain, *arguments, only=variable)


@pytest.mark.parametrize(
    ("data", "bias", "message"),
    [
        (1, 0, "ranks differ in the samples of split 'train': rank 0 has 80 samples, digest "),
        (0, 1, "differ in parameter 'bias': rank 0 has float32 of shape (1,), trained, in group"),
    ],
)
def test_other_samples_and_models(hpctrain, data, bias, message):
    text = TASK.replace("DATA", str(data)).replace("BIAS", str(bias))
    (hpctrain.folder / "mine.py").write_text(text)
    assert message in refused(hpctrain, "mine.py")


def test_alike_they_draw_the_same_split(hpctrain):
    (hpctrain.folder / "mine.py").write_text(TASK.replace("DATA", "0").replace("BIAS", "0"))
    hpctrain.train("mine.py", "--out", "run", ranks=2)
