"""Ranks of a step are ready for one another's messages before any is sent."""

import json
import sys
from pathlib import Path

PROGRAM = """\
import json, os, time
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
from hpctrain.world import pmix

MPI.Init()
late = os.environ["PMIX_RANK"] == "1"
time.sleep(1 if late else 0)
came = time.monotonic()
pmix.fence(60)
print(json.dumps({"late": late, "came": came, "went": time.monotonic()}), flush=True)
os._exit(0)
"""


CAUSES = {
    "SLURM_MEM_PER_CPU=100": "srun: SLURM_MEM_PER_CPU, SLURM_MEM_PER_GPU, and SLURM_MEM_PER_NODE",
    "SLURM_EXPORT_ENV=NONE": "cannot start: hpctrain: No such file or directory",
    "SLURM_EXCLUSIVE=1": "srun: Invalid --exclusive specification",
    "SLURM_CPU_BIND=nonsense": 'srun: unrecognized --cpu-bind argument "nonsense"',
}


def test_srun_that_cannot_start(site):
    """By what a job inherits: it fails once, with srun's own words, and no node is lost."""
    numbers = {}
    for cause in CAUSES:
        name = cause.partition("=")[0]
        Path(site.folder, f"{name}.toml").write_text(f'setup = ["export {cause}"]\n')
        done = site("submit", "digits", "--mem", "200", "--site", f"{name}.toml", "--out", name,
                    "--time", "10:00")  # fmt: skip
        assert done.returncode == 0, done.stdout
        numbers[cause] = done.stdout.split()[1].rstrip(":")
    for cause, number in numbers.items():
        site.cluster.wait_for(number, "FAILED")
        assert site.cluster.field(number, "Restarts") == "0"
        lines = site.log(cause.partition("=")[0]).splitlines()
        (line,) = (line for line in lines if line.startswith("hpctrain job: "))
        assert line == lines[-1]
        assert line.startswith(f"hpctrain job: failed: {CAUSES[cause]}") and "HINT: " in line


def test_nobody_goes_before_the_last_has_come(site):
    """Open MPI's own fences let every rank pass at once under Slurm."""
    Path(site.folder, "program.py").write_text(PROGRAM)
    said = site.cluster.call(
        "srun", "--mpi=pmix", "--nodes=3", "--ntasks=3", sys.executable, "program.py",
        cwd=site.folder, env={"PMIX_MCA_psec": "native"},
    )  # fmt: skip
    ranks = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert len(ranks) == 3, said
    last = max(rank["came"] for rank in ranks if rank["late"])
    assert all(rank["went"] >= last for rank in ranks)
