"""Each example is its program in plain PyTorch, on one rank and on several."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.data.adopt import adopt
from hpctrain.run import configure
from hpctrain.strategies.single import Single
from hpctrain.tasks.task import load_task, make_task
from hpctrain.train.loop import Trainer
from hpctrain.train.recorder import Silent
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World
from tests.unit.threads import train_on_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"


def plain(name, monkeypatch):
    """What the plain program leaves: its model, and its metrics where it has some."""
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return runpy.run_path(str(EXAMPLES / f"{name}_plain.py"))


def trained(name, size, folder, more):
    place = str(EXAMPLES / f"{name}.py")

    def trainer(how, rank):
        config = configure([("test", {"task": place, "data": {"workers": 0, **more}})])
        store = CheckpointStore(folder / f"{rank}" / "checkpoints", 2)
        return Trainer(config, make_task(load_task(place), {}), how, store)

    if size > 1:
        return train_on_ranks(size, trainer)
    alone = trainer(Single(World(ALONE)), 0)
    alone.restore(None)
    alone.run(Silent())
    return [alone]


def discs(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["segmentation_data.py", str(folder / "discs.h5")])
    runpy.run_path(str(EXAMPLES / "segmentation_data.py"), run_name="__main__")
    return folder / "discs.h5"


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", ["tabular", "contrastive", "segmentation", "time_series"])
def test_a_task_is_the_plain_loop(name, size, tmp_path, monkeypatch):
    more = {}
    if name == "segmentation":
        adopt([discs(tmp_path, monkeypatch)], tmp_path / "discs")
        more = {"path": tmp_path / "discs"}
    wanted = plain(name, monkeypatch)
    for each in trained(name, size, tmp_path, more):
        assert isinstance(each, Trainer), each
        for key, value in wanted["model"].state_dict().items():
            torch.testing.assert_close(
                each.state.model.state_dict()[key], value, rtol=1e-10, atol=1e-10
            )
        for key, value in wanted.get("metrics", {}).items():
            assert each.state.counters.metrics[f"val_{key}"] == pytest.approx(value, abs=1e-10)


def test_two_optimizers_are_the_plain_loop(monkeypatch):
    mine = runpy.run_path(str(EXAMPLES / "gan.py"))
    for model in ("make", "judge"):
        for one, other in zip(
            mine[model].parameters(), plain("gan", monkeypatch)[model].parameters(), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
