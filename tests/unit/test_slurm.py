"""What hpctrain knows of Slurm without one: options, host lists, templates, causes."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.errors import Error
from hpctrain.slurm.diagnosis import root_cause, said
from hpctrain.slurm.hosts import Node, expand, nodes
from hpctrain.slurm.options import directive, parse, seconds
from hpctrain.slurm.render import HERE, render
from hpctrain.slurm.schedulers import directives
from hpctrain.slurm.site import Container, Site, load, quote
from hpctrain.slurm.ssh import split
from hpctrain.slurm.submit import Request, Warn, command_line, environment
from hpctrain.world.failure_record import Failure

TEMPLATES = sorted(path.name for path in HERE.glob("*.sbatch")) + ["unattended.sh"]


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
    text = (HERE / name).read_text()
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


@pytest.mark.parametrize(
    ("asked", "site", "ranks"),
    [
        ({"gpus-per-node": "4"}, {}, {"ntasks-per-node": "4", "nodes": "2"}),
        ({"gpus-per-node": "a100:4"}, {}, {"ntasks-per-node": "4"}),
        ({"gres": "gpu:4"}, {}, {"ntasks-per-node": "4"}),
        ({"gres": "gpu:a100:4,nvme:100"}, {}, {"ntasks-per-node": "4"}),
        ({"gres": "gpu"}, {}, {"ntasks-per-node": "1"}),
        ({"gres": "nvme:100"}, {}, {"ntasks-per-node": "1"}),
        ({"gpus": "8"}, {}, {"ntasks-per-node": "4", "ntasks": None}),
        ({"gpus": "7"}, {}, {"ntasks": "7", "ntasks-per-node": None}),
        ({"gpus": "8", "gpus-per-task": "2"}, {}, {"ntasks-per-node": "2"}),
        ({"gpus-per-node": "4", "gpus-per-task": "2"}, {}, {"ntasks-per-node": "2"}),
        ({"gpus-per-task": "1", "ntasks": "6"}, {}, {"ntasks": "6", "ntasks-per-node": None}),
        ({}, {"gres": "gpu:4"}, {"ntasks-per-node": "4"}),
        ({}, {"ntasks": 6}, {"ntasks": "6", "ntasks-per-node": None}),
        ({}, {"ntasks-per-node": 3, "gpus-per-node": 4}, {"ntasks-per-node": "3"}),
        # What is asked for goes before the site's, also where it is said in another way.
        ({"gres": "gpu:2"}, {"gpus-per-node": 4, "ntasks-per-node": 4},
         {"ntasks-per-node": "2", "gpus-per-node": None}),
        ({"gpus-per-node": "2"}, {"gres": "gpu:4,nvme:1"},
         {"ntasks-per-node": "2", "gres": "nvme:1"}),
        ({"mem-per-cpu": "2G"}, {"mem": 0}, {"mem": None, "mem-per-cpu": "2G"}),
        ({"no-requeue": ""}, {}, {"requeue": None, "no-requeue": ""}),
    ],
)  # fmt: skip
def test_ranks_by_gpus(asked, site, ranks):
    found = request(options={"nodes": "2", **asked}, site=Site(options=site)).resolved()
    assert {name: found.get(name) for name in ranks} == ranks


def test_what_does_not_say_how_many_ranks():
    with pytest.raises(Error, match="does not say how many ranks"):
        request(options={"gpus-per-task": "1"}).resolved()
    with pytest.raises(Error, match="no number of GPUs"):
        request(options={"gpus-per-node": "many"}).resolved()


def test_an_array_would_share_a_folder():
    with pytest.raises(Error, match="--array would train in the same folder"):
        request(options={"array": "1-3"}).script("x")


def test_the_signal_that_time_is_up():
    script = request(warn=Warn.parse("INT@300")).script("x")
    assert "#SBATCH --signal=B:INT@300" in script and "trap '' INT" in script
    assert 'job=(hpctrain job --run "$run" --max-requeues 20 --signal INT)' in script
    site = Site(options={"signal": "B:USR2@600"})
    assert "#SBATCH --signal=B:USR2@600" in request(site=site).script("x")
    assert "#SBATCH --signal=B:USR1@120" in request().script("x")
    for wrong in ("KILL", "USR1@soon", "B:", "NOTHING"):
        with pytest.raises(Error, match="HINT"):
            Warn.parse(wrong)


def test_names_with_percent_signs_and_folders():
    assert request(run=Path("a%j")).resolved()["output"] == "a%%j/%x-%j.out"
    elsewhere = request(options={"chdir": "/tmp"}, run=Path("runs/a"))
    assert elsewhere.resolved()["output"] == str(Path.cwd() / "runs/a/%x-%j.out")
    assert f"run={Path.cwd() / 'runs/a'}" in elsewhere.script("x")


def test_the_lines_of_a_site_go_in_order():
    """A purge before what is loaded, what is activated after; and none of it under `set -u`."""
    site = Site(
        modules=["cuda/12"],
        setup=["conda activate a", "module --force purge", "ml use /appl"],
        environment={"A": "$HOME/b", "B": "$(rm -rf /)`x`"},
    )
    lines = request(site=site).script("x").splitlines()
    order = ["trap '' USR1", "module --force purge", "ml use /appl", "module load cuda/12",
             "conda activate a", 'export A="$HOME/b"', "export B='$(rm -rf /)`x`'",
             "set -euo pipefail"]  # fmt: skip
    assert [line for line in lines if line in order] == order


@given(st.text(alphabet=st.characters(exclude_characters="\0", codec="utf-8")))
def test_words_mean_what_they_say(text):
    """To bash; but for variables, which are expanded."""
    said = subprocess.run(
        ["bash", "-c", f"printf %s {quote(text + '$HERE/${HERE}')}"],
        env={"HERE": "a b"}, capture_output=True, check=False, text=True, encoding="utf-8",
    )  # fmt: skip
    if "$" not in text:
        assert said.stdout == text.replace("\r\n", "\n").replace("\r", "\n") + "a b/a b"
    assert said.returncode == 0


def test_launchers():
    own = Site(
        launcher="mpiexec -n {ranks} --ppn {ranks_per_node} -d $DIR", launcher_options=["-v"]
    )
    words = '"$SLURM_NTASKS" --ppn "$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))" -d "$DIR" -v'
    assert own.launch() == f"mpiexec -n {words}"
    assert own.launch("ibrun") == "ibrun"
    box = Container(image="$IMAGES/a.sif", binds=["$SCRATCH:/data", "/a b"])
    assert (
        Site(container=box)
        .launch()
        .endswith("""apptainer exec --bind "$SCRATCH:/data" --bind '/a b' "$IMAGES/a.sif\"""")
    )
    for wrong in ("srn", "flux run -n {rank}", "'"):
        with pytest.raises(Error, match="HINT"):
            Site(launcher=wrong).launch()


SITES = {
    "perlmutter": ["#SBATCH --constraint=gpu", "#SBATCH --gpus-per-node=4", "--mpi=cray_shasta"],
    "mahti": ["#SBATCH --gres=gpu:a100:4", "module purge\nmodule load pytorch"],
    "lumi-g": ["#SBATCH --partition=standard-g", "#SBATCH --mem=480G", "singularity exec --rocm"],
    "juwels-booster": ["#SBATCH --gres=gpu:4", "module --force purge\nmodule load Stages/2024",
                       "--mpi=pspmix"],
    "frontier": ["#SBATCH --cpus-per-task=7", 'MIOPEN_USER_DB_PATH="/tmp/$USER-miopen"'],
    "setonix": ["#SBATCH --gres=gpu:8", "#SBATCH --exclusive", "--gpus-per-task=1"],
    "marenostrum5": ["#SBATCH --qos=acc_ehpc", "#SBATCH --cpus-per-task=20"],
    "frontera": ["#SBATCH --partition=normal", "launch=(ibrun)"],
    "polaris": ["#PBS -l select=2:system=polaris", "#PBS -l walltime=1:00:00", "#PBS -q prod",
                "#PBS -A abc", 'cd "$PBS_O_WORKDIR"', "mpiexec -n 8 --ppn 4 --depth=8",
                "--world-size 8"],
    "tuolumne": ["#flux: --nodes=2", "#flux: --nslots=8", "#flux: --time-limit=60m",
                 "#flux: --bank=abc", "flux run --nodes=2 --ntasks=8"],
    "a100-nccl": ["#SBATCH --gpus-per-node=4"],
    "cpu-openmpi": ["launch=(mpirun --bind-to none)"],
}  # fmt: skip


@pytest.mark.parametrize("name", [path.stem for path in (HERE / "sites").glob("*.toml")])
def test_sites(name):
    """The scripts of real clusters, as their documentation has them."""
    options = {"nodes": "2", "account": "abc"}
    script = request(site=load(name, {}), options=options).script("made")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert SITES[name]
    for words in SITES[name]:
        assert words in script
    kinds = {line.partition(" ")[0] for line in script.splitlines() if re.match(r"#\w", line)}
    assert len(kinds) == 1  # directives of one scheduler


def test_other_schedulers():
    size = {"nodes": "3", "ntasks-per-node": "2", "cpus-per-task": "4", "gpus-per-node": "2"}
    asked = {**size, "time": "1-1:30", "partition": "q"}
    assert directives("pbs", asked, []) == [
        "#PBS -l walltime=25:30:00",
        "#PBS -l select=3:mpiprocs=2:ncpus=8:ompthreads=4:ngpus=2",
        "#PBS -q q",
    ]
    assert directives("lsf", asked, ["-x"]) == [
        "#BSUB -W 25:30", "#BSUB -n 6", '#BSUB -R "span[ptile=2]"', '#BSUB -gpu "num=2"',
        "#BSUB -q q", "#BSUB -x",
    ]  # fmt: skip
    with pytest.raises(Error, match="--constraint has no counterpart in flux"):
        directives("flux", {**asked, "constraint": "a"}, [])
    with pytest.raises(Error, match="not said"):
        directives("flux", {"nodes": "2", "ntasks": "3"}, [])
    with pytest.raises(Error, match="cannot stand in a batch script"):
        directives("pbs", {**asked, "account": "a\n#PBS -W x"}, [])


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
