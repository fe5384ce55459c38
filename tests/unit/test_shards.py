import json
import os

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpctrain.data.shards import INDEX, ShardSet, ShardWriter
from hpctrain.errors import Error


def write(path, samples=100, shard_bytes=2000):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples, 5)).astype("float32")
    y = rng.integers(0, 10, samples)
    with ShardWriter(path, shard_bytes=shard_bytes) as writer:
        for start in range(0, samples, 7):
            writer.write("train", {"x": x[start : start + 7], "y": y[start : start + 7]})
        writer.write("test", {"x": x[:3], "y": y[:3]})
    return x, y


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(indices=st.lists(st.integers(0, 99), max_size=50))
def test_take_is_what_was_written(tmp_path_factory, indices):
    path = tmp_path_factory.getbasetemp() / "taken"
    x, y = write(path) if not path.exists() else (None, None)
    if x is not None:
        np.savez(path / "oracle.npz", x=x, y=y)
    oracle = np.load(path / "oracle.npz")
    split = ShardSet(path).split("train")
    assert len(split) == 100
    batch = split.take(np.array(indices, dtype=np.int64))
    assert np.array_equal(batch["x"], oracle["x"][indices])
    assert np.array_equal(batch["y"], oracle["y"][indices])


def test_any_hdf5_reader_reads_them(tmp_path):
    x, y = write(tmp_path / "s", shard_bytes=10**6)
    with h5py.File(tmp_path / "s" / "train-00000.h5") as file:
        assert np.array_equal(file["samples/x"], x)
        assert np.array_equal(file["samples/y"], y)
        assert file["samples/x"].chunks is None


def test_same_samples_give_same_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert len(list((tmp_path / "a").glob("train-*.h5"))) > 1


def test_nothing_counts_before_the_end(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), ShardWriter(tmp_path / "s") as writer:
        writer.write("train", {"x": np.zeros(3)})
        raise RuntimeError("boom")
    with pytest.raises(Error, match="not a shard set"):
        ShardSet(tmp_path / "s")


def test_a_set_is_not_overwritten(tmp_path):
    write(tmp_path / "s")
    with pytest.raises(Error, match="already holds"):
        ShardWriter(tmp_path / "s")


def test_fields_must_stay_the_same(tmp_path):
    with ShardWriter(tmp_path / "s") as writer:
        writer.write("train", {"x": np.zeros((3, 2))})
        with pytest.raises(Error, match="same fields"):
            writer.write("train", {"x": np.zeros((3, 3))})


def damage_missing(path):
    (path / "train-00001.h5").unlink()


def damage_truncated(path):
    os.truncate(path / "train-00001.h5", 500)


def damage_header(path):
    file = path / "train-00001.h5"
    file.write_bytes(b"\0" * file.stat().st_size)


def damage_swapped(path):
    """Another shard's bytes, and an index that was told so: the shape still gives it away."""
    index = json.loads((path / INDEX).read_text())
    shard = index["splits"]["train"]["shards"][1]
    shard["path"] = "test-00000.h5"
    shard["bytes"] = (path / "test-00000.h5").stat().st_size
    (path / INDEX).write_text(json.dumps(index))


def damage_type(path):
    index = json.loads((path / INDEX).read_text())
    index["fields"]["x"]["dtype"] = "<f8"
    (path / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, r"train-00001.h5 cannot be read"),
        (damage_truncated, r"train-00001.h5 has 500 bytes, but the index says"),
        (damage_header, r"train-00001.h5 is not the HDF5 file it was"),
        (damage_swapped, r"test-00000.h5: samples/x is float32\(3, 5\)"),
        (damage_type, r"samples/x is float32"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    write(tmp_path / "s")
    damage(tmp_path / "s")
    split = ShardSet(tmp_path / "s").split("train")
    with pytest.raises(Error, match=message):
        split.take(np.arange(len(split)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": "other"}', "damaged: ValueError: its format"),
        ('{"format": "hpctrain-shards", "version": 9}', "version 9"),
        ('{"format": "hpctrain-shards", "version": 1, "splits": {}}', "damaged"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(Error, match=message):
        ShardSet(tmp_path)


def test_unknown_split(tmp_path):
    write(tmp_path / "s")
    with pytest.raises(Error, match="did you mean 'train'"):
        ShardSet(tmp_path / "s").split("trian")
