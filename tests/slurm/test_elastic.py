"""`--elastic` on a real cluster: hosts are lost, and training goes on in the same processes."""

import pytest

from tests.slurm.conftest import TASK, slow_until

RUN = (TASK, "--elastic", "--epochs", 7, *slow_until("lost", at=45), "--trace-samples",
       "--set", "log.every_steps=5", "--set", "log.tensorboard=false")  # fmt: skip


def outcome(site, run):
    """The result, when it is there, and what was recorded of losses."""
    result = site.ended()
    done = site("trace", run)
    assert done.returncode == 0 and "each once an epoch" in done.stdout, done.stdout
    return result, [line for line in site.metrics() if "lost" in line]


@pytest.mark.parametrize(("host", "how"), [("n3", "cut"), ("n1", "kill")])
def test_a_host_is_lost(hosts, site, host, how):
    """Also the one with rank 0, the batch script and srun."""
    number, run = site.submit(*RUN, "--nodes", 3)
    site.reached(40)
    try:
        getattr(hosts, how)(host)
        result, lost = outcome(site, run)
    finally:
        if how == "cut":
            hosts.heal(host)
    assert "elastic: ulfm" in site.log()
    assert [change["size"] for change in result["world"]] == [3, 2]
    assert [line["host"] for line in lost] == [host]
    code, said = site.wait()
    assert code == 0, said
    if host == "n1":  # the job itself learns that it is completed, when it is started again
        hosts.wait_for(number, "COMPLETED")
