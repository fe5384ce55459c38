"""Compressed gradients through the command: they train, are recorded, and go on bit for bit."""

import json

import pytest

from tests.e2e.conftest import cut_back, result_of

FIXED = ("digits", "--strategy", "horovod", "--set", "schedule.name=constant")
COMPRESSED = {
    "topk:0.1": ("--set", "horovod.compression_warmup_steps=20"),
    "powersgd:2": ("--set", "horovod.compression_warmup_steps=5"),
}


def arguments(compression, *more):
    chosen = ("--set", f"horovod.compression={compression}", *COMPRESSED[compression])
    return (*FIXED, "--set", "log.tensorboard=false", *chosen, *more)


def exchanges(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == "exchange"]


@pytest.mark.parametrize(
    "compression", [pytest.param("topk:0.1", marks=pytest.mark.long), "powersgd:2"]
)
def test_it_trains_and_goes_on_bit_for_bit(hpctrain, compression):
    whole, pieces = hpctrain.folder / "whole", hpctrain.folder / "pieces"
    chosen = arguments(compression, "--steps", 46, "--set", "checkpoint.every_steps=20")
    hpctrain.train(*chosen, "--out", whole, ranks=2)
    cut_back(whole, 20, pieces)
    hpctrain.train(*chosen, "--out", pieces, "--resume", "auto", ranks=2)
    ended, whole_ended = result_of(pieces), result_of(whole)
    assert ended["parameters_sha256"] == whole_ended["parameters_sha256"]
    assert whole_ended["metrics"]["final"]["val_accuracy"] > 0.7
    records = exchanges(whole)
    assert records and all(0 < r["moved_bytes"] < r["dense_bytes"] for r in records)
    assert not any("residuals_lost" in r for r in exchanges(pieces))


def test_other_worlds_and_other_compressions_go_on(hpctrain):
    folder = hpctrain.folder / "run"
    hpctrain.train(*arguments("topk:0.1", "--steps", 10, "--out", folder), ranks=2)
    more = ("--out", folder, "--resume", "auto")
    hpctrain.train(*arguments("powersgd:2", "--steps", 20, *more), ranks=3)
    assert not any("residuals_lost" in r for r in exchanges(folder))
    hpctrain.train(*FIXED, "--steps", 30, "--set", "horovod.compression=fp16", *more, ranks=2)
    assert exchanges(folder)[-1]["residuals_lost"] == 3  # fp16 keeps none to send them later
    assert result_of(folder)["steps"] == 30


def test_what_makes_no_sense_is_one_line(hpctrain):
    result = hpctrain("train", *FIXED, "--set", "horovod.compression=powersgd", ranks=2)
    assert result.returncode == 2
    assert "'powersgd:' does not say which rank" in result.stdout
    assert "Traceback" not in result.stdout
