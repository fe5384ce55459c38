import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from hpctrain.data.importers import ImportOptions, import_data
from hpctrain.data.shards import INDEX
from hpctrain.errors import Error


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


@pytest.mark.parametrize("packed", [False, True])
def test_images_with_splits(tmp_path, packed):
    source = fill(tmp_path / "images")
    if packed:
        with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as archive:
            archive.add(source, "some/prefix")
        source = tmp_path / "images.tar.gz"
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


def test_truncated_tar_is_named(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(fill(tmp_path / "images", per_class=300), "images")
    data = (tmp_path / "x.tar.gz").read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(Error, match=r"x.tar.gz cannot be read to its end"):
        import_data(tmp_path / "x.tar.gz", tmp_path / "a", ImportOptions())


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
    with pytest.raises(Error, match="equally long"):
        import_data(tmp_path / "a.npz", tmp_path / "s", ImportOptions())
    np.savez(tmp_path / "b.npz", x=np.array([{}, []], dtype=object))
    with pytest.raises(Error, match="objects"):
        import_data(tmp_path / "b.npz", tmp_path / "s", ImportOptions())
    (tmp_path / "c.npz").write_bytes(b"PK\3\4 nonsense")
    with pytest.raises(Error, match=r"c.npz"):
        import_data(tmp_path / "c.npz", tmp_path / "s", ImportOptions())


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
