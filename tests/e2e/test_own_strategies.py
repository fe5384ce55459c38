"""Strategies of one's own, in files that hpctrain does not know: chosen, trained, resumed."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.e2e.conftest import result_of

FILES = Path(__file__).parents[1] / "strategies"
SHORT = ["--set", "log.tensorboard=false", "--set", "checkpoint.every_steps=20"]


@pytest.fixture
def outside(hpctrain):
    """hpctrain in a folder with the strategies' files."""
    for path in FILES.glob("[a-z]*.py"):
        shutil.copy(path, hpctrain.folder)
    return hpctrain


def tensors(folder):
    """Of the newest checkpoint."""
    return load_file(max((folder / "checkpoints").glob("step-*")) / "tensors.safetensors")


def saved_parameters(folder):
    """Of the newest checkpoint, in the model's order."""
    saved = tensors(folder)
    names = [f"{layer}.{kind}" for layer in (1, 3, 7) for kind in ("weight", "bias")]
    return {name: saved[f"model.{name}"] for name in names}


def test_averaging(outside):
    """Ranks have the same model in the end, also after a resume in the midst of a round."""
    chosen = ["--strategy", "local_sgd:LocalSgd", "--set", "local-sgd.every=7", *SHORT]
    told = outside.train("digits", *chosen, "--steps", "24", "--out", "run", ranks=2).stdout
    assert "digits: local-sgd on 2 ranks" in told
    folder = outside.folder / "run"
    assert "every = 7" in (folder / "config.toml").read_text()
    before = result_of(folder)["metrics"]["final"]
    outside.train("digits", *chosen, "--resume", "auto", "--steps", "40", "--out", "run", ranks=2)
    after = result_of(folder)
    assert after["world"][-1]["reason"] == "resumed at step 24"
    assert after["metrics"]["final"]["val_loss"] < before["val_loss"]
    hashed = hashlib.sha256()
    for name, tensor in saved_parameters(folder).items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hashed.update(tensor.numpy().tobytes())
    assert hashed.hexdigest() == after["parameters_sha256"]  # what was saved is what all have


def test_sharded_state(outside):
    """Half of the optimizer's state on each rank: the numbers and the checkpoint of all of it."""
    for name, how in (("halves", "halves:Halves"), ("ring", "horovod")):
        outside.train("digits", "--strategy", how, "--steps", "40", *SHORT, "--out", name, ranks=2)
    ours, theirs = (result_of(outside.folder / name) for name in ("halves", "ring"))
    assert ours["parameters_sha256"] == theirs["parameters_sha256"]
    saved, expected = (tensors(outside.folder / name) for name in ("halves", "ring"))
    assert saved.keys() == expected.keys() and any("exp_avg" in name for name in saved)
    assert all(saved[name].equal(expected[name]) for name in saved)


def test_a_broken_promise(outside):
    """Ranks that say they agree and do not are refused, and the run is not completed."""
    told = outside("train", "digits", "--strategy", "halves:Alone", *SHORT, "--out", "run", ranks=2)
    assert told.returncode == 2 and "Traceback" not in told.stdout
    assert "the ranks hold different values of parameter" in told.stdout
    assert not (outside.folder / "run" / "result.json").exists()


MISTAKES = [
    (["--strategy", "horvod"], "there is no strategy 'horvod'. HINT: did you mean 'horovod'?"),
    (["--strategy", "local_sgd:Local"], "did you mean 'LocalSgd'?"),
    (["--strategy", "local_sgd:LocalSgdConfig"], "'local_sgd:LocalSgdConfig' is no strategy."),
    (
        ["--strategy", "local_sgd:LocalSgd", "--set", "local-sgd.evry=3"],
        "unknown key 'local-sgd.evry'. HINT: did you mean 'local-sgd.every'?",
    ),
]


def test_mistakes(outside):
    every = outside.each([["train", "digits", *arguments] for arguments, _ in MISTAKES])
    for told, (_, message) in zip(every, MISTAKES, strict=True):
        assert told.returncode == 2 and message in told.stdout and "Traceback" not in told.stdout


def test_the_list(outside):
    told = outside("strategies", "--json")
    listed = {each["name"]: each["summary"] for each in json.loads(told.stdout)}
    assert {"single", "horovod", "ps", "sharded", "averaging"} <= listed.keys() and all(
        listed.values()
    )
    assert "Synchronous data parallelism" in outside("strategies").stdout
