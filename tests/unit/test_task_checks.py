"""What a task gives is trained as it is meant, or refused in one line."""

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain.checkpoint.store import CheckpointStore
from hpctrain.config import resolve
from hpctrain.errors import Error
from hpctrain.strategies.single import Single
from hpctrain.tasks.checks import model_of, no_means, warnings_of
from hpctrain.tasks.task import Task, load_task, make_task
from hpctrain.train.loop import Trainer
from hpctrain.train.model_setup import averaged, begin_training, evaluating, prepared
from hpctrain.train.recorder import Silent
from hpctrain.world.launcher import ALONE
from hpctrain.world.world import World
from tests.waiting import SECONDS

X = np.random.default_rng(0).normal(size=(20, 3))


class Line(Task):
    def model(self):
        return nn.Linear(3, 1)

    def data(self, config):
        return {"train": {"x": X}, "validation": {"x": X[:5]}}

    def loss(self, model, batch):
        return self.give(model(batch["x"]).square().mean())

    def give(self, loss):
        return loss


def trainer(folder, task, **train):
    settings = {"batch_size": 8, "epochs": 1, **train}
    config = resolve([("test", {"train": settings, "data": {"workers": 0}})])
    store = CheckpointStore(folder / "checkpoints", 2)
    made = Trainer(config, task, Single(World(ALONE)), store)
    made.restore(None)
    return made


def refuses(folder, message, **methods):
    task = type("Mine", (Line,), methods)()
    with pytest.raises(Error, match=message) as raised:
        trainer(folder, task).run(Silent())
    assert raised.value.exit_code == 2 and raised.value.hint
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda loss: None, r"returned None \(is a `return` missing\?\)"),
        (lambda loss: loss.item(), "returned a float .*takes the gradient away"),
        (lambda loss: {"loss": loss}, "returned a dict with loss"),
        (lambda loss: loss.expand(4), r"returned a tensor of shape \(4,\)"),
        (lambda loss: (loss, loss), "returned a tuple of 2: Tensor, Tensor"),
        (lambda loss: [loss], "returned a list of 1: Tensor"),
        (lambda loss: loss.detach(), "a loss without gradient"),
        (lambda loss: loss.to(torch.complex64), "returned a complex tensor"),
        (lambda loss: (loss, {"v": torch.zeros(3)}), r"metric 'v' as a tensor of shape \(3,\)"),
        (lambda loss: (loss, {"v": [1.0]}), "metric 'v' as a list of 1: float"),
        (lambda loss: (loss, {"v": "text"}), "metric 'v' as a str"),
        (lambda loss: (loss, {"lr": 1.0}), "a metric of the name 'lr', which records have of"),
        (lambda loss: (loss, {"loss": 1.0}), "a metric of the name 'loss'"),
        (lambda loss: (loss, {3: 1.0}), "a metric of the name 3, which is not text"),
    ],
)
def test_what_loss_returns(tmp_path, give, message):
    refuses(tmp_path, message, give=lambda self, loss: give(loss))


def test_numbers_of_all_kinds_are_metrics(tmp_path):
    values = {
        "float": 0.5, "int": 2, "bool": True, "numpy": np.float32(1.5), "zero_d": np.array(2.0),
        "tensor": torch.tensor(3), "one": torch.ones(1), "half": torch.tensor(0.5).bfloat16(),
    }  # fmt: skip
    task = type("Mine", (Line,), {"give": lambda self, loss: (loss.reshape(1), values)})()
    made = trainer(tmp_path, task)
    made.run(Silent())
    for name, value in values.items():
        assert made.state.counters.metrics[f"train_{name}"] == float(value)


@pytest.mark.parametrize(
    ("split", "meant"),
    [("val", "validation"), ("valid", "validation"), ("validaton", "validation"),
     ("dev", "validation"), ("training", "train")],
)  # fmt: skip
def test_a_split_that_nothing_reads(tmp_path, split, meant):
    def data(self, config):
        rest = {"train": {"x": X}} if meant != "train" else {}
        return {**rest, split: {"x": X}}

    refuses(tmp_path, f"gives '{split}', which nothing reads. .*did you mean '{meant}'", data=data)


def test_samples_models_and_optimizers_of_other_kinds(tmp_path):
    refuses(tmp_path, "returned a tuple of 2: dict, dict", data=lambda self, c: ({}, {}))
    refuses(tmp_path, "'train' of task Mine is a list", data=lambda self, c: {"train": [1, 2]})
    refuses(tmp_path, "nothing to train on", data=lambda self, c: {"validation": {"x": X}})
    refuses(tmp_path, "returned None.*`return` missing", model=lambda self: None)
    refuses(tmp_path, "not its class", model=lambda self: nn.Linear)
    refuses(tmp_path, "meta device", model=lambda self: nn.Linear(3, 1, device="meta"))
    frozen = nn.Linear(3, 1).requires_grad_(False)
    refuses(tmp_path, "no parameter that requires", model=lambda self: frozen)
    refuses(tmp_path, "optimizer.. of task Mine returned a list", optimizer=lambda self, m, c: [])
    refuses(tmp_path, "no field 'X'. HINT: .*x", loss=lambda self, m, batch: batch["X"])
    refuses(tmp_path, "transform.. returned None", transform=lambda self, batch, training: None)
    refuses(
        tmp_path,
        "'x' has 1 rows after transform",
        transform=lambda self, batch, training: batch.replace(x=batch["x"][:1]),
    )
    kept = type("Kept", (Line,), {"transform": lambda self, b, t: {"x": b["x"] * 2}})()
    trainer(tmp_path / "kept", kept).run(Silent())
    lazy = type("Lazy", (Line,), {"model": lambda self: nn.LazyLinear(1)})()
    with pytest.raises(Error, match="'weight' of the model of task Lazy has no shape yet"):
        model_of(lazy, ranks=2)
    with pytest.raises(Error, match=r"task Task must define model\(\)"):
        Task().model()


def test_patience_without_validation(tmp_path):
    task = type("Mine", (Line,), {"data": lambda self, c: {"train": {"x": X}}})()
    with pytest.raises(Error, match=r"train.patience is set, but task Mine has no validation"):
        trainer(tmp_path, task, patience=2)


def test_what_nothing_reads_is_named():
    class Habits(Line):
        defualts = {}

        def on_epoch_end(self): ...
        def validation_step(self, model, batch): ...
        def predict_step(self, batch): ...
        def validation_epoch_end(self, outputs): ...
        def helper(self): ...

    assert warnings_of(Habits()) == [
        "nothing reads Habits.defualts: did you mean defaults?",
        "Habits.on_epoch_end() is called by nothing: there are no hooks.",
        "nothing reads Habits.validation_step: did you mean loss(model, batch)?",
        "nothing reads Habits.predict_step: did you mean predictions(model, batch)?",
        "nothing reads Habits.validation_epoch_end: did you mean metrics()?",
    ]
    assert warnings_of(Line()) == []


def test_settings_that_a_task_does_not_read_are_named(tmp_path):
    class Own(Line):
        defaults = {"optimizer.momentum": 0.5}

        def optimizer(self, model, config):
            return torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=config.weight_decay)

    given = {"lr": 0.3, "momentum": 0.5, "weight_decay": 0.2}
    config = resolve([("test", {"optimizer": given, "data": {"path": "shards", "workers": 0}})])
    store = CheckpointStore(tmp_path / "checkpoints", 2)
    made = Trainer(config, Own(), Single(World(ALONE)), store)
    assert [line.partition(" =")[0] for line in made.warnings] == ["data.path", "optimizer.lr"]
    assert trainer(tmp_path, Line()).warnings == []


def test_metrics_that_are_no_means_are_named():
    assert no_means(["loss", "accuracy", "mape", "f10"]) == ""
    assert "'auc', 'val_f1' is recorded as the mean" in no_means(["auc", "val_f1", "loss"])


def test_parameters_without_a_gradient_are_named(tmp_path):
    class Said(Silent):
        def __init__(self):
            self.said = []

        def say(self, text):
            self.said.append(text)

    class Spare(Line):
        def model(self):
            return nn.ModuleDict({"used": nn.Linear(3, 1), "spare": nn.Linear(2, 2)})

        def loss(self, model, batch):
            return model["used"](batch["x"]).square().mean()

    said = Said()
    trainer(tmp_path, Spare()).run(said)
    assert any("no gradient came to 'spare.weight', 'spare.bias'" in line for line in said.said)


def test_a_tasks_modes_are_kept():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 3))
    model[0].eval()
    begin_training(model)
    assert [m.training for m in model.modules()] == [True, False, True, True]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == [True, False, True, True]
    begin_training(model.eval())  # as pretrained ones come
    assert all(m.training for m in model.modules())


def test_types_are_the_tasks():
    model = nn.Module()
    kinds = [
        torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64,
        torch.complex128, torch.int64, torch.bool,
    ]  # fmt: skip
    for number, kind in enumerate(kinds):
        model.register_buffer(f"b{number}", torch.ones(2, 2).to(kind))
        if kind.is_floating_point or kind.is_complex:
            model.register_parameter(f"p{number}", nn.Parameter(torch.ones(2).to(kind)))
    wide = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    for dtype in ("float32", "bf16", "float64"):
        before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        prepared(model, torch.device("cpu"), dtype)
        for name, tensor in model.state_dict().items():
            kind = before[name]
            assert tensor.dtype == (wide.get(kind, kind) if dtype == "float64" else kind)


def test_expanded_buffers_get_their_own_memory():
    model = nn.Module()
    model.register_buffer("mask", torch.ones(1, 3).expand(4, 3))
    prepared(model, torch.device("cpu"), "float32")
    model.mask[0, 0] = 5
    assert model.mask.sum() == 16


def test_averages_copy_what_is_no_number():
    model = nn.Linear(2, 1)
    model.register_buffer("index", torch.arange(50))
    model.register_buffer("edges", torch.eye(3).to_sparse())
    model.register_buffer("mean", torch.zeros(2))
    average, expected = averaged(model, 0.9), 1.0
    for step in range(1, 6):
        with torch.no_grad():
            model.mean.fill_(step)
            model.weight.fill_(step)
        average.update_parameters(model)
        expected = expected if step == 1 else 0.9 * expected + 0.1 * step
        assert torch.equal(average.module.index, torch.arange(50))
        assert torch.allclose(average.module.mean, torch.full((2,), expected))
        assert torch.allclose(average.module.weight, torch.full((2,), expected))


def test_other_epochs_and_batches_after_a_resume_are_epochs_of_data(tmp_path):
    first = trainer(tmp_path / "a", Line(), epochs=2, batch_size=5)
    first.run(Silent())
    assert first.state.counters.step == 8
    for size in (2, 5, 7, 20, 30):
        second = trainer(tmp_path / f"b{size}", Line(), epochs=4, batch_size=size)
        second.restore(first.store.newest(pytest.fail))
        second.run(Silent())
        assert second.epochs == 4
        assert second.state.counters.samples == 80
        assert second.steps == second.state.counters.step == 8 + 2 * -(-20 // size)


def test_incomplete_batches_are_left_out(tmp_path):
    config = resolve(
        [("t", {"train": {"batch_size": 8, "epochs": 3}, "data": {"drop_last": True}})]
    )
    made = Trainer(config, Line(), Single(World(ALONE)), CheckpointStore(tmp_path / "c", 1))
    made.restore(None)
    made.run(Silent())
    assert (made.state.counters.step, made.state.counters.samples) == (6, 48)


@dataclass
class Needs(Line):
    hidden: int = 3


def test_tasks_are_found_where_people_have_them(tmp_path, monkeypatch):
    source = "from .helper_of_it import net\nfrom hpctrain import Task\n"
    source += "class Mine(Task):\n    n = net\n"
    for folder in ("plain", "c:d", "inpackage"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "helper_of_it.py").write_text("net = 3\n")
        (tmp_path / folder / "mod.py").write_text(source)
    (tmp_path / "inpackage" / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for spec in ("plain/mod.py", "plain/mod.py:Mine", "c:d/mod.py", "inpackage/mod.py:Mine",
                 "inpackage.mod:Mine"):  # fmt: skip
        assert load_task(spec).n == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\nclass T(\n", "SyntaxError: '.' was never closed, line 2 of bad.py"),
        ("import not_there_at_all\n", "No module named 'not_there_at_all', line 1 of bad.py"),
    ],
)
def test_mistakes_in_a_file_are_named_with_its_line(tmp_path, source, message):
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(Error, match=message):
        load_task(str(tmp_path / "bad.py"))


def test_a_constructor_that_wants_more():
    class Wants(Line):
        def __init__(self, hidden):
            self.hidden = hidden

    with pytest.raises(Error, match=r"missing 1 required.*'hidden'.*HINT: make it a dataclass"):
        make_task(Wants, {})


def test_random_numbers_of_a_task_are_the_runs(tmp_path):
    (tmp_path / "drawn.py").write_text(
        "import torch, random, numpy as np\nfrom hpctrain import Task\n"
        "DRAWN = [float(torch.rand(())), random.random(), float(np.random.rand())]\n"
        "class Mine(Task):\n    drawn = DRAWN\n"
    )
    drawn = [load_task(str(tmp_path / "drawn.py"), seed).drawn for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_text_that_is_no_text():
    with pytest.raises(Error, match="out = .* is not UTF-8 text"):
        resolve([("command line", {"out": b"\xff/run".decode("utf-8", "surrogateescape")})])


@pytest.mark.slow
def test_closed_streams_and_odd_names_do_no_harm():
    code = (
        "from hpctrain.cli import main; import sys; sys.argv = ['hpctrain', *sys.argv[1:]]; main()"
    )
    result = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" train "$2" >&-', sys.executable, code, b"\xff.py"],
        capture_output=True,
        timeout=SECONDS,
    )
    assert result.returncode == 2
    assert b"Traceback" not in result.stderr and b"HINT" in result.stderr
