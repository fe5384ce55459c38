"""Horovod's own tests of its PyTorch side, on the Horovod that is installed here.

    git clone --depth 1 --branch v0.28.1 https://github.com/horovod/horovod
    python -m tests.conformance horovod

Its releases on PyPI come without tests, so they are taken from a clone of the tag. Each file runs
on 2 ranks over MPI and over Gloo, and is ended after a bound. Those of process sets say
`horovod.tensorflow` and use nothing of TensorFlow; they are run with `horovod.torch`.

Prints a table, and each failure with the last line of its message. The exit code is 1 where a test
failed that is not among `KNOWN`.
"""

import argparse
import os
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from hpctrain.process import run

FILES = ("test_torch", "test_process_sets_static", "test_process_sets_multi_comm",
         "test_adasum_pytorch", "test_timeline")  # fmt: skip
CONTROLLERS = ("mpi", "gloo")
SECONDS = 1800.0
FOLDER = Path("build", "conformance")
"""What the ranks said stays here."""

MUON = "tries every optimizer of torch; Muon, which is newer, refuses parameters of one dimension"
KNOWN = dict.fromkeys(
    ["test_broadcast_state", "test_broadcast_state_options", "test_force_allreduce"], MUON
)
"""Tests that fail, and why that is no fault of the build."""

STOPS = "            hvd.barrier()\n            hvd.shutdown()"
"""After each test, under Gloo. The launcher's store has the addresses of a world until all ranks
have left it, and a rank that begins again before that is refused at one of them."""

AGAIN = "test_torch.py::TorchTests::test_horovod_reinit"
"""Does just that; all tests after it would fail, too. Over MPI it is skipped anyway."""

GET = "git clone --depth 1 --branch v0.28.1 https://github.com/horovod/horovod"


def prepared(source, folder):
    """A copy of what is needed of the tests, without TensorFlow, and without a package `mock`."""
    shutil.copytree(source / "test" / "utils", folder / "utils")
    (folder / "utils" / "mock.py").write_text(
        "import sys, unittest.mock\nsys.modules['mock'] = unittest.mock\n"
    )
    (folder / "parallel").mkdir()
    for name in FILES:
        text = (source / "test" / "parallel" / f"{name}.py").read_text()
        text = text.replace("import horovod.tensorflow as hvd", "import horovod.torch as hvd")
        text = text.replace(STOPS, STOPS.partition("\n")[0])
        (folder / "parallel" / f"{name}.py").write_text(text)


def outcomes(report):
    """Of each test of a rank's report: its name, and what went wrong; "" where nothing did."""
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        wrong = [case.find(kind) for kind in ("failure", "error")]
        message = next((w.get("message") or w.text for w in wrong if w is not None), "")
        skipped = case.find("skipped")
        yield case.get("name"), message, skipped is not None and skipped.get("message")


def tested(folder, name, controller):
    """Run a file; the outcome of each test, the worst of all ranks, and what the launcher said."""
    reports = folder / f"{controller}-{name}"
    reports.mkdir()
    # Each rank's report of its own: a shell knows the rank by the launcher's variables.
    script = (
        'rank="${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-$HOROVOD_RANK}}"\n'
        f'exec "{sys.executable}" -m pytest -q -p no:cacheprovider '
        f'--junit-xml="{reports}/$rank.xml" --deselect {AGAIN} {name}.py\n'
    )
    (reports / "rank.sh").write_text(script)
    # Gloo's own limit of 30 s is short for a rank that is started on a busy machine.
    environment = {"HOROVOD_GLOO_TIMEOUT_SECONDS": str(round(SECONDS)), **os.environ}
    done = run(
        ["horovodrun", f"--{controller}", "-np", "2", "sh", str(reports / "rank.sh")],
        timeout_seconds=SECONDS, cwd=folder / "parallel", env=environment,
    )  # fmt: skip
    (reports / "log").write_text(done.stdout)
    found = {}
    for report in sorted(reports.glob("*.xml")):
        for test, message, skipped in outcomes(report):
            before = found.get(test, ("", skipped))
            found[test] = (before[0] or message, skipped)
    return found, done


def main():
    """Run them all; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a clone of Horovod's tag v0.28.1")
    parser.add_argument("--files", default=",".join(FILES), help="only these")
    options = parser.parse_args()
    if not (options.source / "test" / "parallel" / "test_torch.py").exists():
        parser.error(f"{options.source} holds no tests of Horovod. HINT: {GET}")
    unknown = 0
    folder = FOLDER.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    prepared(options.source, folder)
    for file in options.files.split(","):
        for controller in CONTROLLERS:
            found, done = tested(folder, file, controller)
            failed = {test: m for test, (m, _) in found.items() if m}
            skipped = sum(s is not None and s is not False for _, s in found.values())
            passed = len(found) - len(failed) - skipped
            print(f"{file:30} {controller:5} {passed:4} passed {len(failed):3} failed "
                  f"{skipped:3} skipped", flush=True)  # fmt: skip
            for test, message in sorted(failed.items()):
                why = KNOWN.get(test)
                unknown += why is None
                print(f"    {test}: {why or message.strip().splitlines()[-1][:200]}")
            if not found or done.returncode not in (0, 1) or (done.returncode and not failed):
                unknown += 1
                print(f"    exit code {done.returncode}:", done.stdout[-2000:], sep="\n")
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
