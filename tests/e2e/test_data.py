"""The data commands, and training on what they make, as a user would."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpctrain.data.index import read_index
from hpctrain.data.writer import ShardWriter
from tests.e2e.conftest import result_of

TASK = """
import torch
import hpctrain
from torch import nn


class Mine(hpctrain.Task):
    def model(self):
        return nn.Linear(30, 3)

    def transform(self, batch, training):
        assert batch.positions.dtype == "uint64"
        return batch.replace(x=batch["x"].float() + 0 * torch.rand(1))

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["label"])
"""
SAMPLES = 1500


@pytest.fixture
def shards(hpctrain):
    rng = np.random.default_rng(0)
    with ShardWriter(hpctrain.folder / "shards", shard_bytes=20_000) as writer:
        for start in range(0, SAMPLES, 50):
            columns = {
                "x": rng.integers(0, 9, (50, 30)),
                "label": np.full(50, start * 3 // SAMPLES),
                "importance": rng.random(50),
            }
            writer.write("train", columns)
        writer.write("test", columns)
    (hpctrain.folder / "mine.py").write_text(TASK)
    return hpctrain.folder / "shards"


def lines(folder, kind="train"):
    text = (folder / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]


RUN = ("mine.py", "--data", "shards", "--epochs", 2, "--batch-size", 32)


def test_info_verify_and_bench(hpctrain, shards):
    info = hpctrain("data", "info", "shards")
    assert f"{SAMPLES} samples of x int64(30,), label int64()" in info.stdout
    assert hpctrain("data", "verify", "shards").returncode == 0
    bench = hpctrain("data", "bench", "shards", "--seconds", 0.2, "--batch-size", 64)
    assert bench.returncode == 0, bench.stdout
    for what in ("samples/s", "of memory speed", "first batch", "stall", "shuffle quality", "by 8"):
        assert what in bench.stdout
    quality = float(bench.stdout.partition("shuffle quality")[2].split()[0])
    assert quality < 1.1


def test_a_bad_shard_stops_or_is_skipped(hpctrain, shards):
    os.truncate(shards / "train-000001.h5", 300)
    verify = hpctrain("data", "verify", "shards")
    assert verify.returncode == 2
    assert "train-000001.h5 has 300 bytes" in verify.stdout and "error: 1 of" in verify.stdout
    stopped = hpctrain("train", *RUN, "--out", "stopped", ranks=2)
    assert stopped.returncode == 2 and "train-000001.h5 has 300 bytes" in stopped.stdout
    assert "Traceback" not in stopped.stdout
    run = hpctrain.train(*RUN, "--on-bad-shard", "skip", "--out", "run", ranks=2)
    assert "hpctrain: warning: shard" in run.stdout and "are left out" in run.stdout
    lost = read_index(shards).splits["train"].shards[1].samples
    assert result_of(hpctrain.folder / "run")["metrics"]["final"]["lost_samples"] == 2 * lost


def test_staging(hpctrain, shards):
    local = hpctrain.folder / "local"
    staged = hpctrain("data", "stage", "shards", local)
    assert staged.returncode == 0 and "shards, " in staged.stdout
    hpctrain.train(*RUN, "--out", "a", "--set", f"data.stage_dir={local}", ranks=2)
    assert len(list(local.rglob("*.h5"))) > 3  # staged by hand: kept
    assert hpctrain("data", "stage", "shards", local, "--remove").returncode == 0
    assert not list(local.rglob("*.h5"))
    hpctrain.train(*RUN, "--out", "b", "--set", f"data.stage_dir={local}", ranks=2)
    assert not list(local.rglob("*.h5"))  # staged by the run: removed
    hpctrain.train(*RUN, "--out", "c")
    for name in "ab":
        same = [result_of(hpctrain.folder / run)["steps"] for run in (name, "c")]
        assert same[0] == same[1]


def test_adopted_files_train(hpctrain, shards):
    rng = np.random.default_rng(0)
    for number in range(3):
        with h5py.File(hpctrain.folder / f"part-{number}.h5", "w") as file:
            file.create_dataset("x", data=rng.random((100, 30)), compression="gzip")
            file["label"] = rng.integers(0, 3, 100)
    files = sorted(hpctrain.folder.glob("part-*.h5"))
    adopted = hpctrain("data", "adopt", *files, "--out", "adopted")
    assert adopted.returncode == 0, adopted.stdout
    assert "300 samples of label int64(), x float64(30,); 3 shards" in adopted.stdout
    hpctrain.train("mine.py", "--data", "adopted", "--epochs", 1, "--out", "run", ranks=2)
    assert lines(hpctrain.folder / "run")[-1]["epoch"] == 1


@pytest.mark.parametrize(
    "settings",
    [
        ["data.order=full"],
        pytest.param(["data.order=none"], marks=pytest.mark.long),
        pytest.param(["data.workers=0"], marks=pytest.mark.long),
        pytest.param(["data.worker_kind=process"], marks=pytest.mark.long),
        pytest.param(["data.weights=importance"], marks=pytest.mark.long),
        ['data.mixture=[{path="shards",weight=2},{path="other",weight=1}]'],
    ],
)
def test_ways_to_read(hpctrain, shards, settings):
    with ShardWriter(hpctrain.folder / "other") as writer:
        columns = {"x": np.ones((64, 30), int), "label": np.zeros(64, int)}
        writer.write("train", {**columns, "importance": np.ones(64)})
    options = [word for setting in settings for word in ("--set", setting)]
    hpctrain.train(*RUN, "--out", "run", "--set", "log.every_steps=10", *options, ranks=2)
    for line in lines(hpctrain.folder / "run"):
        assert line["input_wait_ms"] >= 0 and 0 <= line["input_wait_share"] <= 1
    assert lines(hpctrain.folder / "run")[-1]["epoch"] == 2


@pytest.mark.long
def test_processes_make_a_run_the_same_again(hpctrain, shards):
    """Their generators are seeded for each batch, so a killed run could be repeated bit for bit."""
    noise = (Path(hpctrain.folder) / "mine.py").read_text().replace("0 * torch", "torch")
    (hpctrain.folder / "mine.py").write_text(noise)
    for name in ("a", "b"):
        hpctrain.train(*RUN, "--out", name, "--set", "data.worker_kind=process")
    a, b = (result_of(hpctrain.folder / name)["parameters_sha256"] for name in ("a", "b"))
    assert a == b


def test_making_batches_ahead_changes_no_bit(hpctrain):
    """Nor how many threads the training step computes with."""
    for workers in (0, 2):
        hpctrain.train(
            "digits", "--epochs", 2, "--out", workers, "--set", f"data.workers={workers}"
        )
    a, b = (result_of(hpctrain.folder / name)["parameters_sha256"] for name in ("0", "2"))
    assert a == b
