"""A sweep as a job array over all nodes; and both templates of many runs by plain sbatch."""

import csv
from pathlib import Path

from tests.e2e.conftest import result_of
from tests.slurm.conftest import TASK

TEMPLATES = Path(__file__).parents[2] / "slurm"
SPACE = """\
metric = "val_accuracy"
direction = "maximize"
seed = 3
startup_trials = 3
[space]
"optimizer.lr" = {low = 1e-5, high = 1e-1, log = true}
"train.batch_size" = {choices = [32, 64, 128]}
"""


def test_an_array(site):
    """12 trials over 4 nodes, with pruning; the best one can be trained again."""
    (site.folder / "space.toml").write_text(SPACE)
    done = site(
        "sweep", TASK, "--set", "options.pause=0.01", "--space", "space.toml",
        "--trials", 12, "--jobs", 4, "--submit",
        "--epochs", 4, "--out", "sweep", "--time", "10:00", "--wait",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    with (site.folder / "sweep" / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    states = [row["state"] for row in rows]
    assert len(rows) == 12 and set(states) <= {"complete", "pruned"} and "pruned" in states
    assert len({row["optimizer.lr"] for row in rows}) == 12
    assert (site.folder / "sweep" / "trials.png").stat().st_size > 1000
    again = site("train", "--config", "sweep/best.toml", "--out", "again")
    assert again.returncode == 0, again.stdout
    best = result_of(site.folder / "sweep" / f"trial-{int(rows[0]['trial']):04}")
    assert result_of(site.folder / "again")["parameters_sha256"] == best["parameters_sha256"]


def test_trials_go_on(site):
    """Told that time is up, or put back by others, each with its values."""
    (site.folder / "space.toml").write_text(SPACE)
    done = site(
        "sweep", TASK, "--set", "options.pause=0.1", "--set", "log.every_steps=5", "--space",
        "space.toml", "--trials", 3, "--jobs", 3, "--submit", "--epochs", 3, "--out", "sweep",
        "--time", "10:00",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    number = done.stdout.split()[2].rstrip(":")
    chosen = {}
    for task, order in enumerate(["scancel --signal=USR1 --batch"] * 2 + ["scontrol requeue"], 1):
        log = site.folder / "sweep" / f"faulty_task-{number}_{task}.out"
        site.until(lambda log=log: log.exists() and "faulty_task.py: " in log.read_text(), "ranks")
        chosen[task] = log.read_text().splitlines()[0]
        site.cluster.call(*order.split(), f"{number}_{task}")
    for task, line in chosen.items():
        site.cluster.wait_for(f"{number}_{task}", "COMPLETED")
        log = (site.folder / "sweep" / f"faulty_task-{number}_{task}.out").read_text()
        assert log.splitlines().count(line) == 2 and ": interrupted\n" in log
    assert site("trials", "sweep").stdout.count("complete") == 3


def test_by_hand(site):
    """array.sbatch and scaling.sbatch with the edits that they ask for."""
    (site.folder / "space.toml").write_text(SPACE)
    array = (TEMPLATES / "array.sbatch").read_text()
    array = array.replace("--array=1-12%4", "--array=1-2%2").replace("--epochs 10", "--epochs 1")
    scaling = (TEMPLATES / "scaling.sbatch").read_text()
    command = "resnet50-synthetic --steps 100 --set log.every_steps=10"
    assert command in scaling
    scaling = scaling.replace(command, "digits --epochs 2")
    numbers = []
    for name, script in (("array", array), ("scaling", scaling)):
        (site.folder / f"{name}.sbatch").write_text(script)
        said = site.cluster.call("sbatch", "--parsable", f"{name}.sbatch", cwd=site.folder)
        numbers.append(said.strip())
    site.cluster.wait_for(numbers[1], "COMPLETED", "FAILED")
    log = (site.folder / f"scaling-{numbers[1]}.out").read_text()
    rows = log[log.index("RUN ") :].splitlines()
    assert [row.split()[1] for row in rows] == ["RANKS", "1", "2"], log
    for task in (1, 2):
        site.cluster.wait_for(f"{numbers[0]}_{task}", "COMPLETED")
    shown = site("trials", f"runs/digits-{numbers[0]}")
    assert shown.stdout.count("complete") == 2
