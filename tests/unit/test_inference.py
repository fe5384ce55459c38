"""`hpctrain evaluate` and `predict`, on ranks that are threads."""

import json
import shutil

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn import metrics as sk
from torch import nn

import hpctrain
from hpctrain.cli import cli
from hpctrain.config import resolve
from hpctrain.data.writer import ShardWriter
from hpctrain.errors import Error
from hpctrain.inference.evaluate import evaluate
from hpctrain.inference.passes import Passes, Wanted, passes
from hpctrain.inference.predict import predict
from hpctrain.inference.trained_model import open_trained
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World
from tests.unit.test_ranks import single
from tests.unit.threads import on_ranks

HERE = "tests.unit.test_inference"
RNG = np.random.default_rng(5)
X = RNG.normal(size=(31, 4)).astype(np.float32)
Y = (X[:, 0] + X[:, 1] > 0).astype(np.int64)


class Told(hpctrain.Task):
    def model(self):
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))

    def data(self, config):
        return {
            "train": {"x": X, "y": Y},
            "validation": {"x": X[:9], "y": Y[:9]},
            "test": {"x": X[9:], "y": Y[9:]},
        }

    def transform(self, batch, training):
        return batch.replace(shift=batch.uniform(1)[:, 0])

    def loss(self, model, batch):
        z = model(batch["x"])
        return nn.functional.binary_cross_entropy_with_logits(z, batch["y"].to(z.dtype))

    def predictions(self, model, batch):
        z = model(batch["x"])
        return {
            "y_true": batch["y"], "y_score": z, "low": z.bfloat16(), "sure": z > 0,
            "shift": batch["shift"],
        }  # fmt: skip

    def metrics(self):
        return {"auc": sk.roc_auc_score}


class Sharded(Told):
    """Of the same model; its data are whatever shard set there is."""

    data = hpctrain.Task.data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run, and the metrics it reported."""
    folder = tmp_path_factory.mktemp("run")
    made = single(folder, Told(), batch_size=4, epochs=2, dtype="float32", ema_decay=0.5)
    (folder / "checkpoints").symlink_to(folder / "0" / "checkpoints")
    settings = {"task": f"{HERE}:Told", "data": {"workers": 0}}
    settings["train"] = {"batch_size": 4, "ema_decay": 0.5}
    (folder / "0" / "config.toml").write_text(resolve([("test", settings)]).to_toml())
    return folder / "0", made.state.counters


def over(run, size, action, split="test", batch=4):
    """What each of so many ranks gives of its passes."""
    trained = [open_trained(run, "newest", complain=pytest.fail) for _ in range(size)]

    def work(comm):
        world, mine = World(ALONE), trained[comm.rank]
        world.comm = comm
        return action(Passes(mine, mine.splits[split], world, batch))

    results = on_ranks(size, work)
    for each in results:
        if isinstance(each, BaseException):
            raise each
    return results


def test_evaluation_is_the_validation_of_the_run(run):
    for size in (1, 3):
        for found in over(run[0], size, evaluate, "validation"):
            for name, value in found.items():
                assert value == pytest.approx(run[1].metrics[f"val_{name}"], rel=1e-6)


def test_predictions_are_the_same_bytes_on_any_ranks(run, tmp_path):
    """22 samples in batches of 4: six batches, the last of two; 7 ranks, of which one has none."""
    for size in (1, 2, 3, 7):
        over(run[0], size, lambda passes, n=size: predict(passes, tmp_path / f"{n}.h5"))
    alone = (tmp_path / "1.h5").read_bytes()
    for size in (2, 3, 7):
        assert (tmp_path / f"{size}.h5").read_bytes() == alone
    assert len(list(tmp_path.iterdir())) == 4
    model = hpctrain.load(run[0], "newest")
    with h5py.File(tmp_path / "1.h5") as file, torch.no_grad():
        assert set(file) == {"y_true", "y_score", "low", "sure", "shift"}
        assert file["y_true"][()].tolist() == Y[9:].tolist()
        scores = model(torch.from_numpy(X[9:])).numpy()
        np.testing.assert_allclose(file["y_score"][()], scores, rtol=1e-5, atol=1e-6)
        assert file["sure"].dtype == bool and file["low"].dtype == np.float32
        assert len(set(file["shift"][()].tolist())) == 22
    found = over(run[0], 2, evaluate)[1]
    assert found["auc"] == pytest.approx(sk.roc_auc_score(Y[9:], scores))


def test_other_data_need_no_training_samples(run, tmp_path):
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write("test", {"x": X[:8], "y": Y[:8]})
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    config = folder / "config.toml"
    config.write_text(config.read_text().replace(":Told", ":Sharded"))
    wanted = Wanted(folder, "newest", "test", str(tmp_path / "shards"), None)
    with passes(wanted, pytest.fail) as those:
        metrics = evaluate(those)
    with torch.no_grad():
        scores = hpctrain.load(run[0], "newest")(torch.from_numpy(X[:8]))
    assert metrics["auc"] == pytest.approx(sk.roc_auc_score(Y[:8], scores))


def test_a_failure_leaves_no_file(run, tmp_path):
    def ragged(passes):
        passes.task.predictions = lambda model, batch: {"x": batch["x"][:, : len(batch["x"])]}
        predict(passes, tmp_path / "out.h5")

    with pytest.raises(Error, match="'x' with rows of"):
        over(run[0], 1, ragged)
    assert not list(tmp_path.iterdir())
    with pytest.raises(Error, match="cannot write .*HINT: check the folder"):
        over(run[0], 1, lambda passes: predict(passes, tmp_path / "none" / "out.h5"))


def test_the_commands(run, tmp_path):
    folder = str(run[0])
    result = CliRunner().invoke(cli, ["evaluate", folder, "--which", "newest", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["auc"] == pytest.approx(run[1].metrics["val_auc"])
    out = str(tmp_path / "out.h5")
    result = CliRunner().invoke(cli, ["predict", folder, "--split", "test", "--out", out])
    assert result.exit_code == 0 and "22 samples" in result.stdout, result.output
    for wanted, message in (
        (Wanted(run[0], None, "tset", None, None), "no split 'tset'.*did you mean 'test'"),
        (Wanted(run[0], None, "test", "else", None), "--data else changes nothing"),
    ):
        with pytest.raises(Error, match=message), passes(wanted, pytest.fail):
            pass
