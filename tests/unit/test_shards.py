import os
import pickle
import shutil
import threading

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpctrain.data.index import INDEX, FieldSpec, Index, ShardEntry, SplitEntry, read_index
from hpctrain.data.loader import Loader
from hpctrain.data.read_plan import Plan, Span
from hpctrain.data.shards import ShardSet
from hpctrain.data.writer import Ragged, ShardWriter
from hpctrain.errors import Error
from hpctrain.world.world import equal_part
from tests.waiting import SECONDS

TYPES = ["u1", "i1", "<i2", "<u2", "<i8", ">i4", "<f2", "<f4", "<f8", "?", "<c8"]


def write(path, samples=100, shard_bytes=2000, **options):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples, 5)).astype("float32")
    y = rng.integers(0, 10, samples)
    with ShardWriter(path, shard_bytes=shard_bytes, **options) as writer:
        for start in range(0, samples, 7):
            writer.write("train", {"x": x[start : start + 7], "y": y[start : start + 7]})
        writer.write("test", {"x": x[:3], "y": y[:3]})
    return x, y


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(TYPES),
    shape=st.lists(st.integers(0, 7), max_size=3),
    samples=st.integers(1, 80),
    shard_bytes=st.integers(300, 20_000),
    compression=st.sampled_from(["none", "lz4", "zstd"]),
    data=st.data(),
)
def test_take_is_what_was_written(tmp_path, dtype, shape, samples, shard_bytes, compression, data):
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    x = rng.integers(0, 100, (samples, *shape)).astype(dtype)
    rows = [rng.integers(0, 100, (rng.integers(0, 6), 3)).astype("u1") for _ in range(samples)]
    step = data.draw(st.integers(1, samples))
    with ShardWriter(tmp_path / "s", shard_bytes=shard_bytes, compression=compression) as writer:
        for start in range(0, samples, step):
            part = slice(start, start + step)
            writer.write("train", {"x": x[part], "r": Ragged.of(rows[part])})
    split = ShardSet(tmp_path / "s").split("train")
    assert len(split) == samples
    for _ in range(3):
        wanted = data.draw(st.lists(st.integers(0, samples - 1), max_size=50))
        batch = split.take(np.array(wanted, dtype=np.int64))
        assert batch["x"].dtype == np.dtype(dtype).newbyteorder("<")
        assert np.array_equal(batch["x"], x[wanted])
        offsets = batch["r.offsets"]
        assert len(offsets) == len(wanted) + 1
        for i, number in enumerate(wanted):
            assert np.array_equal(batch["r"][offsets[i] : offsets[i + 1]], rows[number])


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_any_hdf5_reader_reads_them(tmp_path, compression):
    rng = np.random.default_rng(0)
    x = rng.poisson(1, (500, 32, 32))
    with ShardWriter(tmp_path / "s", compression=compression) as writer:
        writer.write("train", {"x": x, "y": np.arange(500)})
    with h5py.File(tmp_path / "s" / "train-000000.h5") as file:
        assert np.array_equal(file["samples/x"], x)
        assert np.array_equal(file["samples/y"], np.arange(500))
        assert (file["samples/x"].chunks is None) == (compression == "none")
        assert file.attrs["samples"] == 500 and file.attrs["split"] == "train"
        small = file["samples/x"].id.get_storage_size() < 0.5 * x.nbytes
    assert small == (compression != "none")


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


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": np.zeros((3, 3))}, "same fields"),
        ({"x": np.zeros((3, 2), "f4")}, "same fields"),
        ({"y": np.zeros((3, 2))}, "same fields"),
        ({"x": Ragged.of([b"ab"])}, "same fields"),
        ({"x": np.array(["a", "b"])}, "cannot be stored"),
    ],
)
def test_fields_must_stay_the_same(tmp_path, columns, message):
    with ShardWriter(tmp_path / "s") as writer:
        writer.write("train", {"x": np.zeros((3, 2))})
        with pytest.raises(Error, match=message):
            writer.write("train", columns)


def test_from_any_number_of_threads(tmp_path):
    """Of compressed blocks each is decompressed once, whoever wants it."""
    x = np.random.default_rng(0).poisson(1, (4000, 700)).astype("u2")
    with ShardWriter(tmp_path / "s", compression="lz4") as writer:
        writer.write("train", {"x": x})
    split = ShardSet(tmp_path / "s").split("train")
    wrong = []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(40):
            wanted = rng.integers(0, 4000, 100)
            wrong.extend([seed] * (not np.array_equal(split.take(wanted)["x"], x[wanted])))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_a_split_travels(tmp_path):
    x, _ = write(tmp_path / "s")
    split = ShardSet(tmp_path / "s").split("train")
    split.take(np.arange(3))
    other = pickle.loads(pickle.dumps(split))
    assert np.array_equal(other.take(np.arange(100))["x"], x)
    assert other.digest == split.digest


def test_ragged_batches(tmp_path):
    texts = [bytes([65 + i % 26]) * (i % 5) for i in range(50)]
    with ShardWriter(tmp_path / "s") as writer:
        writer.write("train", {"text": Ragged.of(texts), "n": np.arange(50)})
    for batch in Loader(ShardSet(tmp_path / "s").split("train"), 16):
        for part in batch.split(3):
            for n, row in zip(part["n"].tolist(), part.rows("text"), strict=True):
                assert row.numpy().tobytes() == texts[n]


def damage_missing(path):
    (path / "train-000001.h5").unlink()


def damage_truncated(path):
    os.truncate(path / "train-000001.h5", 500)


def damage_header(path):
    file = path / "train-000001.h5"
    file.write_bytes(b"\0" * file.stat().st_size)


def damage_swapped(path):
    shutil.copy(path / "train-000002.h5", path / "train-000001.h5")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, r"train-000001.h5 cannot be read"),
        (damage_truncated, r"train-000001.h5 has 500 bytes, but the index says"),
        (damage_header, r"train-000001.h5 does not begin as the index says"),
        (damage_swapped, r"train-000001.h5 does not begin as the index says"),
    ],
)
def test_damage_is_named_or_skipped(tmp_path, damage, message, capsys):
    x, _ = write(tmp_path / "s", samples=1000, shard_bytes=3000)
    damage(tmp_path / "s")
    split = ShardSet(tmp_path / "s").split("train")
    with pytest.raises(Error, match=message):
        split.take(np.arange(len(split)))
    split = ShardSet(tmp_path / "s", on_bad_shard="skip").split("train")
    loader = Loader(split, 64)
    got = torch.cat([batch["x"] for batch in loader]).numpy()
    entries = read_index(tmp_path / "s").splits["train"].shards
    lost = slice(entries[0].samples, entries[0].samples + entries[1].samples)
    rest = np.delete(x, lost, axis=0)
    assert np.array_equal(got[np.lexsort(got.T)], rest[np.lexsort(rest.T)])
    assert loader.lost == entries[1].samples
    assert "train-000001.h5" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_corrupt_chunk(tmp_path, policy):
    """It is found when it is decompressed; what the shard has not given yet is lost."""
    x = np.random.default_rng(0).poisson(1, (3000, 800)).astype("u1")
    with ShardWriter(tmp_path / "s", compression="zstd", shard_bytes=2**19) as writer:
        for start in range(0, 3000, 100):
            writer.write("train", {"x": x[start : start + 100], "n": np.arange(start, start + 100)})
    file = tmp_path / "s" / "train-000001.h5"
    with h5py.File(file) as shard:
        where = shard["samples/x"].id.get_chunk_info(0).byte_offset
    content = bytearray(file.read_bytes())
    content[where + 4 : where + 40] = b"\xff" * 36
    file.write_bytes(content)
    loader = Loader(ShardSet(tmp_path / "s", on_bad_shard=policy).split("train"), 100)
    if policy == "stop":
        with pytest.raises(Error, match=r"train-000001.h5: samples/x, samples \d+ to"):
            list(loader)
        return
    seen = [n for batch in loader for n in batch["n"].tolist()]
    assert len(seen) == len(set(seen)) == 3000 - loader.lost
    shard = ShardSet(tmp_path / "s").index.splits["train"].shards[1]
    assert 0 < loader.lost <= shard.samples


def test_every_byte_of_the_index_counts(tmp_path):
    write(tmp_path / "s")
    file = tmp_path / "s" / INDEX
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(content), 200, replace=False).tolist():
        changed = bytearray(content)
        changed[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(changed)
        with pytest.raises(Error):
            ShardSet(tmp_path / "s")
    for cut in (0, 1, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(Error, match="damaged"):
            ShardSet(tmp_path / "s")
    file.write_bytes(content + b" ")
    with pytest.raises(Error, match="checksum"):
        ShardSet(tmp_path / "s")


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
def test_a_damaged_index_is_one_line(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(Error, match=message) as error:
        ShardSet(tmp_path)
    assert "\n" not in str(error.value)


def test_unknown_split(tmp_path):
    write(tmp_path / "s")
    with pytest.raises(Error, match=r"no split 'trian'.*did you mean 'train'"):
        ShardSet(tmp_path / "s").split("trian")


@pytest.mark.slow
def test_a_billion_samples(tmp_path):
    """An index without data: what costs memory by the sample would fail here."""
    entries = [
        ShardEntry(f"train-{i:06d}.h5", 10**4, 30_720_000, f"{i:064x}", "", {"samples/x": 12288})
        for i in range(10**5)
    ]
    fields = {"x": FieldSpec("|u1", (3072,))}
    Index(fields, {"train": SplitEntry({"x": "samples/x"}, entries)}).write(tmp_path)
    split = ShardSet(tmp_path).split("train")
    assert len(split) == 10**9
    loader = Loader(split, 256)
    loader.load_state_dict({**loader.state_dict(), "cursor": 617_283_840})
    plan = Plan(split.order(0, 0, "block", 256), equal_part(3, 8))
    start = loader.cursor
    seen = []
    for number in range(1000):
        place = start + 256 * number
        seen.append(plan.batches(Span(place, place + 256, 256))[1])
    assert len(np.unique(np.concatenate(seen))) == 32_000
