"""What the caller can put right is one line and exit code 2."""

import os

import numpy as np
import pytest

from hpctrain.data.writer import ShardWriter
from hpctrain.process import run
from tests.waiting import SECONDS

TASK = """
import hpctrain
from torch import nn

class Mine(hpctrain.Task):
    def model(self):
        return nn.Linear(2, 1)

    def loss(self, model, batch):
        return model(batch["x"]).square().mean()
"""


def complaint(result, code=2):
    """The one line that a failed command prints."""
    assert result.returncode == code, result.stdout
    assert "Traceback" not in result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("hpctrain: error:")]
    assert len(lines) == 1, result.stdout
    assert "HINT: " in lines[0]
    return lines[0]


TRAIN = [
    (["nonsense"], "there is no task 'nonsense'"),
    (["digit"], "did you mean 'digits'?"),
    (["missing.py"], "missing.py does not exist"),
    (["raises.py"], "raises.py cannot be loaded: ValueError: no, line 2 of raises.py"),
    (["two.py"], "two.py defines 2 tasks"),
    (["two.py:C"], "defines no task 'C'"),
    (["digits", "--set", "train.epoch=1"], "unknown key 'train.epoch'"),
    (["digits", "--config", "bad.toml"], "bad.toml: unknown key 'trian.epochs'"),
    (["digits", "--config", "missing.toml"], "cannot read missing.toml"),
    (["digits", "--epochs", "0"], "train.epochs = 0"),
    (
        ["digits", "--strategy", "horvod"],
        "there is no strategy 'horvod'. HINT: did you mean 'horovod'?",
    ),
    (["digits", "--set", "options.chanels=3"], "did you mean 'channels'?"),
    (["digits", "--set", "options.channels=many"], "options.channels = 'many'"),
    (["digits", "--world-size", "2"], "asks for 2 ranks, but alone started 1"),
    (["digits", "--out", "file/run"], "cannot write file/run"),
    (["digits", "--resume", "missing"], "cannot be read: No such file"),
    (["digits", "--resume", "auto"], "--resume auto without --out"),
    (["mine.py"], "this task needs data"),
    (["mine.py", "--data", "missing"], "missing is not a shard set"),
    (["mine.py", "--data", "truncated"], "train-000000.h5 has 100 bytes"),
]
"""Arguments of `hpctrain train`, and what it says of them."""


def test_one_line(hpctrain):
    folder = hpctrain.folder
    (folder / "raises.py").write_text("x = 1\nraise ValueError('no')\n")
    (folder / "two.py").write_text(
        "import hpctrain\nclass A(hpctrain.Task): ...\nclass B(hpctrain.Task): ...\n"
    )
    (folder / "mine.py").write_text(TASK)
    (folder / "bad.toml").write_text("[trian]\nepochs = 3\n")
    (folder / "file").write_text("not a folder")
    with ShardWriter(folder / "truncated") as writer:
        writer.write("train", {"x": np.zeros((20, 2), "float32")})
    os.truncate(folder / "truncated" / "train-000000.h5", 100)
    every = hpctrain.each([["train", *arguments] for arguments, _ in TRAIN])
    for result, (_, message) in zip(every, TRAIN, strict=True):
        assert message in complaint(result), result.args


def test_the_command_says_it_in_one_line(hpctrain):
    assert "did you mean 'digits'?" in complaint(hpctrain("train", "digit"))


def test_own_task_trains(hpctrain):
    """The same file as above, with data, and without validation samples."""
    (hpctrain.folder / "mine.py").write_text(TASK)
    with ShardWriter(hpctrain.folder / "shards") as writer:
        writer.write("train", {"x": np.ones((20, 2), "float32")})
    hpctrain.train("mine.py:Mine", "--data", "shards", "--epochs", 2, "--out", "run")


def test_environment_key(hpctrain):
    result = hpctrain("train", "digits", env={"HPCTRAIN__TRAIN__EPOCH": "3"})
    assert "environment: unknown key 'train.epoch'" in complaint(result)


def test_a_run_is_not_overwritten(hpctrain):
    hpctrain.train("digits", "--epochs", 1, "--out", "run")
    assert "already holds a run" in complaint(hpctrain("train", "digits", "--out", "run"))


def test_a_cursor_of_another_order(hpctrain):
    hpctrain.train("digits", "--steps", 5, "--out", "run")
    result = hpctrain(
        "train", "digits", "--steps", 9, "--out", "run", "--resume", "auto", "--seed", 1
    )
    assert "is for seed 0, but this run has 1" in complaint(result)


def test_no_good_checkpoint(hpctrain):
    hpctrain.train("digits", "--epochs", 1, "--out", "run")
    (checkpoint,) = (hpctrain.folder / "run" / "checkpoints").glob("step-*")
    (checkpoint / "state.json").write_text("{}")
    result = hpctrain("train", "digits", "--out", "run", "--resume", "auto")
    assert "all 1 checkpoints" in complaint(result)
    result = hpctrain("train", "digits", "--out", "other", "--resume", checkpoint)
    assert "is damaged" in complaint(result)


def test_horovod_not_built(hpctrain):
    """Horovod hidden from the interpreter, as if it had never been installed."""
    hidden = hpctrain.folder / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'horovod':\n"
        "            raise ModuleNotFoundError('No module named horovod', name='horovod')\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    env = {"PYTHONPATH": str(hidden)}
    result = hpctrain("train", "digits", "--strategy", "horovod", env=env)
    assert "Horovod is not installed" in complaint(result)
    assert "hpctrain horovod build" in result.stdout
    hpctrain.train("digits", "--epochs", 1, "--out", "run", env=env)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "seed=x"], "seed = 'x'"),
        (["--world-size", "3"], "asks for 3 ranks, but mpirun started 2"),
        (["--strategy", "single"], "strategy 'single' on a world of 2 ranks"),
        (["--out", "file/run"], "cannot write file/run"),
    ],
)
def test_said_once_by_several_ranks(hpctrain, arguments, message):
    (hpctrain.folder / "file").write_text("not a folder")
    assert message in complaint(hpctrain("train", "digits", *arguments, ranks=2))


@pytest.mark.parametrize("launcher", ["horovodrun", "horovodrun --gloo"])
def test_horovodrun_passes_the_exit_code_on(hpctrain, launcher):
    result = hpctrain("train", "digits", "--set", "seed=x", ranks=2, launcher=launcher)
    assert result.returncode == 2, result.stdout
    assert "hpctrain: error: --set: seed = 'x'" in result.stdout
    assert "Traceback" not in result.stdout


def test_silent_singletons(hpctrain):
    """Two processes that were told of each other, and no MPI to meet by (srun --mpi=none)."""
    env = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "HOROVOD_CONTROLLER": "mpi",
    }
    result = hpctrain("train", "digits", env=env)
    assert "srun started 2 ranks, but Horovod sees 1" in complaint(result)
    assert "--mpi=pmix" in result.stdout


def test_full_disk_for_metrics(hpctrain):
    """The kernel's file that is always full."""
    (hpctrain.folder / "run").mkdir()
    (hpctrain.folder / "run" / "metrics.jsonl").symlink_to("/dev/full")
    line = complaint(hpctrain("train", "digits", "--out", "run"))
    assert "cannot write run/metrics.jsonl: No space left on device" in line


def test_full_disk(hpctrain):
    """Beyond a file size the kernel refuses to write; what was saved before stays good."""
    hpctrain.train("digits", "--epochs", 2, "--out", "run")
    limited = hpctrain.folder / "limited.py"
    limited.write_text(
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "from hpctrain.cli import main\n"
        "main()\n"
    )
    result = run(
        ["python", str(limited), "train", "digits", "--epochs", "4", "--out", "run"]
        + ["--resume", "auto", "--set", "log.tensorboard=false"],
        timeout_seconds=SECONDS,
        cwd=hpctrain.folder,
    )
    assert "cannot write checkpoint" in complaint(result)
    assert (
        "resumed at step 46"
        in hpctrain.train("digits", "--epochs", 4, "--out", "run", "--resume", "auto").stdout
    )


DATA = [
    (["import", "missing", "shards"], "missing does not exist"),
    (["import", "text.txt", "file/shards"], "cannot write file/shards"),
    (["info", "."], "is not a shard set"),
    (["adopt", "missing.h5", "--out", "index"], "missing.h5 does not exist"),
    (["adopt", "text.txt", "--out", "index"], "text.txt cannot be read as HDF5"),
    (["verify", "missing"], "missing is not a shard set"),
    (["stage", "missing", "local"], "missing is not a shard set"),
    (["bench", "missing"], "missing is not a shard set"),
]
"""Arguments of `hpctrain data`, and what it says of them."""


def test_data_commands(hpctrain):
    (hpctrain.folder / "file").write_text("not a folder")
    (hpctrain.folder / "text.txt").write_text("a" * 1000)
    every = hpctrain.each([["data", *arguments] for arguments, _ in DATA])
    for result, (_, message) in zip(every, DATA, strict=True):
        assert message in complaint(result), result.args


def test_usage(hpctrain):
    result = hpctrain("train", "--no-such-flag")
    assert result.returncode == 2 and "No such option" in result.stdout


def test_no_slurm(hpctrain, monkeypatch):
    """A dry run needs none; all else says so in a line."""
    monkeypatch.setenv("PATH", "/nowhere")
    done = hpctrain("submit", "digits", "--dry-run")
    assert done.returncode == 0 and "hpctrain train digits" in done.stdout
    for command in (["submit", "digits"], ["submit", "digits", "--test-only"]):
        done = hpctrain(*command)
        assert done.returncode == 2
        (line,) = done.stdout.splitlines()
        assert "sinfo is not on PATH: no Slurm here. HINT:" in line
