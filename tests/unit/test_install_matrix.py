"""The matrix of set-ups: what it records of cells, and of those that this machine cannot have."""

import os
import subprocess
import types

import pytest

from benchmarks import install_matrix as matrix


def test_a_python_that_is_not_here(monkeypatch, tmp_path):
    monkeypatch.setitem(matrix.CELLS, "none", matrix.Cell(python="3.999"))
    record = matrix.tried("none", tmp_path)
    assert record["result"] == "not run" and record["reason"] == "no Python 3.999 here"
    assert list(tmp_path.iterdir()) == []


def test_an_mpi_that_is_not_here(monkeypatch, tmp_path):
    monkeypatch.setitem(matrix.CELLS, "none", matrix.Cell(mpi="Another MPI"))
    assert matrix.tried("none", tmp_path)["reason"] == "no mpicxx and mpirun of 'Another MPI' here"


def test_a_disk_that_is_full(monkeypatch, tmp_path):
    monkeypatch.setattr(matrix.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**30))
    assert matrix.tried("newest", tmp_path)["reason"] == "less than 25 GiB of disk are free"


def test_a_step_that_fails_is_named_and_its_environment_deleted(monkeypatch, tmp_path):
    commands = {"set-up": [["sh", "-c", "echo made; touch it"]], "build": [["sh", "-c", "exit 3"]]}
    monkeypatch.setattr(matrix, "steps", lambda cell, place: commands)
    record = matrix.tried("newest", tmp_path)
    assert record["result"] == "failed" and record["seconds"].keys() == {"set-up"}
    assert record["reason"].startswith("build: ") and "exit status 3" in record["reason"]
    assert not (tmp_path / "cell").exists()
    assert "$ sh -c echo made; touch it\nmade\n" in (tmp_path / "newest.log").read_text()


def test_a_command_without_end(tmp_path):
    (tmp_path / "work").mkdir()
    with pytest.raises(subprocess.TimeoutExpired), (tmp_path / "log").open("w") as log:
        matrix.run(["sleep", "600"], tmp_path, {"PATH": os.environ["PATH"]}, log, 0.1)


def test_the_table_has_the_newest_record_of_every_cell():
    records = [
        {"cell": "newest", "date": "2026-01-01", "result": "failed", "reason": "build: x"},
        {
            **{"cell": "newest", "date": "2026-01-02", "result": "ok", "torch": "2.99"},
            "seconds": {"set-up": 61.0},
        },
    ]
    lines = matrix.table(records).splitlines()
    assert len(lines) == 2 + len(matrix.CELLS)
    (line,) = (line for line in lines if line.startswith("| newest |"))
    assert "| 2.99 |" in line and "| 61 |" in line and line.endswith("| ok | 2026-01-02 |")
    assert all(line.endswith("| not run |  |") for line in lines[3:])


def test_an_unknown_cell(capsys):
    with pytest.raises(SystemExit):
        matrix.BENCHMARK.main(["torch 1.0"])
    assert "there is no cell torch 1.0; --list says which there are" in capsys.readouterr().err
