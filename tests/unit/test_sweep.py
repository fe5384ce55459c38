"""A task of a job array is one trial, whenever its job is ended and started again."""

import json

import optuna
import pytest

from hpctrain.slurm.sweep import read_space, run_trial, study

SPACE = """\
seed = 3
[space]
"optimizer.lr" = {low = 1e-4, high = 1e-2}
"""


@pytest.fixture
def again(tmp_path, monkeypatch):
    """Starts the task, now or again: its exit code, and the states of all trials."""
    (tmp_path / "space.toml").write_text(SPACE)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "75")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    folder = tmp_path / "sweep"

    def start(execute):
        code = run_trial(folder, tmp_path / "space.toml", ["train"], execute)
        trials = study(folder, read_space(folder / "space.toml")).get_trials()
        return code, [trial.state.name for trial in trials]

    return start


def completed(words, run, look):
    (run / "result.json").write_text(json.dumps({"metrics": {"final": {"val_loss": 0.5}}}))
    return 0


def test_after_it_has_ended(again):
    assert again(completed) == (0, ["COMPLETE"])
    assert again(None) == (0, ["COMPLETE"])


def test_while_it_begins(again, monkeypatch):
    with monkeypatch.context() as patched:
        for name in ("suggest_float", "set_user_attr"):
            patched.setattr(optuna.trial.Trial, name, lambda *_, **__: pytest.exit("SIGKILL"))
        with pytest.raises(pytest.exit.Exception):
            again(completed)
    assert again(completed) == (0, ["COMPLETE"])


def test_a_failed_one_is_tried_with_other_values(again):
    assert again(lambda *_: 1) == (1, ["FAIL"])
    assert again(completed) == (0, ["FAIL", "COMPLETE"])
