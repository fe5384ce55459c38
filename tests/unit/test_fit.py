"""A training in a function, as of a notebook."""

import sys

import numpy as np
import pytest
from torch import nn

import hpctrain
from hpctrain.errors import Error
from hpctrain.process import run
from tests.waiting import SECONDS


class Line(hpctrain.Task):
    defaults = {"train.steps": 4, "train.batch_size": 8, "log.tensorboard": False}

    def data(self, config):
        return {"train": {"x": np.ones((32, 2), "float32")}}

    def model(self):
        return nn.Linear(2, 1)

    def loss(self, model, batch):
        return model(batch["x"]).square().mean()


def test_a_class_is_trained_resumed_and_loaded(tmp_path, capsys):
    folder = hpctrain.fit(Line, {"optimizer.lr": 0.01}, out=tmp_path / "run")
    assert folder == tmp_path / "run" and (folder / "result.json").exists()
    assert isinstance(hpctrain.load(folder), nn.Linear)
    hpctrain.fit(Line, {"optimizer.lr": 0.01, "train.steps": 6}, out=folder, resume=True)
    assert "step 4 of 6" in capsys.readouterr().out


def test_a_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = hpctrain.fit(Line), hpctrain.fit(Line)
    assert first != second and first.parent.name == "runs" and (second / "result.json").exists()


@pytest.mark.slow
def test_a_class_of_a_notebooks_cell(tmp_path):
    """Which is one of the module __main__, that no file need hold."""
    cell = (
        "import hpctrain\n"
        "from hpctrain.tasks.digits import Digits\n"
        "class Mine(Digits):\n    channels: int = 4\n"
        f"run = hpctrain.fit(Mine, {{'train.steps': 2}}, out={str(tmp_path / 'run')!r})\n"
        "assert hpctrain.load(run)[1].out_channels == 16\n"
    )
    done = run([sys.executable, "-c", cell], timeout_seconds=SECONDS)
    assert done.returncode == 0, done.stdout


def test_mistakes_are_one_line(tmp_path):
    class Inner(Line):
        pass

    for task, settings, message in (
        (Inner, {}, "defined within a function"),
        (Line, {"train.epoch": 1}, "unknown key 'train.epoch'"),
        ("digit", {}, "did you mean 'digits'"),
    ):
        with pytest.raises(Error, match=message):
            hpctrain.fit(task, settings, out=tmp_path / "run")
