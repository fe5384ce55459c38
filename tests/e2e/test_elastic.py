"""Ranks are killed and stopped under mpirun, and the others go on in the same processes."""

import json
import os

import pytest

from hpctrain.process import mpirun, run
from tests.e2e.conftest import result_of
from tests.slurm.conftest import TASK, slow_until
from tests.waiting import SECONDS

FAULT_TOLERANT = (*mpirun(1), "--with-ft", "ulfm")
WORKS = run([*FAULT_TOLERANT, "true"], timeout_seconds=SECONDS).returncode == 0
pytestmark = pytest.mark.skipif(not WORKS, reason="an MPI without --with-ft")
# A busy machine may not let a rank give a sign of life for as long as is usual.
EPOCHS = 8
LAUNCH = {"OMP_NUM_THREADS": "1", "HPCTRAIN__ELASTIC__HANG_SECONDS": "5"}


def trained(hpctrain, ranks, plan, *arguments):
    """The result of a run under a plan of faults, and what became of it."""
    launcher = [*mpirun(ranks), "--with-ft", "ulfm"]
    command = (
        *launcher, "hpctrain", "train", TASK, *arguments, "--elastic", "auto", "--epochs", EPOCHS,
        "--set", "log.every_steps=10", "--set", "log.tensorboard=false",
    )  # fmt: skip
    done = hpctrain("chaos", "--out", "run", "--plan", plan, "--", *command, env=LAUNCH)
    assert done.returncode == 0, done.stdout
    outcome = json.loads((hpctrain.folder / "run" / "chaos.json").read_text())
    assert outcome["verdict"] == "good" and outcome["returncode"] == 0
    return result_of(hpctrain.folder / "run"), outcome


def sizes(result):
    return [change["size"] for change in result["world"]]


DIARY = """
import os

import hpctrain


class Diary(hpctrain.Callback):
    ranks = "all"

    def on_step(self, run):
        with open(f"told-{os.getpid()}", "a") as file:
            file.write(f"{run.step} ")
"""


@pytest.mark.parametrize(
    ("plan", "left"),
    [
        ("kill:rank=0@step=40 kill:rank=2@step=40+0.02", 2),  # the second while it recovers
        ("kill:rank=3@step=10 kill:rank=1@step=50 stop:rank=0@step=90", 1),
    ],
)
def test_losses(hpctrain, plan, left):
    """The ranks that are left go on, and their callbacks are told of each step once."""
    (hpctrain.folder / "diary.py").write_text(DIARY)
    losses = plan.count("rank")
    more = ("--callback", "diary:Diary", *slow_until("lost", losses, at=100))
    result, outcome = trained(hpctrain, 4, plan, *more)
    assert sizes(result)[-1] == left
    assert result["steps"] == EPOCHS * 23
    assert result["metrics"]["final"]["val_accuracy"] > 0.97
    assert len(outcome["faults"]) == losses == len(outcome["recovery_ms"])
    told = [list(map(int, path.read_text().split())) for path in hpctrain.folder.glob("told-*")]
    whole = list(range(1, EPOCHS * 23 + 1))
    assert len(told) == 4
    assert sorted(told, key=len)[-left:] == left * [whole]
    assert all(steps == whole[: len(steps)] for steps in told)


@pytest.mark.parametrize(
    "compression", ["none", pytest.param("powersgd:2", marks=pytest.mark.long)]
)
def test_a_new_rank_takes_the_place_of_a_lost_one(hpctrain, compression):
    """With compression, what the lost one had not sent yet is lost, and said to be."""
    more = ("--set", "elastic.workers=2", "--set", f"horovod.compression={compression}")
    result, _ = trained(hpctrain, 2, "kill:rank=0@step=20", *more, *slow_until("joined", at=30))
    assert sizes(result) == [2, 1, 2]
    lines = (hpctrain.folder / "run" / "metrics.jsonl").read_text().splitlines()
    exchanges = [r for r in map(json.loads, lines) if r["kind"] == "exchange"]
    lost = [r.get("residuals_lost", 0) for r in exchanges]
    assert lost[0] == 0 and lost[-1] == (compression != "none")


def test_ranks_keep_their_part_of_a_batch(hpctrain):
    keep = ("--set", "elastic.batch=keep-local")
    result, _ = trained(hpctrain, 2, "kill:rank=1@step=60", *keep, *slow_until("lost"))
    assert result["steps"] > EPOCHS * 23 + 50
    assert result["samples"] == EPOCHS * 1438


def test_an_error_on_one_rank_ends_all(hpctrain):
    """An error is not a loss: the others would meet it, too."""
    launcher = [*mpirun(2), "--with-ft", "ulfm"]
    done = run(
        [*launcher, "hpctrain", "train", str(TASK), "--elastic", "ulfm", "--epochs", "50",
         "--set", "options.fault=error", "--set", "options.pause=0.01"],
        timeout_seconds=SECONDS, cwd=hpctrain.folder, env={**os.environ, **LAUNCH},
    )  # fmt: skip
    assert done.returncode == 1
    assert "ValueError: a bad sample" in done.stdout


def test_where_nobody_would_live(hpctrain):
    done = hpctrain("train", "digits", "--elastic", "ulfm", ranks=2)
    assert done.returncode == 2
    assert "mpirun ends all ranks when one dies. HINT:" in done.stdout
    done = hpctrain.train("digits", "--elastic", "auto", "--epochs", 1, ranks=2)
    assert "elastic: restart: mpirun ends all ranks when one dies" in done.stdout
