"""Parts of a user's own, each one class: an importer, a starter of ranks, a task of a package."""

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from hpctrain.cli import cli
from hpctrain.data.importers import ImportOptions, import_data
from hpctrain.data.importers.import_plan import Importer, Survey, stamp
from hpctrain.data.index import FieldSpec
from hpctrain.data.summary import Found
from hpctrain.errors import Error
from hpctrain.launch.launch import way_for
from hpctrain.tasks.task import load_task


class Levels(Importer):
    """A file of decimal numbers, one a line: each is a sample."""

    what = "levels"

    @classmethod
    def claims(cls, path):
        return path.suffix == ".levels"

    def survey(self):
        count = len(self.path.read_text().split())
        return Survey(
            runs=[("train", count)],
            fields={"level": FieldSpec("<f4", ())},
            bytes=4 * count,
            details={"stamp": stamp(self.path)},
            found=Found("levels, one a line"),
        )

    def read(self, survey, items):
        yield {"level": np.loadtxt(self.path, dtype="<f4")[items]}


class Counted:
    """Starts nothing."""

    def __init__(self, count):
        self.hosts = ["elsewhere"] * count


def declare(monkeypatch, group, name, place):
    point = metadata.EntryPoint(name, place, group)
    monkeypatch.setattr(
        metadata,
        "entry_points",
        lambda **by: [point] if by["group"] == group and by.get("name", name) == name else [],
    )


@pytest.fixture
def levels(tmp_path):
    path = tmp_path / "river.levels"
    path.write_text("1.5\n2.5\n-3\n")
    return path


def check(folder):
    from hpctrain.data.shards import ShardSet

    found = ShardSet(folder).split("train").take(np.arange(3))
    assert sorted(found["level"].tolist()) == [-3.0, 1.5, 2.5]


def test_an_importer_at_its_place(levels, tmp_path):
    done = CliRunner().invoke(
        cli, ["data", "import", str(levels), str(tmp_path / "out"), "--kind", f"{__name__}:Levels"]
    )
    assert done.exit_code == 0, done.output
    check(tmp_path / "out")


def test_an_importer_of_a_package_claims_its_files(levels, tmp_path, monkeypatch):
    with pytest.raises(Error, match="cannot be imported"):
        import_data(levels, tmp_path / "no", ImportOptions())
    declare(monkeypatch, "hpctrain.importers", "levels", f"{__name__}:Levels")
    import_data(levels, tmp_path / "out", ImportOptions())
    check(tmp_path / "out")


def test_an_importer_that_is_not_there(levels, tmp_path):
    with pytest.raises(Error, match="there is no importer 'tabels'. HINT: did you mean 'tables'"):
        import_data(levels, tmp_path / "out", ImportOptions(kind="tabels"))


def test_a_starter():
    way = way_for(3, None, None, [], Path(), f"{__name__}:Counted")
    assert isinstance(way, Counted) and way.hosts == ["elsewhere"] * 3
    with pytest.raises(Error, match="--starter without -np"):
        way_for(None, None, 2, [], Path(), "here")


def test_a_task_of_a_package(monkeypatch):
    declare(monkeypatch, "hpctrain.tasks", "numbers", "hpctrain.tasks.digits:Digits")
    assert load_task("numbers").__name__ == "Digits"
    with pytest.raises(Error, match="did you mean 'numbers'"):
        load_task("numbres")
