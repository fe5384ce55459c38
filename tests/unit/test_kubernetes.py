"""An MPIJob is what was asked for, and valid YAML whatever its values hold."""

import pytest
from click.testing import CliRunner

from hpctrain.cli import cli
from hpctrain.errors import Error
from hpctrain.slurm.kubernetes import manifest

yaml = pytest.importorskip("yaml")

TRAIN = ["hpctrain", "train", "digits", "--set", "options.note=a: 'b' #\n- \"c\" {{ x }} <é>"]


def made(asked, run="/data/run", volumes=("claim:/data",), name="My_Job.1", **more):
    options = {"restarts": 3, "made": "hpctrain submit\nrm -rf", **more}
    return yaml.safe_load(manifest(name, TRAIN, asked, run, "reg/image:1", volumes, **options))


def test_size_and_command():
    job = made(
        {"nodes": "2", "ntasks-per-node": "4", "cpus-per-task": "3", "gpus-per-node": "a100:4",
         "mem": "64000", "time": "1-00:00:30"}
    )  # fmt: skip
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    assert job["metadata"]["name"] == "my-job-1"
    spec = job["spec"]
    assert spec["slotsPerWorker"] == 4
    policy = {"cleanPodPolicy": "Running", "backoffLimit": 3, "activeDeadlineSeconds": 86430}
    assert spec["runPolicy"] == policy
    roles = spec["mpiReplicaSpecs"]
    assert roles["Launcher"]["replicas"] == 1 and roles["Worker"]["replicas"] == 2
    launcher, worker = (
        roles[role]["template"]["spec"]["containers"][0] for role in ("Launcher", "Worker")
    )
    assert launcher["command"][:3] == ["mpirun", "-np", "8"]
    ends = ["--world-size", "8", "--out", "/data/run", "--resume", "auto"]
    assert launcher["args"] == [*TRAIN, *ends]
    assert worker["resources"]["limits"] == {"cpu": 12, "memory": "64000Mi", "nvidia.com/gpu": 4}
    for role in roles.values():
        pod = role["template"]["spec"]
        assert pod["containers"][0]["volumeMounts"] == [{"name": "claim", "mountPath": "/data"}]
        assert pod["volumes"] == [
            {"name": "claim", "persistentVolumeClaim": {"claimName": "claim"}}
        ]


def test_defaults():
    spec = made({})["spec"]
    assert "activeDeadlineSeconds" not in spec["runPolicy"]
    assert spec["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["resources"] == {
        "limits": {}
    }


@pytest.mark.parametrize(
    ("asked", "more", "message"),
    [
        ({"partition": "gpu"}, {}, "--partition has no counterpart"),
        ({}, {"run": "runs/digits"}, "runs/digits is on no volume"),
        ({}, {"volumes": ("claim",)}, "claim is not CLAIM:/PATH"),
        ({"mem": "much"}, {}, "--mem much is no amount"),
    ],
)
def test_mistakes_are_one_line(asked, more, message):
    with pytest.raises(Error, match=message) as raised:
        made(asked, **more)
    assert raised.value.hint


def test_the_command():
    words = "submit digits --epochs 3 --to kubernetes --image i --volume c:/d --out /d/r --nodes 2"
    told = CliRunner().invoke(cli, words.split(), catch_exceptions=False)
    assert told.exit_code == 0, told.output
    job = yaml.safe_load(told.output)
    launcher = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
    assert launcher["args"][:5] == ["hpctrain", "train", "digits", "--epochs", "3"]
    assert launcher["args"].count("--out") == 1
