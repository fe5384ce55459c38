"""`hpctrain submit` on a real cluster: launchers, what is refused before queueing, jobs."""

import json
import secrets
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import result_of
from tests.e2e.test_secrets import arguments_watched
from tests.slurm.conftest import TASK

TEMPLATES = Path(__file__).parents[2] / "slurm"


@pytest.mark.parametrize("launcher", ["srun", "mpirun", "horovodrun"])
def test_three_nodes(site, launcher):
    """By one command, with every launcher."""
    if launcher == "horovodrun" and not site.cluster.hosts:
        pytest.skip("horovodrun tells hosts apart by their names")
    secret = secrets.token_hex(16)
    with arguments_watched(secret) as seen:  # the cluster's hosts share this one's processes
        done = site("submit", "digits", "--nodes", 3, "--epochs", 5, "--launcher", launcher,
                    "--out", "run", "--time", "10:00", "--wait",
                    env={"SOME_TOKEN": secret})  # fmt: skip
    assert done.returncode == 0, done.stdout + site.log()
    assert seen == set()
    for path in (site.folder / "run").glob("*.json"):
        assert secret not in path.read_text()
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
        (
            ["--partitoin=small"],
            "(exit code 255). HINT: --partitoin: did you mean 'partition'?",
        ),
        (["--array", "1-2"], "each task of an --array would train in the same folder"),
        (["--signal", "KILL"], "ends a process before it can save"),
        (["--chdir", "nowhere"], "--chdir nowhere: No such file or directory"),
        (["--output", "%j/log"], "Slurm makes no folders"),
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


def test_what_sbatch_takes(site):
    """By its short names; a hidden partition; logs in folders that are not there, `%` in a name."""
    site.cluster.call("scontrol", "update", "PartitionName=small", "Hidden=YES")
    (site.folder / "elsewhere").mkdir()
    try:
        done = site("submit", "digits", "-N", 1, "-psmall", "--gres", "gpu:2", "--signal", "INT@60",
                    "--output", "a%%b/logs/%x-%j.txt", "--chdir", "elsewhere", "--epochs", 1,
                    "--max-requeues=3", "--out", "100%", "--time", "9:00", "--wait")  # fmt: skip
    finally:
        site.cluster.call("scontrol", "update", "PartitionName=small", "Hidden=NO")
    assert done.returncode == 0, done.stdout
    (log,) = (site.folder / "elsewhere" / "a%b" / "logs").glob("digits-*.txt")
    assert "on 2 ranks under srun" in log.read_text()
    assert site("jobs", "logs", "100%").stdout == log.read_text()
    assert result_of(site.folder / "100%")["world"][0]["size"] == 2


SECRETS = {name: f"s3cret-{n}" for n, name in enumerate(
    ("HPCTRAIN_PS_KEY", "WANDB_API_KEY", "MY_PIN", "SLURM_MINE", "OMPI_MCA_mine"))}  # fmt: skip


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_no_secret_can_be_read(site, launcher):
    """By others: in command lines on any node, or in what is kept of a run."""
    given = {**SECRETS, "HPCTRAIN_PS_KEY": "5ec2e7" * 10 + "0000"}
    export = ",".join(["ALL", "GIVEN=s3cret-given"])
    _, run = site.submit(TASK, "--nodes", 2, "--epochs", 20, "--set", "options.pause=0.05",
                         "--set", "log.every_steps=5", "--launcher", launcher, "--export", export,
                         env=given)  # fmt: skip
    site.reached(5)
    lines = [" ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])]
    assert any(str(run.name) in line and "hpctrain train" in line for line in lines)
    shown = [line for line in lines if "s3cret" in line or "5ec2e7" in line]
    # What was typed is the one who typed it's.
    assert [line for line in shown if "submit" not in line] == []
    for name in ("submission.json", "job.sbatch", "config.toml"):
        text = (run / name).read_text()
        assert "s3cret" not in text and "5ec2e7" not in text
    assert (run / "submission.json").stat().st_mode & 0o077 == 0
    assert site("jobs", "cancel", "run").returncode == 0


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
