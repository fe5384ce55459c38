"""The commands around training, and the examples."""

import difflib
import signal
import sys
from pathlib import Path

import pytest
import torch

from hpctrain.process import run
from tests.e2e.conftest import result_of
from tests.waiting import SECONDS

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_help_is_quick_and_loads_no_torch():
    for command in (
        ["--help"],
        ["train", "--help"],
        ["data", "import", "--help"],
        ["report", "-h"],
        ["advise", "--help"],
    ):
        code = (
            "import sys\nfrom hpctrain.cli import cli\n"
            f"cli.main({command!r}, standalone_mode=False)\n"
            "assert not {'torch', 'pydantic', 'h5py', 'numpy', 'matplotlib'} & set(sys.modules)"
        )
        result = run([sys.executable, "-c", code], timeout_seconds=SECONDS)
        assert result.returncode == 0, result.stdout
        assert "Usage:" in result.stdout


START = """
import gc
import sys
from hpctrain.tasks.digits import Digits

class Mine(Digits):
    def loss(self, model, batch):
        assert not {"scipy", "sklearn", "matplotlib", "sympy"} & set(sys.modules)
        assert gc.isenabled() and gc.get_freeze_count() > 100_000
        return super().loss(model, batch)
"""


def test_training_starts_with_little(hpctrain):
    """Nothing is imported that it does not need, nor looked through for garbage."""
    (hpctrain.folder / "mine.py").write_text(START)
    hpctrain.train("mine.py:Mine", "--steps", 2)


def test_doctor_finds_nothing_wrong_here(hpctrain):
    result = hpctrain("doctor")
    assert result.returncode == 0, result.stdout
    assert "Horovod over MPI, 2 ranks: the all-reduce is right" in result.stdout
    assert "Horovod over Gloo, 2 ranks: the all-reduce is right" in result.stdout
    assert "mpi4py: both ranks see a world of 2" in result.stdout


def test_horovod_check(hpctrain):
    result = hpctrain("horovod", "check")
    assert result.returncode == 0, result.stdout
    assert f"built against torch: {torch.__version__}" in result.stdout
    assert "built in: MPI, Gloo" in result.stdout
    assert "MPI library: /" in result.stdout


def test_horovod_build_uses_the_cache(hpctrain):
    """The environment was made by this command, so the wheel is there."""
    result = hpctrain("horovod", "build")
    assert result.returncode == 0, result.stdout
    assert "is in the cache" in result.stdout
    assert "all-reduces over 2 ranks with MPI" in result.stdout


def test_horovod_build_says_what_is_missing(hpctrain):
    if torch.version.cuda is None:
        result = hpctrain("horovod", "build", "--gpu")
        assert result.returncode == 2
        assert "has no CUDA" in result.stdout and "HINT:" in result.stdout
    result = hpctrain("horovod", "build", env={"CXX": "no-such-compiler"})
    assert result.returncode == 2
    assert "no-such-compiler was not found" in result.stdout


def test_config_lists_every_key_and_is_a_config(hpctrain):
    listing = hpctrain("config", "charlm")
    assert listing.returncode == 0, listing.stdout
    (hpctrain.folder / "run.toml").write_text(listing.stdout)
    again = hpctrain("config", "--config", "run.toml")
    assert again.stdout == listing.stdout


def test_import_then_train_charlm(hpctrain):
    (hpctrain.folder / "text.txt").write_text("To be, or not to be, that is the question. " * 300)
    result = hpctrain("data", "import", "text.txt", "text", "--sequence-length", "32")
    assert result.returncode == 0, result.stdout
    assert "text/train: 363 samples of tokens uint8(33,)" in result.stdout
    hpctrain.train(
        *("charlm", "--data", "text", "--steps", 60, "--batch-size", 16, "--out", "run"),
        *("--dtype", "bf16", "--set", "train.ema_decay=0.5", "--set", "options.width=32"),
        *("--set", "options.layers=1", "--set", "schedule.warmup_steps=3", "--lr", "0.02"),
        ranks=2,
    )
    metrics = result_of(hpctrain.folder / "run")["metrics"]["final"]
    assert metrics["val_bits_per_byte"] < 5  # uniform bytes are 8


def test_the_digits_are_learnt(hpctrain):
    hpctrain.train("digits", "--out", "run", ranks=2, launcher="horovodrun")
    result = result_of(hpctrain.folder / "run")
    assert result["status"] == "completed"
    assert result["strategy"] == "horovod"
    assert result["metrics"]["final"]["val_accuracy"] >= 0.97
    assert result["metrics"]["best"]["metrics"]["val_accuracy"] >= 0.97
    names = {path.name for path in (hpctrain.folder / "run").iterdir()}
    assert names == {
        "config.toml", "metrics.jsonl", "tensorboard", "checkpoints", "result.json", ".lock"
    }  # fmt: skip


def test_early_stopping(hpctrain):
    """A rate of nearly nothing learns nothing, so validation never gets better."""
    hpctrain.train(
        *("digits", "--lr", "1e-12", "--epochs", 50, "--set", "train.patience=3", "--out", "run"),
        ranks=2,
    )
    result = result_of(hpctrain.folder / "run")
    assert result["stopped_early"] and result["epochs"] == 4


def test_resnet50_has_the_published_size():
    from hpctrain.tasks.resnet50_synthetic import resnet50

    assert sum(p.numel() for p in resnet50(1000).parameters()) == 25_557_032


def test_own_loop_differs_from_plain_torch_in_five_lines():
    plain, own = (
        [
            line
            for line in (EXAMPLES / name).read_text().split('"""')[2].splitlines()
            if line.strip()
        ]
        for name in ("plain_loop.py", "own_loop.py")
    )
    difference = list(difflib.ndiff(plain, own))
    assert sum(line.startswith("+ ") for line in difference) <= 5


@pytest.mark.parametrize("launcher", ["alone", "mpirun", "horovodrun"])
def test_own_loop_learns(hpctrain, launcher):
    prefix = hpctrain.prefix(0 if launcher == "alone" else 2, launcher)
    result = run(
        [*prefix, sys.executable, str(EXAMPLES / "own_loop.py")],
        timeout_seconds=SECONDS,
        cwd=hpctrain.folder,
    )
    assert result.returncode == 0, result.stdout
    assert "accuracy 0.9" in result.stdout


def test_interrupted(hpctrain):
    """Ctrl-C is exit code 130, at once, without a traceback."""
    with hpctrain.training("digits", "--epochs", 100000) as process:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert "Traceback" not in output and "interrupted" in output
