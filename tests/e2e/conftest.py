"""End-to-end tests start the installed command, as a user would."""

import json
import os
from pathlib import Path

import pytest

from hpctrain.process import mpirun, run

TIMEOUT_SECONDS = 120


class Command:
    """Runs `hpctrain ...` on some ranks; standard error is folded into the output."""

    def __init__(self, folder):
        self.folder = folder

    def prefix(self, ranks, launcher="mpirun"):
        if ranks == 0:
            return []
        if launcher == "mpirun":
            return mpirun(ranks)
        return ["horovodrun", *launcher.split()[1:], "-np", str(ranks)]

    def __call__(self, *arguments, ranks=0, launcher="mpirun", env=None):
        return run(
            [*self.prefix(ranks, launcher), "hpctrain", *map(str, arguments)],
            timeout_seconds=TIMEOUT_SECONDS,
            cwd=self.folder,
            env={**os.environ, **(env or {})},
        )

    def train(self, *arguments, **options):
        result = self("train", *arguments, **options)
        assert result.returncode == 0, result.stdout
        return result


@pytest.fixture
def hpctrain(tmp_path):
    return Command(tmp_path)


def result_of(folder):
    return json.loads((Path(folder) / "result.json").read_text())
