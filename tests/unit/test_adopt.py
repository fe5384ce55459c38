"""HDF5 files of other programs, used where they are."""

import h5py
import hdf5plugin
import numpy as np
import pytest

from hpctrain.data.adopt import adopt
from hpctrain.data.loader import Loader
from hpctrain.data.verify import verify
from hpctrain.errors import Error

X = np.random.default_rng(0).poisson(1, (300, 20, 11)).astype("<f4")
LAYOUTS = {
    "contiguous": {},
    "chunk of one": {"chunks": (1, 20, 11)},
    "chunks, plain": {"chunks": (7, 20, 11)},
    "chunks through samples": {"chunks": (50, 5, 11)},
    "gzip": {"chunks": (16, 20, 11), "compression": "gzip"},
    "gzip, shuffled": {"chunks": (16, 20, 11), "compression": "gzip", "shuffle": True},
    "checked": {"chunks": (16, 20, 11), "compression": "gzip", "fletcher32": True},
    "lzf": {"chunks": (16, 20, 11), "compression": "lzf"},
    "lz4": {"chunks": (16, 20, 11), **hdf5plugin.LZ4()},
    "zstd": {"chunks": (16, 20, 11), **hdf5plugin.Zstd()},
    "blosc": {"chunks": (16, 20, 11), **hdf5plugin.Blosc2()},
    "chosen by h5py": {"chunks": True, "compression": "gzip"},
    "larger than the data": {"chunks": (512, 20, 11), "maxshape": (None, 20, 11)},
}


def same(split, expected):
    wanted = np.random.default_rng(1).integers(0, len(expected), 100)
    assert np.array_equal(split.take(wanted)["x"], expected[wanted])
    got = np.concatenate([b["x"].numpy() for b in Loader(split, 32, shuffle="none")])
    assert np.array_equal(got, expected)
    mixed = np.concatenate([b["x"].numpy() for b in Loader(split, 32)])
    assert np.array_equal(np.sort(mixed, axis=0), np.sort(expected, axis=0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(tmp_path, layout):
    file = tmp_path / "a.h5"
    with h5py.File(file, "w") as handle:
        handle.create_dataset("x", data=X, **LAYOUTS[layout])
        handle["y"] = np.arange(300)
    before = file.read_bytes()
    shards = adopt([file], tmp_path / "index")
    same(shards.split("train"), X)
    assert file.read_bytes() == before
    assert [p.name for p in (tmp_path / "index").iterdir()] == ["hpctrain-index.json"]
    assert verify(tmp_path / "index") == []


@pytest.mark.parametrize("dtype", [">i4", "<i2", "u1", ">f8", "?"])
def test_any_type_at_any_offset(tmp_path, dtype):
    """Samples need not begin where memory likes it: files of different heads have other offsets."""
    parts = []
    for number in range(5):
        part = (X[number * 60 : (number + 1) * 60] % 2).astype(dtype)
        with h5py.File(tmp_path / f"{number}.h5", "w") as handle:
            handle.attrs["note"] = "a" * (61 * number)
            handle["skip"] = np.zeros(0)
            handle.create_dataset("x", data=part[:, :3, :5])
        parts.append(part[:, :3, :5])
    split = adopt([tmp_path], tmp_path / "index", fields=("x",)).split("train")
    expected = np.concatenate(parts)
    wanted = np.random.default_rng(1).integers(0, 300, 100)
    assert np.array_equal(split.take(wanted)["x"], expected[wanted])
    assert next(iter(Loader(split, 300, shuffle="none")))["x"].shape == (300, 3, 5)


def test_splits(tmp_path):
    with h5py.File(tmp_path / "one.h5", "w") as handle:
        handle["x_train"], handle["y_train"] = X[:200], np.arange(200)
        handle["x_test"], handle["y_test"] = X[200:], np.arange(100)
    shards = adopt([tmp_path / "one.h5"], tmp_path / "index")
    same(shards.split("train"), X[:200])
    same(shards.split("test"), X[200:])
    for name, part in (("train-0", X[:90]), ("train-1", X[90:200]), ("val", X[200:])):
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as handle:
            handle["entry/data/x"] = part
    files = sorted(tmp_path.glob("*.hdf5"))
    shards = adopt(files, tmp_path / "other", fields=("entry/data/x",))
    split = shards.split("train")
    assert np.array_equal(split.take(np.arange(200))["entry_data_x"], X[:200])
    assert len(shards.split("validation")) == 100


def test_a_file_that_changed_is_found(tmp_path):
    for name in ("a", "b"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as handle:
            handle["x"] = X
    adopt([tmp_path], tmp_path / "index")
    with h5py.File(tmp_path / "b.h5", "r+") as handle:
        handle["x"][299, 19, 10] = 77
    (verdict,) = verify(tmp_path / "index")
    assert verdict.path.resolve() == (tmp_path / "b.h5").resolve()


def test_what_cannot_be_adopted(tmp_path):
    def file(name, **datasets):
        with h5py.File(tmp_path / name, "w") as handle:
            for key, value in datasets.items():
                handle[key] = value
        return tmp_path / name

    plain = file("plain.h5", x=X)
    virtual = tmp_path / "virtual.h5"
    with h5py.File(virtual, "w") as handle:
        layout = h5py.VirtualLayout(X.shape, X.dtype)
        layout[:] = h5py.VirtualSource(plain, "x", X.shape)
        handle.create_virtual_dataset("x", layout)
    (tmp_path / "text.h5").write_text("no HDF5")
    (tmp_path / "empty").mkdir()
    cases = [
        ([tmp_path / "none.h5"], "does not exist"),
        ([tmp_path / "empty"], "holds no"),
        ([tmp_path / "text.h5"], r"text.h5 cannot be read as HDF5"),
        ([virtual], "put together from other files"),
        ([file("lengths.h5", x=X, y=np.arange(3))], "differ in length: x 300, y 3"),
        ([file("table.h5", x=np.zeros(3, "i4,f4"))], "x is a table"),
        ([plain, file("other.h5", x=X[:, :3])], "others hold"),
        ([file("group.h5", **{"g/a": 1.0})], "no datasets"),
    ]
    for number, (sources, message) in enumerate(cases):
        with pytest.raises(Error, match=message) as error:
            adopt(sources, tmp_path / f"index{number}")
        assert "HINT" in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / f"index{number}" / "hpctrain-index.json").exists()
