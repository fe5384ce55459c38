"""What hpctrain knows of Slurm without one: options, host lists, templates, causes."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.errors import Error
from hpctrain.failure import Failure
from hpctrain.slurm.cause import root_cause, said
from hpctrain.slurm.hosts import Node, expand, nodes
from hpctrain.slurm.options import directive, parse, seconds
from hpctrain.slurm.render import HERE, render
from hpctrain.slurm.site import Site, load
from hpctrain.slurm.ssh import split
from hpctrain.slurm.submit import Request, command_line, environment

TEMPLATES = sorted(path.stem for path in HERE.glob("*.sbatch"))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3,7],gpu-a[01-03]", ["n1", "n2", "n3", "n7", "gpu-a01", "gpu-a02", "gpu-a03"]),
        ("r[1-2]n[08-10]", ["r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
        ("a,b-c.d", ["a", "b-c.d"]),
        ("", []),
    ],
)
def test_host_lists(text, names):
    assert expand(text) == names


@pytest.mark.parametrize("text", ["n[1-", "n[a-b]", "n]"])
def test_no_host_list(text):
    with pytest.raises(Error, match="HINT"):
        expand(text)


def test_nodes_with_their_tasks():
    job = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "2(x2),1"}
    assert nodes(job) == [Node("n1", 2), Node("n2", 2), Node("n3", 1)]
    with pytest.raises(Error, match="no Slurm job"):
        nodes({})


def test_options():
    assert parse(["--nodes=3", "--time", "1:00", "--exclusive", "--mail-type=END"]) == {
        "nodes": "3", "time": "1:00", "exclusive": "", "mail-type": "END",
    }  # fmt: skip
    assert parse(["-N2", "-p", "gpu", "-H"]) == {"nodes": "2", "partition": "gpu", "hold": ""}
    # What is not known here is sbatch's to judge.
    assert parse(["--segment=4", "--a-flag"]) == {"segment": "4", "a-flag": ""}
    for wrong, message in (
        (["--nodse", "3"], "did you mean 'nodes'"),
        (["-y"], "has an option -y"),
        (["--nodes"], "needs a value"),
        (["--hold=yes"], "takes no value"),
        (["nodes"], "is not an option"),
    ):
        with pytest.raises(Error, match=message):
            parse(wrong)


@given(st.text())
def test_directives_stay_in_their_line(value):
    try:
        line = directive("comment", value)
    except Error:
        return
    assert line.startswith("#SBATCH --comment") and len(line.split("\n")) == 1
    if value and "\x00" not in value and value.isascii():
        (word,) = shlex.split(line.removeprefix("#SBATCH "), comments=True)[:1] or [""]
        assert word == f"--comment={value}" or not value.isprintable() or not value.strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("2-0", 172800), ("1-2:30", 95400),
     ("1-2:30:15", 95415)],
)  # fmt: skip
def test_time_limits(text, expected):
    assert seconds(text) == expected


def test_no_time_limit():
    with pytest.raises(Error, match="no time limit"):
        seconds("tomorrow")


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_scripts(name):
    """As they are, and filled in; with long option names, and safe settings."""
    text = (HERE / f"{name}.sbatch").read_text()
    blocks = re.findall(r"#% block (\w+)", text)
    filled = render(name, {block: f"# {block} is here" for block in blocks})
    assert not re.search(r"^#%", filled, re.MULTILINE)
    assert all(f"# {block} is here" in filled for block in blocks)
    for script in (text, filled):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert script.startswith("#!/bin/bash\n")
        assert "set -euo pipefail" in script
        assert not re.search(r"^#SBATCH -\w\b", script, re.MULTILINE)
        assert max(map(len, script.splitlines())) <= 100
    with pytest.raises(Error, match="no place for nothing"):
        render(name, {"nothing": ""})


def request(**changes):
    options = {"name": "a", "train": ["hpctrain", "train", "a b.py"], "options": {"nodes": "2"},
               "site": Site(), "template": "train", "run": Path("runs/a b")}  # fmt: skip
    return Request(**{**options, **changes})


def test_words_are_quoted():
    script = request().script("hpctrain submit 'a b.py'\nrm -rf /")
    assert "command=(hpctrain train 'a b.py')" in script
    assert "run='runs/a b'" in script
    assert "\nrm" not in script
    assert '#SBATCH --output="runs/a b/%x-%j.out"' in script


def test_a_site_goes_before_hpctrain_and_after_the_request():
    site = Site(options={"nodes": 9, "mem": 0, "exclusive": True, "requeue": False})
    options = request(site=site).resolved()
    assert options["nodes"] == "2" and options["mem"] == "0" and options["exclusive"] == ""
    gres = Site(gpus_by="gres")
    options = request(site=gres, options={"gpus-per-node": "4"}).resolved()
    assert options["gres"] == "gpu:4" and "gpus-per-node" not in options


def test_site_files(tmp_path):
    for name in ("a100-nccl", "cpu-openmpi", "lumi-g"):
        assert load(name, {}).sbatch()["partition"]
    assert load("lumi-g", {}).launch().endswith("--bind /var/spool/slurmd hpctrain.sif")
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('luncher = "srun"\n')
    with pytest.raises(Error, match=r"luncher: .*did you mean 'launcher'"):
        load(str(wrong), {})


def test_no_secrets_are_kept():
    secret = ("HPCTRAIN_PS_KEY", "AWS_SECRET", "PATHOLOGY", "PYTHON_PIN", "NCCL_AUTH", "CONDA_X")
    kept = environment({"PATH": "/bin", "NCCL_DEBUG": "INFO", **dict.fromkeys(secret, "x")})
    assert kept == {"NCCL_DEBUG": "INFO", "PATH": "/bin"}
    given = ["submit", "--export=ALL,WANDB=s3cret,B=2", "--export", "C=s3cret", "--set",
             "logger.token=s3cret", "--set=a.password=s3cret", "--lr", "0.1"]  # fmt: skip
    line = command_line(given)
    assert "s3cret" not in line and "ALL,WANDB,B" in line and line.endswith("--lr 0.1")
    made = request(options={"export": "ALL,WANDB=s3cret"})
    assert made.resolved()["export"] == "ALL,WANDB" and "s3cret" not in made.script(line)
    assert made.environment()["WANDB"] == "s3cret"


def test_the_arguments_of_ssh():
    words = ["-o", "PasswordAuthentication=no", "-o", "StrictHostKeyChecking=no", "n2", "-p", "22",
             "cd /a ; A=1 bash -c 'x -o y'"]  # fmt: skip
    assert split(words) == ("n2", "cd /a ; A=1 bash -c 'x -o y'")


@pytest.mark.parametrize(
    ("output", "what", "rank", "host", "code"),
    [
        ("srun: error: n2: task 1: Exited with exit code 5", "exit code", 1, "n2", 5),
        ("srun: error: n2: task 1: Killed", "SIGKILL", 1, "n2", 137),
        ("srun: error: n1: tasks 0,2: Segmentation fault (core dumped)", "SIGSEGV", 0, "n1", 139),
        ("srun: error: n3: task 4: Out Of Memory", "out of memory", 4, "n3", 137),
        ("srun: error: Node failure on n3", "node lost", None, "n3", 1),
        ("prterun noticed that process rank 2 with PID 5 on node n1 exited on\nsignal 9 (Killed).",
         "SIGKILL", 2, "n1", 137),
        ("   Process name: [prterun-n1-5140@1,2]\n   Exit code:    3\n", "exit code", 2, None, 3),
        ("peer process has unexpectedly disconnected.\n x\n Peer host:  n2\n", "rank lost", None,
         "n2", 137),
        ("Process 1 exit with status code 137.", "SIGKILL", 1, None, 137),
        ("srun: error: n1: task 0: Terminated\nsrun: error: n2: task 1: Killed", "SIGTERM", 0,
         "n1", 143),
    ],
)  # fmt: skip
def test_what_launchers_say(output, what, rank, host, code):
    failure = said(output)
    assert (failure.what, failure.rank, failure.host, failure.exit_code) == (what, rank, host, code)


def test_the_root_cause(tmp_path):
    """A rank's own account first, then deaths, then consequences, then codes."""
    killed = "srun: error: n2: task 1: Killed"
    assert root_cause(tmp_path, killed, 137, "srun").what == "SIGKILL"
    assert root_cause(tmp_path, "", -9, "srun").message == "srun was killed"
    assert root_cause(tmp_path, "", 0, "mpirun").what == "no result"
    assert root_cause(tmp_path, "", 7, "mpirun").exit_code == 7
    lost = '{"what": "PeerLost", "message": "m", "rank": 0, "consequence": true, "time": 1}'
    (tmp_path / "rank-0.json").write_text(lost)
    assert root_cause(tmp_path, killed, 143, "srun").what == "SIGKILL"
    assert root_cause(tmp_path, "", 143, "srun").what == "PeerLost"
    own = '{"what": "ValueError", "message": "m", "rank": 1, "time": 2, "exit_code": 1}'
    (tmp_path / "rank-1.json").write_text(own)
    failure = root_cause(tmp_path, killed, 143, "srun")
    assert failure == Failure("ValueError", "m", 1, None, 1, False, 2)
    assert str(failure) == "rank 1: ValueError: m (exit code 1)"
