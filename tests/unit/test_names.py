"""What names tell: splits and fields of arrays, splits of files, splits and classes of folders."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data.importers.folders import Place, folders_of, places
from hpctrain.data.index import FieldSpec
from hpctrain.data.splits import SPLITS, splits_of_files, tell
from hpctrain.errors import Error

X, Y = FieldSpec("<f4", (3,)), FieldSpec("<i8")


def arrays(**rows):
    """Name -> rows; what is called x and the like is X, all else Y."""
    return {
        name.replace("__", "/"): (count, X if "x" in name.lower().split("_") else Y)
        for name, count in rows.items()
    }


@pytest.mark.parametrize(
    ("given_", "wanted"),
    [
        ({"x_train": 9, "y_train": 9, "x_test": 2, "y_test": 2}, {"train": "xy", "test": "xy"}),
        ({"train__x": 9, "dev__x": 9}, {"train": "x", "validation": "x"}),
        ({"x": 9, "y": 9, "x_test": 2, "y_test": 2}, {"train": "xy", "test": "xy"}),
        ({"x": 9, "valid": 9, "y": 9}, {"": ["x", "valid", "y"]}),
        ({"x": 9, "y": 9, "test_score": 9}, {"": ["x", "y", "test_score"]}),
        ({"x": 9, "time_train": 9}, {"": ["x", "time_train"]}),
        (
            {"x": 9, "y": 9, "test_score": 9, "train_score": 9},
            {"": ["x", "y", "test_score", "train_score"]},
        ),
        ({"scan__x": 9, "scan__Valid": 9}, {"": ["scan_x", "scan_Valid"]}),
        ({"data__train__x": 9, "data__test__x": 2}, {"train": ["data_x"], "test": ["data_x"]}),
        ({"x": 9, "y": 9, "names": 4}, {"": "xy"}),
        ({"x": 9, "y": 9, "time_train": 4}, {"": "xy"}),
        ({"x_train": 9, "x_test": 2, "names": 4}, {"train": "x", "test": "x"}),
    ],
)
def test_what_arrays_are(given_, wanted):
    told = tell(arrays(**given_), "it")
    assert {split: list(fields) for split, fields in told.splits.items()} == {
        split: list(fields) for split, fields in wanted.items()
    }
    kept = {name for fields in told.splits.values() for name in fields.values()}
    assert kept | set(told.left_out) == set(arrays(**given_)) and not kept & set(told.left_out)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"a__b": 9, "a_b": 9}, "both a/b and a_b would be field a_b"),
        ({"val__x": 9, "valid__x": 9, "train__x": 9}, "'val' and 'valid' name the split valid"),
        ({"x": 9, "y": 4}, "differ in length: x 9, y 4"),
        ({"x": 9, "a": 4, "b": 4}, "differ in length"),
        ({"x_train": 9, "y_test": 9}, "split 'test' has y int64.*--no-splits"),
    ],
)
def test_what_arrays_could_be_in_two_ways_is_refused(given_, message):
    with pytest.raises(Error, match=message):
        tell(arrays(**given_), "it")


NAMES = st.lists(
    st.lists(
        st.sampled_from(["x", "y", "train", "val", "valid", "test", "data", "train_x", "y_test"]),
        min_size=1,
        max_size=3,
    ).map("/".join),
    min_size=1,
    max_size=6,
    unique=True,
)


@given(NAMES, st.lists(st.integers(0, 3), min_size=6, max_size=6), st.booleans())
def test_no_array_is_dropped_in_silence(names, rows, told):
    given_ = {name: (count, Y) for name, count in zip(names, rows, strict=False)}
    try:
        found = tell(given_, "it", told=told)
    except Error:
        return
    kept = [name for fields in found.splits.values() for name in fields.values()]
    assert sorted([*kept, *found.left_out]) == sorted(names)
    for fields in found.splits.values():
        assert len({given_[name][0] for name in fields.values()}) == 1
    if not told:
        assert list(found.splits) == [""]


def test_splits_of_files():
    names = ["a-train-0.csv", "val/7.csv", "part.csv", "Test_run7.h5", "restrained.csv"]
    assert splits_of_files(names, "it") == ["train", "validation", "", "test", ""]
    assert splits_of_files(names, "it", told=False) == [""] * 5
    with pytest.raises(Error, match="both 'val' and 'valid'"):
        splits_of_files(["val.csv", "valid.csv"], "it")


def placed(*folders, classes=None, told=True):
    given_ = [folders_of(f"{folder}/x.png") for folder in folders]
    found = places(given_, "it", classes=classes, told=told)
    return [found[folder] for folder in given_]


@pytest.mark.parametrize(
    ("folders", "wanted"),
    [
        (["cat", "dog"], [("", "cat"), ("", "dog")]),
        (["train/cat", "test/cat"], [("train", "cat"), ("test", "cat")]),
        (["train/n01/images", "train/n02/images"], [("train", "n01"), ("train", "n02")]),
        (["A/B/train/n0", "A/B/val/n1"], [("train", "n0"), ("validation", "n1")]),
        (
            ["cat/train", "cat/test", "dog/test"],
            [("train", "cat"), ("test", "cat"), ("test", "dog")],
        ),
        (["bus", "car", "train"], [("", "bus"), ("", "car"), ("", "train")]),
        (["train/train", "train/bus"], [("train", "train"), ("train", "bus")]),
        (["wrap/cat"], [("", "cat")]),
        (["train", "train/cat", ""], [None, ("train", "cat"), None]),
    ],
)
def test_what_folders_are(folders, wanted):
    found = placed(*folders)
    assert found == [place and Place(*place) for place in wanted]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["cat/young", "cat/old", "dog/young"], "which folder names the class.*--classes first"),
        (["cat", "dog/young"], "which folder names the class"),
        (["train/n01/images", "train/n02/images", "val/images"], "which folder names the class"),
        (["images", "masks"], "folder images seems to say what"),
        (["train/JPEGImages", "train/SegmentationClass"], "JPEGImages seems to say what"),
        (["train/cat", "test/cat", "unlabeled/cat"], "unlabeled/cat names none"),
        (["train", "test"], "no folders of classes"),
        ([""], "no folders of classes.*--classes none"),
        (["val/cat", "valid/cat"], "both 'val' and 'valid'"),
    ],
)
def test_folders_that_could_be_read_in_two_ways_are_refused(folders, message):
    with pytest.raises(Error, match=message):
        placed(*folders)


def test_an_option_decides():
    nested = ["train/cat/young", "train/dog/young", "test/cat/old"]
    labels = {
        "first": ["cat", "dog", "cat"],
        "last": ["young", "young", "old"],
        "path": ["cat/young", "dog/young", "cat/old"],
        "none": [None] * 3,
    }
    for classes, wanted in labels.items():
        found = placed(*nested, classes=classes)
        assert [place.label for place in found] == wanted
        assert [place.split for place in found] == ["train", "train", "test"]
    assert placed("val", "valid", told=False) == [Place("", "val"), Place("", "valid")]
    assert placed("images", "masks", classes="last")[1] == Place("", "masks")


FOLDERS = st.lists(
    st.lists(
        st.sampled_from(["train", "val", "test", "cat", "dog", "a", "images"]), max_size=4
    ).map(tuple),
    min_size=1,
    max_size=6,
    unique=True,
)


@settings(max_examples=300)
@given(FOLDERS)
def test_two_folders_of_one_class_differ_in_nothing_that_tells_one_from_another(folders):
    """Whatever is not refused: no level with several names is dropped but that of the splits."""
    try:
        found = places(folders, "it", classes=None, told=True)
    except Error:
        return
    assert set(found) == set(folders)
    named = {folder: place for folder, place in found.items() if place}
    for one, place in named.items():
        for other, another in named.items():
            if place == another and len(one) == len(other):
                differing = [pair for pair in zip(one, other, strict=True) if pair[0] != pair[1]]
                assert all(word.lower() in SPLITS for pair in differing for word in pair)
