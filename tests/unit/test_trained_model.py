"""Models out of runs: hpctrain.load, and what `hpctrain export` writes."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

import hpctrain
from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.checkpoint.weights import export, read_weights
from hpctrain.cli import cli
from hpctrain.config import resolve
from hpctrain.errors import Error
from hpctrain.train.model_setup import averaged

HERE = "tests.unit.test_trained_model"


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(2, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 2)
        self.last.weight = nn.Parameter(torch.zeros(2, width))
        self.tied = nn.Linear(width, 2, bias=False)
        self.tied.weight = self.last.weight

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


@dataclass
class Learns(hpctrain.Task):
    """Its model depends on an option, and on its data."""

    extra: int = 0
    width: int = 3
    there = True

    def data(self, config):
        if not self.there:
            raise FileNotFoundError("no samples.npy")
        self.width = 5
        x = torch.ones(4, 2)
        return {"train": {"x": x}}

    def model(self):
        return Net(self.width + self.extra)

    def loss(self, model, batch):
        return model(batch["x"]).sum()


def run_of(folder, *, ema=None, best=True, dtype="float32", width=6):
    """The folder of a run that has saved steps 1 (best) and 2; and the models it saved."""
    settings = {"task": f"{HERE}:Learns", "options": {"extra": 1}, "train": {"dtype": dtype}}
    if ema:
        settings["train"]["ema_decay"] = ema
    folder.mkdir()
    (folder / "config.toml").write_text(resolve([("test", settings)]).to_toml())
    store = CheckpointStore(folder / "checkpoints", keep=2)
    saved = []
    torch.manual_seed(0)
    for step in (1, 2):
        model = Net(width).to(torch.float64 if dtype == "float64" else torch.float32)
        model.norm.running_mean.fill_(step)
        mean = averaged(Net(width).to(model.last.weight.dtype), ema) if ema else None
        state = {"model": model.state_dict(), "ema": mean and mean.state_dict(), "optimizer": {}}
        store.save(step, state, best=best and step == 1)
        saved.append(mean.module if mean else model)
    store.wait()
    return saved


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_model_of_a_run(tmp_path, ema, dtype):
    first, second = run_of(tmp_path / "run", ema=ema, dtype=dtype)
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    found = hpctrain.load(tmp_path / "run")
    assert type(found) is Net and not any(module.training for module in found.modules())
    assert same(found, first) and found.tied.weight is found.last.weight
    assert same(hpctrain.load(str(tmp_path / "run"), "best"), first)
    assert same(hpctrain.load(tmp_path / "run", "newest"), second)
    assert same(hpctrain.load(tmp_path / "run" / "checkpoints" / "step-00000002"), second)
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_what_cannot_be_loaded_is_one_line(tmp_path, monkeypatch):
    run_of(tmp_path / "run", best=False)
    assert hpctrain.load(tmp_path / "run").norm.running_mean[0] == 2
    for given, which, said in (
        ("run", "best", "has no best checkpoint: nothing was validated. HINT: take the newest"),
        ("run", "last", "'last' is no checkpoint of a run. HINT: say best or newest"),
        ("none", None, "is no checkpoint, and no run that has one"),
    ):
        with pytest.raises(Error, match=said):
            hpctrain.load(tmp_path / given, which)
    monkeypatch.setattr(Learns, "there", False)
    with pytest.raises(Error, match=r"cannot be made without its data: no samples.npy. HINT: have"):
        hpctrain.load(tmp_path / "run")
    run_of(tmp_path / "wide", width=4)  # which is what the task makes without data
    assert same(hpctrain.load(tmp_path / "wide"), hpctrain.load(tmp_path / "wide", "best"))
    monkeypatch.setattr(Learns, "there", True)
    with pytest.raises(
        Error, match="is of another model than task .*Learns makes: .*size mismatch"
    ):
        hpctrain.load(tmp_path / "wide")
    (tmp_path / "run" / "config.toml").unlink()
    with pytest.raises(Error, match="is not in a run's folder"):
        hpctrain.load(tmp_path / "run")


def test_a_damaged_newest_has_the_one_before_taken(tmp_path):
    first, _ = run_of(tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged: it has .* Going back to the one before"):
        assert same(hpctrain.load(tmp_path / "run", "newest"), first)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_export(tmp_path, ema):
    """Plain safetensors, which torch alone loads into the model's own class."""
    first, second = run_of(tmp_path / "run", ema=ema)
    out = tmp_path / "model.safetensors"
    kind = "averaged weights (train.ema_decay)" if ema else "weights"
    for arguments, model, step in (([], first, 1), (["--which", "newest"], second, 2)):
        result = CliRunner().invoke(cli, ["export", str(tmp_path / "run"), str(out), *arguments])
        assert result.exit_code == 0, result.output
        assert f"{out}: {kind} of " in result.output and f"step-0000000{step}," in result.output
        other = Net(6)
        other.load_state_dict(load_file(out))
        assert same(other, model)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_safetensors_does_not_know(tmp_path):
    state = {"a": torch.ones(2), "layer._extra_state": {"seen": 3}}
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    store.save(1, {"model": state, "ema": None})
    store.save(2, {"model": {"a": torch.ones(2, dtype=torch.complex128)}, "ema": None})
    store.wait()
    weights = read_weights(store.path(1), None, pytest.fail)
    assert export(weights, tmp_path / "f") == ["layer._extra_state"]
    assert list(load_file(tmp_path / "f")) == ["a"]
    with pytest.raises(Error, match="'a' is of torch.complex128 .* HINT: take the model by"):
        export(read_weights(store.path(2), None, pytest.fail), tmp_path / "g")
    with pytest.raises(Error, match="cannot write .*none/f"):
        export(weights, tmp_path / "none" / "f")
    store.save(3, {"other": 1})
    store.wait()
    with pytest.raises(Error, match="has no model"):
        read_weights(store.path(3), None, pytest.fail)
