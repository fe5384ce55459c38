"""A run as an MPIJob, which the Kubeflow MPI Operator (v2) starts on Kubernetes.

https://www.kubeflow.org/docs/components/trainer/legacy-v1/user-guides/mpi/ and the operator's
CustomResourceDefinition ``mpijobs.kubeflow.org``, version ``v2beta1``. Only the manifest is made.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from hpctrain import __version__
from hpctrain.errors import Error
from hpctrain.slurm import options
from hpctrain.slurm.options import Options
from hpctrain.slurm.render import HERE
from hpctrain.slurm.schedulers import size_of

_SAID = ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "gres", "time",
    "mem", "job-name")  # fmt: skip
_MEMORY = re.compile(r"(\d+)([KMGT]?)")
_HOSTS = "/etc/mpi/hostfile"  # which the operator writes, one line a worker


def manifest(
    name: str,
    train: list[str],
    asked: Options,
    run: str,
    image: str,
    volumes: tuple[str, ...],
    *,
    restarts: int,
    made: str,
) -> str:
    """Return the manifest of an MPIJob, for ``kubectl apply -f -``.

    Args:
        name: The job's name; what Kubernetes does not allow in one becomes a hyphen.
        train: The command of each rank, without ``--out``, ``--resume`` and ``--world-size``.
        asked: The size of the job, in sbatch's options; ``nodes`` are workers.
        run: The run folder, on a volume.
        image: The container image, with hpctrain, an MPI and an SSH server.
        volumes: ``CLAIM:PATH`` each: a PersistentVolumeClaim, and where it is mounted.
        restarts: How often the launcher may be started again; it goes on from a checkpoint.
        made: The command line to name as the manifest's origin.

    Raises:
        Error: An option has no counterpart, or the run folder would be gone with its pod.
    """
    import jinja2

    for option in asked:
        if option not in _SAID:
            raise Error(
                f"--{option} has no counterpart in an MPIJob.",
                hint="leave it out, and write what you need into the manifest.",
            )
    mounts = dict(map(_mount, volumes))
    if not any(PurePosixPath(run).is_relative_to(path) for path in mounts.values()):
        raise Error(
            f"the run folder {run} is on no volume: it would be gone with its pod.",
            hint="--volume CLAIM:/data --out /data/runs/NAME, with a claim that is ReadWriteMany.",
        )
    size = size_of({"nodes": "1", "ntasks-per-node": "1", **asked})
    ranks = size.nodes * size.tasks
    limits: dict[str, int | str] = {"cpu": size.tasks * size.cores} if size.cores else {}
    if "mem" in asked:
        limits["memory"] = _memory(asked["mem"])
    if size.gpus:
        limits["nvidia.com/gpu"] = size.gpus
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 - every value is written as JSON, which YAML contains
    )
    return environment.get_template("mpijob.yaml").render(
        made=f"Made by hpctrain {__version__}: {' '.join(made.split())}",
        name=_label(name),
        slots=size.tasks,
        workers=size.nodes,
        restarts=restarts,
        seconds=options.seconds(asked["time"]) if "time" in asked else None,
        image=image,
        start=["mpirun", "-np", str(ranks), "--hostfile", _HOSTS, "--allow-run-as-root",
               "--bind-to", "none", "-x", "PATH", "-x", "LD_LIBRARY_PATH"],
        command=[*train, "--world-size", str(ranks), "--out", run, "--resume", "auto"],
        limits=limits,
        mounts=mounts,
    )  # fmt: skip


def _label(name: str) -> str:
    """Return a name that a DNS label may have (RFC 1123), short enough for its pods' suffixes."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-")
    return label or "hpctrain"


def _mount(volume: str) -> tuple[str, str]:
    claim, colon, path = volume.partition(":")
    if not (claim and colon and path.startswith("/")):
        raise Error(f"--volume {volume} is not CLAIM:/PATH.", hint="--volume my-claim:/data.")
    return claim, path


def _memory(text: str) -> str:
    """Return sbatch's ``--mem`` (megabytes where no unit is given) as a Kubernetes quantity."""
    found = _MEMORY.fullmatch(text.upper().removesuffix("B"))
    if found is None:
        raise Error(f"--mem {text} is no amount of memory.", hint="--mem 64G.")
    return f"{found[1]}{found[2] or 'M'}i"
