"""How elastic_hosts.py starts each engine in a Slurm job: hpctrain, and stock elastic Horovod.

``stock`` is as Horovod's documentation has it: ``horovodrun`` in the batch script, on the first of
the hosts that also train; hosts found by Slurm's state; everything else by default. ``stock-tuned``
is what it takes to outlive more: the driver on a host of its own, a Gloo timeout of 10 s, ssh that
notices a silent host, hosts found by Slurm's state and by a probe, and taken back after a while.
Both reach hosts by ssh; there is an sshd on each.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks import elastic_tasks
from benchmarks.harness.processes import module
from tests.slurm.cluster import Cluster

WORKERS = 3


class Work(NamedTuple):
    """What to train: a ready task, its shards or None, the global batch, and how many steps."""

    task: str
    data: Path | None
    batch_size: int
    steps: int


class Hpctrain:
    """``hpctrain submit --elastic``; rank 0, the batch script and srun are on the first host."""

    driver = "n1"

    def submit(self, cluster: Cluster, work: Work, run: Path) -> str:
        """Submit the job, and return its number."""
        task = {"digits": "Digits", "cifar10": "Cifar10"}[work.task]
        data = [] if work.data is None else ["--data", str(work.data)]
        said = cluster.call(
            "hpctrain", "submit", f"{elastic_tasks.__file__}:{task}", *data,
            "--batch-size", work.batch_size, "--steps", work.steps, "--nodes", WORKERS,
            "--elastic", "--trace-samples", "--set", f"options.times={run}",
            "--set", "log.every_steps=2", "--set", "log.tensorboard=false",
            "--out", run, "--time", "20:00", cwd=run.parent,
        )  # fmt: skip
        return str(said.split()[1].rstrip(":"))


@dataclass
class Stock:
    """Elastic Horovod."""

    tuned: bool

    driver = "n1"

    def submit(self, cluster: Cluster, work: Work, run: Path) -> str:
        """Submit the job, and return its number."""
        run.mkdir()
        ssh(cluster, run.parent, self.tuned)
        (run.parent / "hosts.sh").write_text(PROBED if self.tuned else LISTED)
        (run.parent / "hosts.sh").chmod(0o755)
        (run.parent / "job.sh").write_text(self.script(work, run))
        said = cluster.call("sbatch", "--parsable", run.parent / "job.sh")
        return str(said.split()[-1])

    def script(self, work: Work, run: Path) -> str:
        """Return what sbatch is given."""
        nodes = WORKERS + 1 if self.tuned else WORKERS
        options = ["--network-interfaces eth0", "--blacklist-cooldown-range 5 20"]
        job = {
            "task": work.task,
            "data": work.data and str(work.data),
            "rank_batch_size": work.batch_size // WORKERS,
            "steps": work.steps,
            "out": str(run),
        }
        return "\n".join([
            "#!/bin/bash",
            f"#SBATCH --job-name=stock --nodes={nodes} --ntasks-per-node=1 --no-kill",
            f"#SBATCH --time=20:00 --output={run}/job.out",
            f"export PATH={run.parent}/bin:$PATH",
            "export HOROVOD_GLOO_TIMEOUT_SECONDS=10" if self.tuned else "",
            f"exec horovodrun -np {WORKERS} --min-np {WORKERS - 1} --max-np {WORKERS} \\",
            f"  --host-discovery-script {run.parent}/hosts.sh \\",
            f"  {' '.join(options) if self.tuned else ''} \\",
            f"  {shlex.join(module('elastic_stock', json.dumps(job)))}",
            "",
        ])  # fmt: skip


ENGINES: dict[str, Hpctrain | Stock] = {
    "hpctrain": Hpctrain(),
    "stock": Stock(tuned=False),
    "stock-tuned": Stock(tuned=True),
}

LISTED = """\
#!/bin/bash
down=" $(sinfo --noheader --Node --states=down,drain,fail --format=%N | tr '\\n' ' ')"
for host in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
  [[ $down == *" $host "* ]] || echo "$host:1"
done
"""

# Without the driver's host, and with a probe, which asks slurmd.
PROBED = """\
#!/bin/bash
down=" $(sinfo --noheader --Node --states=down,drain,fail --format=%N | tr '\\n' ' ')"
answers() { timeout 1 bash -c "</dev/tcp/$1/6818" 2>/dev/null; }
for host in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
  [[ $host == $(hostname) || $down == *" $host "* ]] && continue
  answers "$host" || answers "$host" && echo "$host:1"
done
exit 0
"""

SSHD = """\
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PidFile /run/sshd.pid
MaxStartups 100
"""

SSH = """\
IdentityFile {folder}/key
UserKnownHostsFile /dev/null
LogLevel ERROR
BatchMode yes
"""

KEEP_ALIVE = """\
ServerAliveInterval 3
ServerAliveCountMax 2
ConnectTimeout 5
"""


def ssh(cluster: Cluster, run: Path, tuned: bool) -> None:
    """See that every host has an sshd, and put an ``ssh`` in ``bin`` of a folder that knows them.

    Args:
        cluster: Whose hosts.
        run: The folder.
        tuned: Whether ssh notices a silent host.
    """
    folder = cluster.folder / "ssh"
    if not folder.exists():
        folder.mkdir(mode=0o700)
        cluster.call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key")
        (folder / "sshd").write_text(SSHD.format(folder=folder))
    start = "[ -e /run/sshd.pid ] || { mkdir -p /run/sshd && exec /usr/sbin/sshd -f $0; }"
    for name in cluster.names:
        cluster.enter(name, "sh", "-c", start, folder / "sshd")
    config = run / "ssh"
    config.write_text(SSH.format(folder=folder) + (KEEP_ALIVE if tuned else ""))
    (run / "bin").mkdir()
    (run / "bin" / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {config} "$@"\n')
    (run / "bin" / "ssh").chmod(0o755)
