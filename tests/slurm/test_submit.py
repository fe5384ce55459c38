"""`hpctrain submit` on a real cluster: launchers, what is refused before queueing, jobs."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import result_of
from tests.slurm.conftest import TASK

TEMPLATES = Path(__file__).parents[2] / "slurm"


@pytest.mark.parametrize("launcher", ["srun", "mpirun", "horovodrun"])
def test_three_nodes(site, launcher):
    """By one command, with every launcher."""
    if launcher == "horovodrun" and not site.cluster.hosts:
        pytest.skip("horovodrun tells hosts apart by their names")
    done = site("submit", "digits", "--nodes", 3, "--epochs", 5, "--launcher", launcher,
                "--out", "run", "--time", "10:00", "--wait")  # fmt: skip
    assert done.returncode == 0, done.stdout + site.log()
    result = result_of(site.folder / "run")
    assert result["metrics"]["final"]["val_accuracy"] >= 0.97
    assert [change["size"] for change in result["world"]] == [3]
    if site.cluster.hosts:
        assert f"3 ranks under {launcher}" in site.log()
    about = json.loads((site.folder / "run" / "submission.json").read_text())
    assert about["job"].isdigit() and "--nodes 3" in about["made"]
    assert "PATH" in about["environment"]


def test_a_parameter_server(site):
    _, run = site.submit("digits", "--nodes", 2, "--strategy", "ps", "--servers", 2,
                              "--tasks-per-node", 2, "--epochs", 5)  # fmt: skip
    assert site.wait()[0] == 0, site.log()
    assert result_of(run)["strategy"] == "ps"
    assert result_of(run)["world"][0]["size"] == 2


def test_by_hand(site):
    """A template, copied and edited as it says, and plain sbatch."""
    for name, edit in (
        ("train", {"--epochs 10": "--epochs 3"}),
        ("elastic", {"--epochs 10": "--epochs 3"}),
        ("parameter-server", {"--epochs 10": "--epochs 3"}),
    ):
        script = (TEMPLATES / f"{name}.sbatch").read_text()
        for before, after in edit.items():
            assert before in script
            script = script.replace(before, after)
        (site.folder / f"{name}.sbatch").write_text(script)
    numbers = [
        site.cluster.call("sbatch", "--parsable", f"{name}.sbatch", cwd=site.folder).strip()
        for name in ("train", "elastic", "parameter-server")
    ]
    for number in numbers:
        log = site.folder / f"digits-{number}.out"
        state = site.cluster.wait_for(number, "COMPLETED", "FAILED", "TIMEOUT")
        assert state == "COMPLETED", log.read_text()
        assert (site.folder / "runs" / f"digits-{number}" / "result.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--nodes", 9], "9 nodes: partition debug has 4. HINT:"),
        (["--time", "3-0"], "--time 3-0: partition debug allows 2:00:00. HINT:"),
        (["--partition", "smal"], "there is no partition 'smal'. HINT: did you mean 'small'?"),
        (["--partitoin", "small"], "no option --partitoin"),
        (["--mem", "1T"], "sbatch refuses: "),
        (["--epoch", "3"], "no option --epoch"),
        (["--set", "train.epoch=3"], "unknown key 'train.epoch'. HINT: did you mean"),
        (["--site", "nowhere"], "there is no site 'nowhere'. HINT:"),
    ],
)
def test_refused_before_queueing(site, arguments, words):
    done = site("submit", "digits", *arguments, "--out", "run")
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    assert words in line
    assert site.cluster.call("squeue", "--noheader").strip() == ""


def test_test_only(site):
    done = site("submit", "digits", "--nodes", 2, "--test-only")
    assert done.returncode == 0
    assert "to start at" in done.stdout and "n[1-2]" in done.stdout


@pytest.mark.parametrize("name", ["a100-nccl", "cpu-openmpi", "lumi-g"])
def test_site_profiles(site, name):
    """Scripts that bash and sbatch accept, where this cluster has what they ask for."""
    done = site("submit", "cifar10", "--data", "shards", "--nodes", 2, "--site", name, "--dry-run")
    assert done.returncode == 0, done.stdout
    script = site.folder / "job.sbatch"
    script.write_text(done.stdout)
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("#SBATCH")]
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines)
    assert options["output"].endswith("%x-%j.out")
    # This cluster's sizes and names instead of the site's.
    here = {"partition": "debug", "cpus-per-task": "1", "gpus-per-node": "2", "mem": "100M",
            "ntasks-per-node": "2"}  # fmt: skip
    for option, value in here.items():
        if option in options:
            done.stdout = done.stdout.replace(
                f"--{option}={options[option]}\n", f"--{option}={value}\n"
            )
    script.write_text(done.stdout)
    said = site.cluster.run("sbatch", "--test-only", "job.sbatch", cwd=site.folder)
    assert said.returncode == 0, said.stdout


def test_jobs(site):
    """State and progress of several runs; logs, cancel, wait."""
    number, _ = site.submit(TASK, "--nodes", 2, "--epochs", 50, "--set", "options.pause=0.05",
                              "--set", "log.every_steps=5")  # fmt: skip
    site.reached(10)
    shown = site("jobs", "--runs", ".").stdout
    assert number in shown and "RUNNING (n[1-2])" in shown and "/1150" in shown
    assert "2 ranks under" in site("jobs", "logs", "run").stdout
    done = site("jobs", "cancel", "run")
    assert done.returncode == 0 and f"job {number}: cancelled" in done.stdout
    code, said = site.wait()
    assert code == 143, said
    assert "SIGTERM" in said
    unknown = site("jobs", "wait", "runn")
    assert unknown.returncode == 2 and "HINT:" in unknown.stdout
