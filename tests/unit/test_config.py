import pytest

from hpctrain.config import (
    RunConfig,
    keys,
    read_environment,
    read_settings,
    read_toml,
    reference,
    resolve,
)
from hpctrain.errors import Error
from hpctrain.run import configure


def test_later_layers_win(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("seed = 1\n[train]\nepochs = 2\nbatch_size = 8\naccumulate = 2\n")
    config = resolve(
        [
            ("defaults", {"train": {"epochs": 1, "clip_norm": 1.0}}),
            ("file", read_toml(file)),
            ("environment", read_environment({"HPCTRAIN__TRAIN__BATCH_SIZE": "16", "PATH": "x"})),
            ("--set", read_settings(["train.batch_size=32", "train.validate_every_steps = 5"])),
        ]
    )
    assert config.seed == 1
    assert config.train.epochs == 2
    assert config.train.batch_size == 32
    assert config.train.accumulate == 2
    assert config.train.clip_norm == 1.0
    assert config.train.validate_every_steps == 5


def test_round_trip_through_toml(tmp_path):
    config = resolve([("a", {"train": {"clip_norm": 0.5}, "options": {"widths": [1, 2]}})])
    file = tmp_path / "config.toml"
    file.write_text(config.to_toml())
    assert resolve([("file", read_toml(file))]) == config


def test_every_key_is_described_and_the_reference_is_the_config(tmp_path):
    assert all(field.description for _, field in keys())
    file = tmp_path / "reference.toml"
    config = configure([("flags", {"task": "cifar10"})])
    file.write_text(reference(config))
    assert resolve([("file", read_toml(file))]) == config


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"train": {"epoch": 3}}, "run.toml: unknown key 'train.epoch'. HINT: did you mean"),
        ({"lr": 3}, "did you mean 'optimizer.lr'?"),
        ({"trian": {"epochs": 3}}, "unknown key 'trian.epochs'"),
        ({"train": {"epochs": "many"}}, "train.epochs = 'many'"),
        ({"train": {"batch_size": 0}}, "greater than or equal to 1"),
        ({"train": 3}, "unknown key 'train'"),
    ],
)
def test_what_is_wrong_is_named(layer, message):
    with pytest.raises(Error) as caught:
        resolve([("run.toml", layer)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["epochs", "=3", ""])
def test_set_needs_key_and_value(setting):
    with pytest.raises(Error, match="key=value"):
        read_settings([setting])


def test_unreadable_files(tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("a = = 1")
    with pytest.raises(Error, match="not TOML"):
        read_toml(broken)
    with pytest.raises(Error, match="No such file"):
        read_toml(tmp_path / "missing.toml")


def test_frozen():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().seed = 3
