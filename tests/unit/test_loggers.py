"""Loggers: the same records for all; one that fails is left out; the run's own must be written."""

import csv
import json
import math
from pathlib import Path

import pytest

from hpctrain.errors import Error
from hpctrain.train.loggers import loggers_of
from hpctrain.train.loggers.base import Logger
from hpctrain.train.recorder import RunRecorder


def recorded(folder, specs, **options):
    recorder = RunRecorder(folder, 100, loggers_of(specs, tensorboard=False), {"seed": 3})
    recorder.write("train", 10, {"loss": 0.5, "epoch": 1}, **options)
    recorder.write("validation", 10, {"loss": math.inf})
    recorder.write("event", 10, {"reason": "a rank joined", "size": 2})
    recorder.close()


def test_csv_has_what_jsonl_has_also_after_a_resume(tmp_path):
    recorded(tmp_path, ["csv"])
    recorded(tmp_path, ["csv"])
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["kind"], int(row["step"]), row["name"], float(row["value"])) for row in rows]
    one = [("train", 10, "loss", 0.5), ("train", 10, "epoch", 1.0)]
    one += [("validation", 10, "loss", math.inf), ("event", 10, "size", 2.0)]
    assert found == 2 * one
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and lines[1]["loss"] is None


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorded(tmp_path, ["tensorboard"])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 0.5)]


def test_training_and_validation_are_told_apart(tmp_path, capsys):
    recorded(tmp_path, [])
    train, validation, event = capsys.readouterr().out.splitlines()
    assert train == "step  10/100 train      loss 0.5 epoch 1"
    assert validation == "step  10/100 VALIDATION loss inf"
    assert event == "step  10/100 reason a rank joined size 2"


class Fails(Logger):
    def write(self, kind, step, seconds, values):
        raise ConnectionError("the server is away")


class Refuses(Logger):
    def open(self, folder, config):
        raise Error("this is not installed.", hint="install it.")

    def write(self, kind, step, seconds, values):
        """Never."""


def test_one_that_fails_is_said_once_and_left_out(tmp_path, capsys):
    recorded(tmp_path, [f"{__name__}:Fails", "csv"])
    shown = capsys.readouterr().out
    assert shown.count("is left out from here on: ConnectionError: the server is away") == 1
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 5


def test_one_that_cannot_be_used_ends_the_run(tmp_path):
    with pytest.raises(Error, match="not installed"):
        recorded(tmp_path, [f"{__name__}:Refuses"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk(tmp_path, capsys):
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    recorded(tmp_path, ["csv"])
    assert capsys.readouterr().out.count("logger 'csv' is left out") == 1
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(Error, match=r"cannot write .*metrics\.jsonl"):
        recorded(tmp_path, [])


def test_an_unknown_logger():
    with pytest.raises(Error, match="did you mean 'wandb'"):
        loggers_of(["wand"], tensorboard=True)
    with pytest.raises(Error, match=r"derive its class from hpctrain\.Logger"):
        loggers_of(["fractions:Fraction"], tensorboard=True)


def test_mlflow_goes_on_with_its_run(tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    recorded(tmp_path, ["mlflow,experiment=mine"])
    recorded(tmp_path, ["mlflow,experiment=mine"])
    client = tracking.MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    place = client.get_experiment_by_name("mine").experiment_id
    (run,) = client.search_runs([place])
    assert run.data.params == {"seed": "3"} and run.info.status == "FINISHED"
    assert run.data.metrics["train/loss"] == 0.5
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 2


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recorded(tmp_path, ["wandb,mode=offline,project=mine"])
    name = (tmp_path / "wandb" / "id").read_text()
    (kept,) = (tmp_path / "wandb").glob(f"offline-run-*-{name}")
    assert (kept / f"run-{name}.wandb").stat().st_size > 0
