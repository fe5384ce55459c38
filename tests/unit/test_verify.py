"""Random damage to shards and index: every one is reported, with the right file."""

import os
import shutil

import h5py
import numpy as np
import pytest

from hpctrain.data.index import INDEX
from hpctrain.data.shards import ShardSet
from hpctrain.data.verify import verify
from hpctrain.data.writer import Ragged, ShardWriter
from hpctrain.errors import Error

# docs/shards.md speaks of 2,000; so many take minutes.
CORRUPTIONS = int(os.environ.get("HPCTRAIN_TEST_CORRUPTIONS", "60"))


def write(path, compression):
    rng = np.random.default_rng(0)
    with ShardWriter(path, shard_bytes=400_000, compression=compression) as writer:
        for number in range(6):
            writer.write(
                "train" if number < 5 else "test",
                {
                    "x": rng.poisson(1, (128, 4096)).astype("u1"),
                    "y": rng.integers(0, 9, 128),
                    "text": Ragged.of([bytes(rng.integers(0, 9, 20, dtype="u1"))] * 128),
                },
            )
    return path


@pytest.fixture(scope="module", params=["none", "lz4", "zstd"])
def sound(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp(request.param) / "s", request.param)


def test_a_sound_set(sound):
    assert verify(sound) == []


def flip(files, rng):
    file = files[rng.integers(len(files))]
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)
    return {file}


def truncate(files, rng):
    file = files[rng.integers(len(files))]
    os.truncate(file, rng.integers(file.stat().st_size))
    return {file}


def delete(files, rng):
    file = files[rng.integers(len(files))]
    file.unlink()
    return {file}


def swap(files, rng):
    shards = [file for file in files if file.suffix == ".h5"]
    a, b = rng.choice(len(shards), 2, replace=False)
    other = shards[a].with_suffix(".swap")
    shards[a].rename(other)
    shards[b].rename(shards[a])
    other.rename(shards[b])
    return {shards[a], shards[b]}


def append(files, rng):
    file = files[rng.integers(len(files))]
    with file.open("ab") as handle:
        handle.write(bytes(rng.integers(0, 256, rng.integers(1, 9), dtype="u1")))
    return {file}


def retype(files, rng):
    shards = [file for file in files if file.suffix == ".h5"]
    file = shards[rng.integers(len(shards))]
    with h5py.File(file, "r+") as shard:
        values = shard["samples/y"][:].astype("f8")
        del shard["samples/y"]
        shard["samples/y"] = values
    return {file}


@pytest.mark.slow
def test_random_damage(sound, tmp_path):
    rng = np.random.default_rng(int(os.environ.get("HPCTRAIN_TEST_SEED", "0")))
    kinds = [flip, flip, flip, truncate, delete, swap, append, retype]
    for _ in range(CORRUPTIONS):
        shutil.rmtree(tmp_path / "s", ignore_errors=True)
        shutil.copytree(sound, tmp_path / "s")
        files = sorted((tmp_path / "s").iterdir())
        damaged = kinds[rng.integers(len(kinds))](files, rng)
        if tmp_path / "s" / INDEX in damaged:
            with pytest.raises(Error, match=INDEX):
                verify(tmp_path / "s")
            continue
        verdicts = verify(tmp_path / "s")
        assert {verdict.path for verdict in verdicts} == damaged
        assert all(verdict.reason and "\n" not in verdict.reason for verdict in verdicts)


def test_the_dataset_is_named(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "s")
    file = tmp_path / "s" / "train-000001.h5"
    with h5py.File(file) as shard:
        where = shard["samples/y"].id.get_offset()
    content = bytearray(file.read_bytes())
    content[where + 100] ^= 1
    file.write_bytes(content)
    (verdict,) = verify(tmp_path / "s")
    assert "samples/y has changed" in verdict.reason
    assert "samples/x" not in verdict.reason
    assert (verdict.split, verdict.samples) == ("train", 128)


def test_a_wrong_type_is_named(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "s")
    retype([tmp_path / "s" / "train-000002.h5"], np.random.default_rng(0))
    (verdict,) = verify(tmp_path / "s")
    assert "samples/y is float64, but the index says int64" in verdict.reason


def test_attributes_are_kept(sound):
    assert set(ShardSet(sound).splits) == {"train", "test"}
