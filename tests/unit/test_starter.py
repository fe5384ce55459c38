"""What `hpctrain init` writes trains as it is, and `hpctrain runs` lists what came of it."""

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from hpctrain.cli import cli
from hpctrain.config import read_toml
from hpctrain.errors import Error
from hpctrain.report.listing import differences, list_runs
from hpctrain.run import configure, run
from hpctrain.run_folder import claim
from hpctrain.tasks.starter import write_starter


def trained(folder, out, **train):
    layers = [("run.toml", read_toml(Path("run.toml")))]
    sections = {"out": out, "train": train, "log": {"tensorboard": False}}
    assert run(configure([*layers, ("test", sections)]), say=lambda text: None) == 0
    return folder / out


@pytest.mark.slow
def test_a_starter_trains_and_its_runs_are_listed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = write_starter(Path("two_spirals.py"))
    assert "class TwoSpirals(" in files[0].read_text()
    whole = json.loads((trained(tmp_path, "runs/a") / "result.json").read_text())
    assert whole["metrics"]["best"]["metrics"]["val_accuracy"] > 0.95
    trained(tmp_path, "runs/b", epochs=2)
    shown = CliRunner().invoke(cli, ["runs"])
    assert shown.exit_code == 0
    head, a, b = shown.output.splitlines()
    assert head.split() == ["RUN", "STATE", "STEP", "BEST", "DIFFERENT"]
    assert a.split()[:3] == ["a", "completed", "500/500"] and "train.epochs=20" in a
    assert b.split()[:3] == ["b", "completed", "50/50"] and b.split()[-1] == "train.epochs=2"
    rows = json.loads(CliRunner().invoke(cli, ["runs", "--json"]).output)
    assert rows[1]["config"]["train.batch_size"] == 64
    best = whole["metrics"]["best"]["metrics"]["val_accuracy"]
    assert rows[0]["metrics"]["accuracy"] == pytest.approx(best)


def test_a_starter_is_shell_and_replaces_nothing(tmp_path):
    task, config, job = write_starter(tmp_path / "new" / "mine.py")
    assert subprocess.run(["bash", "-n", job], check=False).returncode == 0
    assert "--job-name=mine" in job.read_text()
    task.unlink()
    job.unlink()
    before = config.read_text()
    with pytest.raises(Error, match="run.toml is there already"):
        write_starter(task)
    assert config.read_text() == before and not task.exists()
    for name in ("my-task.py", "task", "1.py"):
        with pytest.raises(Error, match="no name of a Python file"):
            write_starter(tmp_path / name)


def folder_of(tmp_path, name, config, *lines):
    folder = tmp_path / name
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").write_text(config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_in_every_state(tmp_path):
    start = {"kind": "event", "step": 0, "time": 1.0, "size": 2, "steps": 30}
    scores = [
        {"kind": "validation", "step": step, "time": 5.0, "loss": loss, "accuracy": 0.5}
        for step, loss in ((10, 0.3), (20, 0.7))
    ]
    going = folder_of(tmp_path, "z", 'task = "a"\nout = "z"\n', start, *scores)
    (going / "checkpoints" / "best").symlink_to("step-00000010")
    folder_of(tmp_path, "b", 'task = "a"\n[optimizer]\nlr = 0.5\n', {**start, "time": 2.0})
    stopped = folder_of(tmp_path, "c", 'task = "a"\nout = "c"\n', {**start, "time": 3.0}, *scores)
    (stopped / "interrupted.json").write_text("{}")
    folder_of(tmp_path, "d", "task = [")
    (tmp_path / "no-run").mkdir()
    with claim(going):
        found = list_runs(tmp_path)
    assert [(each.run.name, each.step, each.steps) for each in found] == [
        ("z", 20, 30),
        ("b", 0, 30),
        ("c", 20, 30),
        ("d", 0, None),
    ]
    states = [each.state.partition(":")[0] for each in found]
    assert states == ["running", "unfinished", "interrupted", "damaged"]
    assert found[0].metrics == {"loss": 0.3, "accuracy": 0.5}  # of the best
    assert found[2].metrics == {"loss": 0.7, "accuracy": 0.5}  # of the last
    assert differences(found[:3]) == [
        {"optimizer.lr": None}, {"optimizer.lr": 0.5}, {"optimizer.lr": None},
    ]  # fmt: skip
    with pytest.raises(Error, match="is no folder"):
        list_runs(tmp_path / "nowhere")
    assert list_runs(going)[0].state == "unfinished"
