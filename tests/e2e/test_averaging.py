"""Periodic averaging by the installed command: trained, resumed, and gone on with by another."""

import pytest

from tests.e2e.conftest import cut_back, result_of

CHOSEN = ["--strategy", "averaging", "--set", "averaging.every=10", "--steps", "45",
    "--set", "log.tensorboard=false", "--set", "log.every_steps=10",
    "--set", "checkpoint.every_steps=15", "--set", "checkpoint.keep=9"]  # fmt: skip


@pytest.mark.parametrize(
    ("knobs", "step"),
    [
        (["averaging.outer=nesterov"], 30),
        (["averaging.state=local", "averaging.fragments=3", "averaging.delay=4",
          "averaging.mixing=0.5"], 15),
    ],
)  # fmt: skip
def test_resumes_with_the_same_bits(hpctrain, knobs, step):
    """From a round's end with the mean state; with each rank's own, from anywhere."""
    chosen = [*CHOSEN, *(word for knob in knobs for word in ("--set", knob))]
    told = hpctrain.train("digits", *chosen, "--out", "run", ranks=2).stdout
    assert ("fewer than the 50" in told) == ("nesterov" in knobs[0])
    whole = result_of(hpctrain.folder / "run")
    assert whole["metrics"]["final"]["val_accuracy"] > 0.8
    cut_back(hpctrain.folder / "run", step, hpctrain.folder / "again")
    hpctrain.train("digits", *chosen, "--resume", "auto", "--out", "again", ranks=2)
    again = result_of(hpctrain.folder / "again")
    assert again["world"][-1]["reason"] == f"resumed at step {step}"
    assert again["parameters_sha256"] == whole["parameters_sha256"]


def test_one_rank_goes_on_alone(hpctrain):
    """From a checkpoint in the midst of a round: the mean of two ranks is an ordinary state."""
    hpctrain.train("digits", *CHOSEN, "--out", "run", ranks=2)
    cut_back(hpctrain.folder / "run", 15, hpctrain.folder / "again")
    alone = ["--strategy", "single", *CHOSEN[4:]]
    hpctrain.train("digits", *alone, "--resume", "auto", "--out", "again")
    result = result_of(hpctrain.folder / "again")
    assert result["world"][-1] == {"step": 15, "size": 1, "reason": "resumed at step 15"}
    assert result["metrics"]["final"]["val_accuracy"] > 0.8


def test_knobs_that_do_not_go_together(hpctrain):
    told = hpctrain("train", "digits", *CHOSEN, "--set", "averaging.delay=3")
    assert told.returncode == 2 and "Traceback" not in told.stdout
    assert "averaging.delay does not go with averaging.state=mean" in told.stdout
