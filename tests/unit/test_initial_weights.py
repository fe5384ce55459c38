"""Beginning with others' weights; parts that are frozen, or have rates of their own."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.config import InitConfig, OptimizerConfig, read_settings, read_toml, resolve
from hpctrain.errors import Error
from hpctrain.optim.named import optimizer_of
from hpctrain.train.initial_weights import initialize
from tests.unit.test_optimizers import EPOCH, Line, X, Y, alike, trained, trainer_of


class Net(nn.Module):
    def __init__(self, encoder="encoder", classes=3):
        super().__init__()
        self.add_module(encoder, nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
        self.head = nn.Linear(3, classes)


def began_with(source, model=None, **init):
    model, said = model or Net(), []
    initialize(model, InitConfig(source=source, **init), said.append)
    return model, said[-1]


def refused(source, message, model=None, **init):
    model = model or Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Error, match=message) as raised:
        began_with(source, model, **init)
    assert raised.value.hint and "\n" not in str(raised.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    return raised.value.hint


def equal(model, state):
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name


@pytest.mark.parametrize("within", [None, "state_dict", "model"])
def test_files_of_torch_and_safetensors(tmp_path, within):
    theirs = Net().double().state_dict()
    torch.save({within: theirs, "epoch": 3} if within else theirs, tmp_path / "a.pt")
    save_file(dict(theirs), tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        model, said = began_with(tmp_path / name)
        equal(model, theirs)  # buffers, too, in the model's own types
        assert said.startswith("init: 9 of 9 tensors from ") and said.endswith(name)


def test_names_may_begin_otherwise(tmp_path):
    theirs = Net("backbone").state_dict()
    torch.save({f"module.{name}": value for name, value in theirs.items()}, tmp_path / "a.pt")
    hint = refused(tmp_path / "a.pt", "missing in it: 9 .* not in the model: 9 ")
    settings = re.search(r"--set '(.*)'", hint)[1]  # as it says
    assert settings == 'init.rename={"module." = ""}'
    model, _ = began_with(tmp_path / "a.pt", rename={"module.backbone.": "encoder.", "module.": ""})
    expected = {name.replace("backbone", "encoder"): value for name, value in theirs.items()}
    equal(model, expected)
    refused(tmp_path / "a.pt", "no name begins with 'modul.'", rename={"modul.": ""})
    refused(tmp_path / "a.pt", "two tensors the name", rename={"module.backbone.0": "a",
        "module.backbone.1": "a", "module.": ""})  # fmt: skip
    config = resolve([("--set", read_settings([settings]))])
    assert config.init.rename == {"module.": ""}
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert resolve([("file", read_toml(tmp_path / "config.toml"))]) == config


def test_what_does_not_fit_is_said(tmp_path):
    theirs = Net(classes=7).state_dict()
    del theirs["encoder.0.bias"]
    theirs["more"] = torch.zeros(2)
    save_file(theirs, tmp_path / "a.safetensors")
    message = (
        r"does not fit the model: missing in it: 1 \('encoder.0.bias'\); not in the model: 1 "
        r"\('more'\); of another shape: 2 \('head.weight' is \(3, 3\) in the model and \(7, 3\) "
    )
    assert "--init-partial" in refused(tmp_path / "a.safetensors", message)
    fresh = Net()
    bias = fresh.head.bias.clone()
    model, said = began_with(tmp_path / "a.safetensors", fresh, partial=True)
    assert said.startswith("init: 6 of 9 tensors") and "of another shape: 2" in said
    assert torch.equal(model.encoder[0].weight, theirs["encoder.0.weight"])
    assert torch.equal(model.head.bias, bias)


def test_a_tied_weight_is_there_by_one_of_its_names(tmp_path):
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.again = self.head

    save_file(Net().state_dict(), tmp_path / "a.safetensors")
    assert "11 tensors" in began_with(tmp_path / "a.safetensors", Tied())[1]


class Evil:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Evil(), "more than tensors and plain values"),
        ([torch.ones(1)], "holds a list"),
        ({"epoch": 3}, "has no tensor by name"),
        (None, "does not exist"),
        (b"not one of them", "no file of torch.save|cannot be read"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, content, message, capsys):
    if isinstance(content, bytes):
        (tmp_path / "a.pt").write_bytes(content)
        (tmp_path / "b.safetensors").write_bytes(content)
        refused(tmp_path / "b.safetensors", "cannot be read as weights")
    elif content is not None:
        torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", message)
    assert "executed" not in capsys.readouterr().out
    refused(tmp_path, "no checkpoint, and no run")


def test_of_a_run_the_averaged_weights(tmp_path):
    train = {"dtype": "float64", "batch_size": 8, "epochs": 2, "ema_decay": 0.5}
    run, _ = trained(tmp_path / "a", train=train)
    model, said = began_with(tmp_path / "a", Line().model().double())
    store = CheckpointStore(tmp_path / "a" / "checkpoints", 1)
    assert store.best() is not None and "averaged weights" in said
    if run.state.counters.best["step"] == run.state.counters.step:
        alike(model, run.state.ema.module)


def frozen_run(tmp_path, **train):
    fixed = {"dtype": "float64", "batch_size": 8, "epochs": 2, "freeze": ["0.*"]}
    return trained(
        tmp_path,
        train={**fixed, **train},
        optimizer={"name": "AdamW", "lr": 0.05},
        schedule={"name": "constant"},
    )[0]


def test_frozen_parts_and_unfrozen_ones(tmp_path):
    start = trainer_of(tmp_path / "start").state.model
    never = frozen_run(tmp_path / "a").state.model
    assert torch.equal(never[0].weight, start[0].weight)
    assert not torch.equal(never[2].weight, start[2].weight)

    whole = frozen_run(tmp_path / "b", unfreeze_at_step=4).state.model
    optimizer = torch.optim.AdamW(
        [
            {"params": [start[0].weight, start[2].weight]},
            {"params": [start[0].bias, start[2].bias], "weight_decay": 0.0},
        ],
        lr=0.05,
    )
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    for step in range(2 * EPOCH):
        start[0].requires_grad_(step >= 4)
        place = step % EPOCH * 8
        optimizer.zero_grad()
        (start(x[place : place + 8]) - y[place : place + 8]).square().mean().backward()
        optimizer.step()
    alike(whole, start)


def test_unfreezing_is_resumed(tmp_path):
    whole = frozen_run(tmp_path / "a", unfreeze_at_step=2)
    snapshot = frozen_run(tmp_path / "b", unfreeze_at_step=2, epochs=1).state.state_dict()
    rest, _ = trained(
        tmp_path / "c",
        snapshot=snapshot,
        train={"dtype": "float64", "batch_size": 8, "epochs": 2, "freeze": ["0.*"],
            "unfreeze_at_step": 2},
        optimizer={"name": "AdamW", "lr": 0.05},
        schedule={"name": "constant"},
    )  # fmt: skip
    alike(rest.state.model, whole.state.model)


def test_rates_by_pattern():
    model = Net()
    config = OptimizerConfig(
        lr=0.1,
        groups=[
            {"match": "head.*", "lr": 0.5, "eps": 1e-5},
            {"match": ["*.bias", "encoder.0.*"], "weight_decay": 0.3},
        ],
    )
    made = optimizer_of(config, model)
    names = {p: name for name, p in model.named_parameters()}
    found = {
        names[p]: (group["lr"], group["weight_decay"], group["eps"])
        for group in made.param_groups
        for p in group["params"]
    }
    assert found == {
        "head.weight": (0.5, 0.01, 1e-5),
        "head.bias": (0.5, 0.0, 1e-5),
        "encoder.0.weight": (0.1, 0.3, 1e-8),
        "encoder.0.bias": (0.1, 0.0, 1e-8),
        "encoder.1.weight": (0.1, 0.0, 1e-8),
        "encoder.1.bias": (0.1, 0.0, 1e-8),
    }


def test_rates_by_pattern_are_scheduled_and_recorded(tmp_path):
    _, rates = trained(
        tmp_path,
        train={"steps": 2, "batch_size": 8},
        optimizer={"lr": 0.2, "groups": [{"match": "2.*", "lr": 0.4}]},
        schedule={"name": "linear"},
    )
    assert rates[1] == pytest.approx({"lr": 0.1, "lr_1": 0.1, "lr_2": 0.2, "lr_3": 0.2})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"freeze": ["O.*"]}}, "train.freeze: no parameter is called 'O"),
        ({"train": {"freeze": ["*"]}}, "no parameter that requires a gradient"),
        ({"train": {"unfreeze_at_step": 3}}, "nothing is frozen"),
        ({"optimizer": {"groups": [{"match": "haed.*"}]}}, "no parameter is called 'haed"),
        ({"optimizer": {"groups": [{"match": "0.*", "beta": 1}]}}, "no option 'beta'.*'betas'"),
        ({"optimizer": {"groups": [{"lr": 1}]}}, "optimizer.groups = .*Field required"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, sections, message):
    with pytest.raises(Error, match=message) as raised:
        trainer_of(tmp_path, **sections)
    assert raised.value.hint and "\n" not in str(raised.value)
