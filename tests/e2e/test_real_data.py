"""On real data, where there are any: in the folder HPCTRAIN_DATA, or in one beside the clone."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from hpctrain.data.shards import ShardSet
from tests.e2e.conftest import result_of

BESIDE = Path(__file__).parents[3] / "shared" / "data"
FOLDER = Path(os.environ.get("HPCTRAIN_DATA", BESIDE))


def real(name):
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"no {name} in {FOLDER}; set HPCTRAIN_DATA to a folder that has it")
    return path


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def test_cifar10(hpctrain):
    result = hpctrain("data", "import", real("cifar10-jpg.tar.gz"), "shards")
    assert result.returncode == 0, result.stdout
    shards = ShardSet(hpctrain.folder / "shards")
    assert shards.attributes["classes"][::9] == ["airplane", "truck"]
    for name, samples in (("train", 50_000), ("test", 10_000)):
        split = shards.split(name)
        assert len(split) == samples
        labels = split.take(np.arange(samples))["label"]
        assert np.bincount(labels).tolist() == [samples // 10] * 10
    hpctrain.train(
        *("cifar10", "--data", "shards", "--steps", 40, "--batch-size", 64, "--out", "run"),
        *("--set", "log.every_steps=10", "--set", "schedule.warmup_steps=10", "--lr", "0.2"),
        *("--set", "train.validate_every_steps=1000"),
        ranks=2,
    )
    first, *_, last = losses(hpctrain.folder / "run")
    assert last < first
    assert result_of(hpctrain.folder / "run")["metrics"]["final"]["val_accuracy"] > 0.15


def test_tiny_shakespeare(hpctrain):
    text = real("tinyshakespeare.txt")
    result = hpctrain("data", "import", text, "text")
    assert result.returncode == 0, result.stdout
    shards = ShardSet(hpctrain.folder / "text")
    rows = shards.split("train").take(np.arange(len(shards.split("train"))))["tokens"]
    assert text.read_bytes().startswith(rows[:, :-1].tobytes())
    hpctrain.train(
        *("charlm", "--data", "text", "--steps", 40, "--batch-size", 32, "--out", "run"),
        *("--set", "options.layers=2", "--set", "options.width=64", "--set", "log.every_steps=10"),
        *("--set", "schedule.warmup_steps=5", "--lr", "0.01"),
        ranks=2,
    )
    assert result_of(hpctrain.folder / "run")["metrics"]["final"]["val_bits_per_byte"] < 5.2
