import io
import json
import sys
import tarfile
import threading

import h5py
import numpy as np
import pytest
from PIL import Image

import hpctrain.data.importers
from hpctrain.data.importers import ImportOptions, images, ranks
from hpctrain.data.importers.import_plan import Shard, Survey
from hpctrain.data.importers.jpeg import decode_jpeg
from hpctrain.data.importers.pixels import decode
from hpctrain.data.importers.tar import contents, members
from hpctrain.data.importers.work import share
from hpctrain.data.index import INDEX
from hpctrain.data.shards import ShardSet
from hpctrain.data.writer import Ragged, spec_of
from hpctrain.errors import Error
from hpctrain.world.launcher import ALONE, Launch
from tests.waiting import SECONDS


def import_data(source, destination, options=None):
    """Alone, also where the tests themselves are run by a launcher."""
    options = options or ImportOptions()
    return hpctrain.data.importers.import_data(source, destination, options, ALONE)


def image(value, size=(6, 4)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(folder, splits=("train/", "test/"), per_class=3):
    for split in splits:
        for number, label in enumerate(("cat", "dog")):
            place = folder / split / label
            place.mkdir(parents=True)
            for k in range(per_class):
                (place / f"{k}.png").write_bytes(image(100 * number + k))
    (folder / "README").write_text("not an image")
    return folder


def rows(split):
    return split.take(np.arange(len(split)))


@pytest.mark.parametrize("packed", ["", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_images_with_splits(tmp_path, packed):
    source = fill(tmp_path / "images")
    if packed:
        source = tmp_path / f"images.{packed}"
        with tarfile.open(source, f"w:{packed[4:]}") as archive:
            archive.add(tmp_path / "images", "some/prefix")
    shards = import_data(source, tmp_path / "shards", ImportOptions())
    assert shards.attributes["classes"] == ["cat", "dog"]
    assert {name: len(split) for name, split in shards.splits.items()} == {"train": 6, "test": 6}
    batch = rows(shards.split("train"))
    assert batch["image"].shape == (6, 4, 6, 3) and batch["image"].dtype == np.uint8
    seen = sorted(zip(batch["label"].tolist(), batch["image"][:, 0, 0, 0].tolist(), strict=True))
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 100), (1, 101), (1, 102)]


def test_images_without_splits(tmp_path):
    source = fill(tmp_path / "images", splits=("",), per_class=20)
    shards = import_data(source, tmp_path / "shards", ImportOptions(validation_fraction=0.25))
    assert len(shards.split("train")) == 30 and len(shards.split("validation")) == 10
    values = [v for split in shards.splits.values() for v in rows(split)["image"][:, 0, 0, 0]]
    assert sorted(values) == [*range(20), *range(100, 120)]


def test_images_of_several_sizes(tmp_path):
    source = fill(tmp_path / "images")
    (source / "train" / "cat" / "9.png").write_bytes(image(7, size=(10, 10)))
    with pytest.raises(Error, match=r"9.png is 10x10, others are 6x4.*--resize"):
        import_data(source, tmp_path / "a", ImportOptions())
    assert not (tmp_path / "a" / INDEX).exists()
    shards = import_data(source, tmp_path / "b", ImportOptions(resize=8))
    assert rows(shards.split("train"))["image"].shape == (7, 8, 8, 3)


def test_broken_image_is_named(tmp_path):
    source = fill(tmp_path / "images")
    (source / "test" / "dog" / "1.png").write_bytes(image(3)[:40])
    with pytest.raises(Error, match=r"test/dog/1.png is not a readable image"):
        import_data(source, tmp_path / "a", ImportOptions())


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_truncated_tar_is_named(tmp_path, kind):
    with tarfile.open(tmp_path / "x", f"w:{kind[4:]}") as archive:
        archive.add(fill(tmp_path / "images", per_class=300), "images")
    data = (tmp_path / "x").read_bytes()
    (tmp_path / f"x.{kind}").write_bytes(data[: len(data) // 2])
    with pytest.raises(Error, match=r"x.tar.* cannot be read to its end"):
        import_data(tmp_path / f"x.{kind}", tmp_path / "a")


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(fill(tmp_path / "images"), "images")
    data = bytearray((tmp_path / "x.tar").read_bytes())
    data[data.index(b"images/train/cat/1.png")] ^= 1
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(Error, match=r"x.tar cannot be read to its end: no header at byte"):
        import_data(tmp_path / "x.tar", tmp_path / "a")


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_are_listed_as_tarfile_lists_them(tmp_path, kind):
    names = ["a.bin", "folder/b.bin", f"{'long/' * 25}{'n' * 60}.bin"]
    if kind != tarfile.USTAR_FORMAT:
        names += ["x" * 300, "é/\u4e2d.bin"]
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as archive:
        for size, name in enumerate(names, start=511):
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(bytes([size % 256]) * size))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "y" * (300 if len(names) > 3 else 50)
        archive.addfile(link)
    *found, last = [member[:3] for member in members(tmp_path / "x.tar")]
    assert last == ("link", -1, 0)
    with tarfile.open(tmp_path / "x.tar") as archive:
        files = [member for member in archive if member.isfile()]
        assert found == [(file.name, file.offset_data, file.size) for file in files]
        wanted = [(offset, size) for _, offset, size in found]
        read = [archive.extractfile(file).read() for file in files]
    assert list(contents(tmp_path / "x.tar", wanted)) == read


def jpeg(size, mode="RGB", **options):
    noise = np.random.default_rng(size).integers(0, 255, (size, size + 3, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise, "RGBA").convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"comment": b"x"},
        {"mode": "L"},
        {"mode": "CMYK"},
        {"restart_marker_blocks": 1},
    ],
)
def test_jpegs_are_decoded_as_pillow_opens_them(options):
    for size in (1, 8, 37):
        data = jpeg(size, **options)
        wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert np.array_equal(decode(data, "it", "rgb", None), wanted)
        assert (decode_jpeg(data) is None) == ("mode" in options)
        for end in range(0, len(data) - 2, 7):
            decode_jpeg(data[:end])
    with pytest.raises(Error, match="it is not a readable image"):
        decode(data[: len(data) // 2], "it", "rgb", None)


def test_images_kept_encoded(tmp_path):
    source = fill(tmp_path / "images")
    (source / "train" / "cat" / "9.png").write_bytes(image(7, size=(10, 10)))
    import_data(source, tmp_path / "a", ImportOptions(keep_encoded=True))
    split = ShardSet(tmp_path / "a").split("train")
    batch = rows(split)
    assert split.fields["image"].ragged and len(split) == 7
    first = batch["image"][: batch["image.offsets"][1]].tobytes()
    assert first == (source / "train" / "cat" / "0.png").read_bytes()
    (source / "train" / "cat" / "9.png").write_bytes(b"no image")
    with pytest.raises(Error, match="9.png is not a readable image"):
        import_data(source, tmp_path / "b", ImportOptions(keep_encoded=True))


def test_linked_folders_are_followed_but_not_for_ever(tmp_path):
    source = fill(tmp_path / "images", splits=("train/",))
    (source / "train" / "fox").symlink_to(source / "train" / "cat")
    shards = import_data(source, tmp_path / "a")
    assert shards.attributes["classes"] == ["cat", "dog", "fox"]
    (source / "train" / "cat" / "loop").symlink_to(source / "train")
    with pytest.raises(Error, match="loop leads back"):
        import_data(source, tmp_path / "b")


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_x", "train_y", "test_x", "test_y"),
        ("train/x", "train/y", "test/x", "test/y"),
    ],
)
def test_npz_with_splits(tmp_path, names):
    arrays = [np.arange(12).reshape(6, 2), np.arange(6), np.zeros((2, 2), int), np.ones(2, int)]
    np.savez(tmp_path / "a.npz", **dict(zip(names, arrays, strict=True)))
    shards = import_data(tmp_path / "a.npz", tmp_path / "s", ImportOptions())
    assert np.array_equal(rows(shards.split("train"))["x"], arrays[0])
    assert np.array_equal(rows(shards.split("test"))["y"], arrays[3])


def test_npz_without_splits(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(100), y=np.arange(100) * 2)
    shards = import_data(tmp_path / "a.npz", tmp_path / "s", ImportOptions())
    train, held = rows(shards.split("train")), rows(shards.split("validation"))
    assert len(held["x"]) == 10
    assert sorted([*train["x"], *held["x"]]) == list(range(100))
    assert np.array_equal(train["x"] * 2, train["y"])


def test_npz_that_cannot_be(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3), y=np.arange(4))
    with pytest.raises(Error, match="differ in length: x 3, y 4"):
        import_data(tmp_path / "a.npz", tmp_path / "s", ImportOptions())
    np.savez(tmp_path / "b.npz", x=np.array([{}, []], dtype=object))
    with pytest.raises(Error, match="x is an array of object"):
        import_data(tmp_path / "b.npz", tmp_path / "s", ImportOptions())
    (tmp_path / "c.npz").write_bytes(b"PK\3\4 nonsense")
    with pytest.raises(Error, match=r"c.npz"):
        import_data(tmp_path / "c.npz", tmp_path / "s", ImportOptions())


def test_arrays_in_fortran_order_and_compressed(tmp_path):
    x = np.arange(60.0).reshape(20, 3)
    np.savez_compressed(tmp_path / "a.npz", x_train=np.asfortranarray(x), y_train=np.arange(20))
    shards = import_data(tmp_path / "a.npz", tmp_path / "a")
    assert np.array_equal(rows(shards.split("train"))["x"], x)
    np.save(tmp_path / "train_z.npy", np.asfortranarray(x))
    shards = import_data(tmp_path / "train_z.npy", tmp_path / "b")
    assert np.array_equal(rows(shards.split("train"))["z"], x)


def test_npz_whose_end_is_missing(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(10000))
    data = (tmp_path / "a.npz").read_bytes()
    middle = len(data) // 2
    (tmp_path / "a.npz").write_bytes(data[:middle] + bytes(64) + data[middle + 64 :])
    with pytest.raises(Error, match="a.npz cannot be read to its end"):
        import_data(tmp_path / "a.npz", tmp_path / "s")


@pytest.mark.parametrize("names", [("x_train", "x_test"), ("train/x", "test/x")])
def test_hdf5(tmp_path, names):
    x = np.random.default_rng(0).random((5000, 3, 50)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset(names[0], data=x, chunks=(7, 3, 50), compression="gzip")
        file[names[1]] = x[:4] * 2
    shards = import_data(tmp_path / "a.h5", tmp_path / "s")
    assert np.array_equal(rows(shards.split("train"))["x"], x)
    assert np.array_equal(rows(shards.split("test"))["x"], x[:4] * 2)


def test_hdf5_that_cannot_be(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["rows"] = np.zeros(3, [("a", "i4"), ("b", "f4")])
    with pytest.raises(Error, match="rows is a table"):
        import_data(tmp_path / "a.h5", tmp_path / "s")
    (tmp_path / "b.h5").write_bytes(b"none")
    with pytest.raises(Error, match="b.h5 cannot be read"):
        import_data(tmp_path / "b.h5", tmp_path / "s")


def pack(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def web_samples(first, count):
    for i in range(first, first + count):
        yield f"{i:04d}.json", json.dumps({"i": i}).encode()
        yield f"{i:04d}.png", image(i)
        yield f"{i:04d}.cls", str(i).encode()
        yield f"{i:04d}.npy", npy(np.full(3, i, np.float32))
        yield f"{i:04d}.seg.bin", bytes(i)


def test_webdataset(tmp_path):
    (tmp_path / "w").mkdir()
    pack(tmp_path / "w" / "set-test-0.tar", web_samples(0, 5))
    pack(tmp_path / "w" / "set-train-0.tar", web_samples(5, 7))
    pack(tmp_path / "w" / "set-train-1.tar", web_samples(12, 3))
    shards = import_data(tmp_path / "w", tmp_path / "s")
    assert {name: len(split) for name, split in shards.splits.items()} == {"test": 5, "train": 10}
    batch = rows(shards.split("train"))
    assert batch["label"].tolist() == list(range(5, 15))
    assert batch["image"][:, 0, 0, 0].tolist() == list(range(5, 15))
    assert np.array_equal(batch["npy"][:, 1], np.arange(5, 15))
    assert np.diff(batch["seg_bin.offsets"]).tolist() == list(range(5, 15))
    assert batch["json"][: batch["json.offsets"][1]].tobytes() == b'{"i": 5}'
    whole = import_data(tmp_path / "w" / "set-train-0.tar", tmp_path / "t")
    assert len(whole.split("train")) == 7


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([("9.png", image(1))], "sample 9 in .* has image; others have image, label"),
        ([("9.png", image(1)), ("9.cls", b"cat")], "label of sample 9 .*'cat', not a number"),
        ([("9.png", b"x"), ("9.cls", b"1")], "image of sample 9 in .* is not a readable image"),
        (
            [("9.png", image(1)), ("9.jpg", b""), ("9.cls", b"1")],
            "sample 9 .* has jpg, label, png; others have image, label",
        ),
    ],
)
def test_webdataset_that_cannot_be(tmp_path, extra, message):
    pack(tmp_path / "w.tar", [("0.png", image(0)), ("0.cls", b"0"), *extra])
    with pytest.raises(Error, match=message):
        import_data(tmp_path / "w.tar", tmp_path / "s")


def table(count):
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.table(
        {
            "x": np.arange(count, dtype=np.float32),
            "flag": [i % 2 == 0 for i in range(count)],
            "text": [f"é{i}" for i in range(count)],
            "pair": [[i, i + 1] for i in range(count)],
            "walk": [list(range(i % 3)) for i in range(count)],
            "fixed": pyarrow.array(
                [[i % 99] * 3 for i in range(count)], pyarrow.list_(pyarrow.int8(), 3)
            ),
            "label": ["dog" if i % 3 else "cat" for i in range(count)],
        }
    )


def test_parquet(tmp_path):
    whole = table(100)
    import pyarrow.parquet

    (tmp_path / "p").mkdir()
    pyarrow.parquet.write_table(whole[:60], tmp_path / "p" / "train-0.parquet", row_group_size=7)
    pyarrow.parquet.write_table(whole[60:90], tmp_path / "p" / "train-1.parquet")
    pyarrow.parquet.write_table(whole[90:], tmp_path / "p" / "val.parquet")
    shards = import_data(tmp_path / "p", tmp_path / "s")
    assert shards.attributes["classes"] == ["cat", "dog"]
    batch = rows(shards.split("train"))
    assert len(shards.split("validation")) == 10
    assert np.array_equal(batch["x"], np.arange(90)) and batch["x"].dtype == np.float32
    assert batch["flag"].dtype == bool and batch["flag"].tolist() == [i % 2 == 0 for i in range(90)]
    assert batch["pair"].shape == (90, 2) and batch["pair"][40].tolist() == [40, 41]
    assert batch["fixed"].shape == (90, 3) and batch["fixed"].dtype == np.int8
    assert np.diff(batch["walk.offsets"]).tolist() == [i % 3 for i in range(90)]
    assert batch["text"].tobytes().decode() == "".join(f"é{i}" for i in range(90))
    assert batch["label"].tolist() == [int(i % 3 > 0) for i in range(90)]


def test_csv(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "train.csv").write_text("x,name,label\n1,a,3\n2,,4\n")
    (tmp_path / "c" / "test.csv").write_text("x,name,label\n0.5,b,5\n")
    shards = import_data(tmp_path / "c", tmp_path / "s")
    train = rows(shards.split("train"))
    assert train["x"].tolist() == [1.0, 2.0] and train["label"].tolist() == [3, 4]
    assert train["name"].tobytes() == b"a" and train["name.offsets"].tolist() == [0, 1, 1]
    (tmp_path / "one.csv").write_text("x\n" + "\n".join(map(str, range(100))))
    shards = import_data(tmp_path / "one.csv", tmp_path / "t")
    parts = [rows(split)["x"] for split in shards.splits.values()]
    assert [len(part) for part in parts] == [90, 10]
    assert sorted(np.concatenate(parts)) == list(range(100))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,y\n1,2\n3,\n", "1 rows of column y of .*t.csv hold nothing.*--missing"),
        ("x\n2020-01-01\n", "column x of .*t.csv holds dates"),
        ("x,y\n1,2\n3\n", "t.csv cannot be read.*Expected 2 columns"),
        ("", "t.csv is empty"),
        (",y\n1,2\n", "column .*t.csv has no name"),
    ],
)
def test_csv_that_cannot_be(tmp_path, text, message):
    pytest.importorskip("pyarrow")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(Error, match=message):
        import_data(tmp_path / "t.csv", tmp_path / "s")


def test_parquet_that_cannot_be(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.table({"s": [{"a": 1}]}), tmp_path / "t.parquet")
    with pytest.raises(Error, match="column s of .*t.parquet is of type struct"):
        import_data(tmp_path / "t.parquet", tmp_path / "s")
    (tmp_path / "u.parquet").write_bytes(b"none")
    with pytest.raises(Error, match="u.parquet cannot be read"):
        import_data(tmp_path / "u.parquet", tmp_path / "s")


def test_text(tmp_path):
    text = bytes(range(101))
    (tmp_path / "t.txt").write_bytes(text)
    options = ImportOptions(sequence_length=10, validation_fraction=0.2)
    shards = import_data(tmp_path / "t.txt", tmp_path / "s", options)
    train, held = (rows(shards.split(name))["tokens"] for name in ("train", "validation"))
    assert train.shape == (8, 11) and held.shape == (2, 11)
    # Each row predicts its last 10 bytes, and together the rows predict every byte but the first.
    predicted = np.concatenate([train[:, 1:].ravel(), held[:, 1:].ravel()])
    assert predicted.tobytes() == text[1:]


@pytest.mark.parametrize("name", ["missing.tar", "x.bin", "empty", "short.txt"])
def test_what_cannot_be_imported(tmp_path, name):
    (tmp_path / "x.bin").write_bytes(b"\1\2\3")
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(Error, match=name):
        import_data(tmp_path / name, tmp_path / "s", ImportOptions())
    assert not (tmp_path / "s" / INDEX).exists()


def test_tables_without_pyarrow(tmp_path, monkeypatch):
    for name in [*sys.modules]:
        if name.startswith(("pyarrow", "hpctrain.data.importers.tables")) or "columns" in name:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.csv").write_text("x\n1\n")
    with pytest.raises(Error, match=r"t.csv needs pyarrow.*HINT: pip install pyarrow"):
        import_data(tmp_path / "t.csv", tmp_path / "s")


def test_shard_sizes(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=np.zeros((1000, 2**10), np.uint8))
    for options, sizes in (
        (ImportOptions(), [1000]),
        (ImportOptions(shard_bytes=300 * 2**10), [250] * 4),
        (ImportOptions(shard_bytes=300 * 2**10, compression="lz4"), [256, 256, 256, 232]),
    ):
        folder = tmp_path / f"{len(sizes)}{options.compression}"
        shards = import_data(tmp_path / "a.npz", folder, options)
        assert [shard.samples for shard in shards.index.splits["train"].shards] == sizes


def test_an_import_is_not_mixed_with_another(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MOST_BATCH", 4)
    source = fill(tmp_path / "images", per_class=20)
    (source / "train" / "dog" / "99.png").write_bytes(image(0)[:40])
    options = ImportOptions(shard_bytes=1000)
    with pytest.raises(Error, match="99.png is not a readable image"):
        import_data(source, tmp_path / "s", options)
    with pytest.raises(Error, match="unfinished import, but"):
        import_data(source, tmp_path / "s", ImportOptions(shard_bytes=2000))
    (source / "train" / "dog" / "99.png").write_bytes(image(3))
    import_data(source, tmp_path / "s", options)
    with pytest.raises(Error, match="already holds a shard set"):
        import_data(source, tmp_path / "s", options)


def test_what_killed_writers_left_is_removed(tmp_path):
    source = fill(tmp_path / "images")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / ".train-000000.h5.host.123").write_text("torn")
    (tmp_path / "s" / ".mine").write_text("kept")
    import_data(source, tmp_path / "s")
    assert sorted(file.name for file in (tmp_path / "s").glob(".*")) == [".mine"]


def test_ranks_take_nothing_of_an_earlier_run(tmp_path):
    folder = tmp_path / "meet"
    folder.mkdir()
    (folder / "rank-1").write_text("old ...")
    (folder / "run").write_text(json.dumps({"words": {"1": "old"}, "what": "old"}))
    (folder / "failed-0").write_text(json.dumps({"words": {"1": "old"}, "why": "old"}))
    got = []

    def other():
        with ranks.Ranks(folder, Launch("mpirun", 1, 2, 1, 2)) as rank:
            got.append(rank.receive())

    thread = threading.Thread(target=other)
    thread.start()
    with ranks.Ranks(folder, Launch("mpirun", 0, 2, 0, 2)) as rank:
        rank.publish("new")
        thread.join(SECONDS)
    assert got == ["new"]


def test_a_silent_rank_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(ranks, "FAREWELL_SECONDS", 0.0)
    with (
        pytest.raises(Error, match="no sign of life from rank 1 of 2"),
        ranks.Ranks(tmp_path / "meet", Launch("mpirun", 0, 2, 0, 2)) as rank,
    ):
        rank.publish("new")


def sources(folder):
    """One source of each kind, of more than a batch where that is cheap."""
    random = np.random.default_rng(0)
    x = random.random((3000, 500)).astype(np.float32)
    np.savez_compressed(folder / "a.npz", x_train=x, x_test=x[:7], y_train=x[:, 0], y_test=x[:7, 0])
    np.save(folder / "x.npy", x)
    with h5py.File(folder / "a.h5", "w") as file:
        file["train/x"], file["test/x"] = x, x[:7]
    (folder / "t.txt").write_bytes(random.bytes(20_000))
    pack(folder / "w.tar", web_samples(0, 50))
    fill(folder / "images", per_class=20)
    with tarfile.open(folder / "i.tar.gz", "w:gz") as archive:
        archive.add(folder / "images", "images")
    (folder / "p").mkdir()
    parquet = pytest.importorskip("pyarrow.parquet")
    csv = pytest.importorskip("pyarrow.csv")
    parquet.write_table(table(300), folder / "p" / "a.parquet", row_group_size=50)
    parquet.write_table(table(70), folder / "p" / "b.parquet")
    csv.write_csv(table(100).select(["x", "text", "label"]), folder / "c.csv")
    return [
        folder / name
        for name in ["a.npz", "x.npy", "a.h5", "t.txt", "w.tar", "images", "i.tar.gz", "p", "c.csv"]
    ]


def flat(batches, field):
    """Each sample's bytes."""
    samples = []
    for batch in batches:
        column = batch[field]
        samples += [
            column[i : i + 1].values.tobytes()
            if isinstance(column, Ragged)
            else column[i].tobytes()
            for i in range(len(column))
        ]
    return samples


def test_what_is_read_in_parts_is_what_is_read_at_once(tmp_path):
    """So several ranks, and a second run, make what one makes at once."""
    for source in sources(tmp_path):
        importer = hpctrain.data.importers.open_source(source, ImportOptions())
        survey = Survey.of(json.loads(json.dumps(importer.survey().tree())))
        count = sum(samples for _, samples in survey.runs)
        whole = list(importer.read(survey, np.arange(count)))
        for seed in range(3):
            chosen = np.random.default_rng(seed).random(count) < (0.05, 0.5, 0.95)[seed]
            items = np.flatnonzero(chosen)[seed:]
            part = list(importer.read(survey, items))
            for field, spec in survey.fields.items():
                samples = flat(whole, field)
                assert len(samples) == count
                assert flat(part, field) == [samples[item] for item in items], (source, field)
                assert all(spec_of(batch[field]) == spec for batch in part)


def test_shards_are_dealt_out_whole_and_evenly():
    shards = [Shard("train", i, np.zeros(size)) for i, size in enumerate([50] * 11 + [3])]
    for size in (1, 2, 3, 5, 20):
        parts = [share(shards, Launch("mpirun", rank, size, 0, 1)) for rank in range(size)]
        assert [shard.number for part in parts for shard in part] == list(range(12))
        counts = [sum(len(shard.items) for shard in part) for part in parts]
        assert max(counts) <= sum(counts) / size + 50
