"""Ranks of a step are ready for one another's messages before any is sent."""

import json
import sys
from pathlib import Path

PROGRAM = """\
import json, os, time
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
from hpctrain import pmix

MPI.Init()
late = os.environ["PMIX_RANK"] == "1"
time.sleep(1 if late else 0)
came = time.monotonic()
pmix.fence(60)
print(json.dumps({"late": late, "came": came, "went": time.monotonic()}), flush=True)
os._exit(0)
"""


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
