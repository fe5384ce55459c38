"""A run that is asked to stop saves where it is, says so, and can be gone on with."""

import json
import signal

import psutil
import pytest

from tests.e2e.conftest import result_of
from tests.slurm.conftest import TASK, slow_until
from tests.waiting import SECONDS

EXIT_CODE = 75


def ranks_of(process):
    """The launcher's descendants that train."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [p for p in found if any(part.endswith("/hpctrain") for part in p.cmdline())]


def interrupted(folder):
    return json.loads((folder / "run" / "interrupted.json").read_text())


def test_a_signal_to_one_rank(hpctrain):
    """It ends them all at the same step; gone on with, the run ends with the same bits."""
    held = (TASK, "--epochs", 8, *slow_until("", at=30, file="go"))
    with hpctrain.training(*held, ranks=2) as process:
        ranks = sorted(ranks_of(process), key=lambda p: p.environ()["OMPI_COMM_WORLD_RANK"])
        ranks[1].send_signal(signal.SIGUSR1)
        ranks[1].send_signal(signal.SIGUSR1)  # a second one changes nothing
        (hpctrain.folder / "go").touch()
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == EXIT_CODE, output
    assert "interrupted: step" in output and "Traceback" not in output
    step = interrupted(hpctrain.folder)["step"]
    assert 0 < step < 8 * 23
    assert not (hpctrain.folder / "run" / "result.json").exists()
    hpctrain.train(*held, "--out", "run", "--resume", "auto", ranks=2)
    result = result_of(hpctrain.folder / "run")
    assert result["world"][-1]["step"] == step
    hpctrain.train(*held, "--out", "whole", ranks=2)
    whole = result_of(hpctrain.folder / "whole")
    assert result["parameters_sha256"] == whole["parameters_sha256"]


@pytest.mark.parametrize("consistency", ["sync", "async"])
def test_a_file_asks_a_parameter_server(hpctrain, consistency):
    run = ["digits", "--strategy", "ps", "--consistency", consistency, "--epochs"]
    with hpctrain.training(*run, 4000, ranks=3) as process:
        (hpctrain.folder / "run" / "stop").touch()
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == EXIT_CODE, output
    done = interrupted(hpctrain.folder)["step"]
    assert 0 < done < 4000 * 23
    epochs = done // 23 + 2
    hpctrain.train(*run, epochs, "--out", "run", "--resume", "auto", ranks=3)
    assert result_of(hpctrain.folder / "run")["metrics"]["final"]["val_accuracy"] > 0.9


def test_there_is_no_such_signal(hpctrain):
    result = hpctrain("train", "digits", "--set", "interrupt.signal=USR3")
    assert result.returncode == 2
    assert "there is no signal USR3. HINT:" in result.stdout
