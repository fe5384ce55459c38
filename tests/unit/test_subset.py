"""Splits made of one set: by fractions, folds, classes, groups and lists."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.config import SplitConfig, read_settings, read_toml, reference, resolve
from hpctrain.data.loader import Loader
from hpctrain.data.mixture import Mixture
from hpctrain.data.order import EpochOrder
from hpctrain.data.source import ArraySource
from hpctrain.data.subset import (
    Subset,
    grouped_parts,
    random_parts,
    stratified_parts,
    values_of,
)
from hpctrain.errors import Error
from hpctrain.tasks.division import divided
from tests.unit.test_optimizers import Line, X, trained, trainer_of

FRACTIONS = st.lists(st.integers(1, 20), min_size=1, max_size=4).map(
    lambda weights: [weight / (sum(weights) + weights[0] % 3) for weight in weights]
)


def apart(parts, samples, fractions):
    """No sample twice, and all where the fractions add up to one."""
    every = np.concatenate(parts)
    assert len(np.unique(every)) == len(every)
    assert every.size == 0 or (every.min() >= 0 and every.max() < samples)
    if sum(fractions) > 1 - 1e-9:
        assert len(every) == samples


@given(st.integers(0, 200), FRACTIONS, st.integers(0, 2**40))
@settings(max_examples=60)
def test_fractions(samples, fractions, seed):
    parts = random_parts(samples, fractions, seed)
    apart(parts, samples, fractions)
    for part, fraction in zip(parts, fractions, strict=True):
        assert abs(len(part) - fraction * samples) < 1
    again = random_parts(samples, fractions, seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


@given(st.lists(st.integers(0, 8), max_size=150), FRACTIONS, st.integers(0, 2**40))
@settings(max_examples=60)
def test_each_class_has_its_fraction(labels, fractions, seed):
    labels = np.array(labels, dtype=np.int64)
    parts = stratified_parts(labels, fractions, seed)
    apart(parts, len(labels), fractions)
    for part, fraction in zip(parts, fractions, strict=True):
        counts = Counter(labels[part].tolist())
        for label, count in Counter(labels.tolist()).items():
            assert abs(counts[label] - fraction * count) < 1
        assert abs(len(part) - fraction * len(labels)) <= len(fractions) + 1
    text = np.array([f"class {label}" for label in labels.tolist()], dtype="S")
    same = stratified_parts(text, fractions, seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, same, strict=True))


def test_classes_of_one_sample_add_up():
    train, held = stratified_parts(np.arange(100), [0.8, 0.2], seed=3)
    assert (len(train), len(held)) == (80, 20)


@given(st.lists(st.integers(0, 12), max_size=150), FRACTIONS, st.integers(0, 2**40))
@settings(max_examples=60)
def test_groups_stay_together(groups, fractions, seed):
    groups = np.array(groups, dtype=np.int64)
    parts = grouped_parts(groups, fractions, seed)
    apart(parts, len(groups), fractions)
    owners = [set(groups[part].tolist()) for part in parts]
    assert sum(map(len, owners)) == len(set().union(*owners))
    largest = max(Counter(groups.tolist()).values(), default=0)
    for part, fraction in zip(parts, fractions, strict=True):
        assert len(part) <= fraction * len(groups) + largest


@given(st.data(), st.integers(1, 90), st.sampled_from(["block", "full", "none"]))
@settings(max_examples=60, deadline=None)
def test_every_sample_of_a_subset_once_on_any_ranks(data, samples, shuffle):
    class Blocks(ArraySource):
        """As compressed shards are: whole blocks are read."""

        def order(self, seed, epoch, shuffle, lanes):
            return EpochOrder(len(self), seed, epoch, shuffle, 4, lanes, aligned, 1)

    aligned = data.draw(st.booleans())
    rows = np.arange(samples) * 10
    numbers = data.draw(st.lists(st.integers(0, samples - 1), unique=True, min_size=1))
    batch = data.draw(st.integers(1, 12))
    subset = Subset(Blocks({"x": rows}), numbers)
    order = subset.order(seed=1, epoch=data.draw(st.integers(0, 3)), shuffle=shuffle, lanes=batch)
    seen = subset.take(order.indices(np.arange(order.samples)))["x"]
    assert sorted(seen.tolist()) == sorted(rows[numbers].tolist())
    if shuffle == "none":
        assert seen.tolist() == sorted(seen.tolist())
    loader = Loader(subset, batch, shuffle=shuffle, workers=0)
    taken = [each["x"] for each in loader]
    assert sorted(int(x) for part in taken for x in part) == sorted(seen.tolist())


def split(source_or_splits, **config):
    splits = source_or_splits
    if not isinstance(splits, dict):
        splits = {"train": splits}
    return divided(splits, SplitConfig(**config), seed=config.get("seed", 0))


def numbers_of(splits):
    return {name: source.numbers.tolist() for name, source in splits.items()}


SOURCE = ArraySource({"x": np.arange(12.0), "label": np.arange(12) % 3, "who": np.arange(12) // 4})


def test_folds_validate_every_sample_once():
    for by, column in (("random", None), ("stratified", "label"), ("group", "who")):
        held = []
        for fold in range(3):
            found = numbers_of(split(SOURCE, folds=3, fold=fold, by=by, column=column))
            assert sorted(found["train"] + found["validation"]) == list(range(12))
            held += found["validation"]
            assert len(found["validation"]) == 4
        assert sorted(held) == list(range(12))
        if by == "stratified":
            assert Counter(n % 3 for n in held[:4]).most_common(1)[0][1] == 2


def test_lists_and_files(tmp_path):
    np.save(tmp_path / "a.npy", np.array([4, 2]))
    (tmp_path / "b.txt").write_text("1\n3\n")
    (tmp_path / "c.json").write_text(json.dumps([5]))
    found = split(SOURCE, train=tmp_path / "a.npy", validation=tmp_path / "b.txt", test=[5, 7])
    assert numbers_of(found) == {"train": [2, 4], "validation": [1, 3], "test": [5, 7]}
    assert found["train"][1]["x"] == 4
    assert numbers_of(split(SOURCE, train=tmp_path / "c.json")) == {"train": [5]}


def test_a_test_set_alone_is_kept():
    splits = {"train": SOURCE, "test": SOURCE}
    found = split(splits | {"validation": SOURCE}, train=0.5, validation=0.5)
    assert found["test"] is SOURCE and len(found["validation"]) == 6
    other = ArraySource({"x": np.arange(3.0)})
    with pytest.raises(Error, match="makes 'validation', which data\\(\\) gives already"):
        split(splits | {"validation": other}, train=0.5, validation=0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has no 'train'"),
        ({"fold": 1}, "does not say of how many"),
        ({"folds": 3}, "fold None of 3"),
        ({"folds": 3, "fold": 3}, "fold 3 of 3"),
        ({"folds": 3, "fold": 0, "train": 0.5}, "fold 0 of 3 beside train"),
        ({"train": 0.9, "validation": 0.2}, "no fractions of one set"),
        ({"train": 0.9, "validation": [1]}, "no fractions of one set"),
        ({"train": [1, 1]}, "sample 1 is in a split twice"),
        ({"train": [1, 12]}, "there is no sample 12"),
        ({"train": [-1]}, "there is no sample -1"),
        ({"train": [1, 2], "validation": [2]}, "sample 2 is in 'train' and in 'validation'"),
        ({"train": [1], "by": "group", "column": "who"}, "are not drawn by anything"),
        ({"train": 0.5, "by": "group"}, "does not say by which field"),
        ({"train": 0.5, "column": "who"}, "does not say what for"),
        ({"train": 0.5, "by": "group", "column": "whom"}, "no field 'whom'. HINT: .*'who'"),
        ({"train": 0.99, "validation": 0.01}, "leaves nothing for 'validation'"),
        ({"train": "/nowhere.txt"}, "cannot read sample numbers from /nowhere.txt"),
        ({"of": "test", "train": 0.5}, "divides 'test', which data\\(\\) does not give"),
    ],
)
def test_what_is_no_division_is_refused(config, message):
    with pytest.raises(Error, match=message) as raised:
        split(SOURCE, **config)
    assert raised.value.hint and "\n" not in str(raised.value)


def test_only_what_has_one_value_and_no_order_of_its_own():
    with pytest.raises(Error, match="has 2 values a sample"):
        values_of(ArraySource({"x": np.zeros((3, 2))}), "x")
    with pytest.raises(Error, match="a Mixture has an order of its own"):
        split(Mixture([SOURCE, SOURCE]), train=0.5)


class Whole(Line):
    def data(self, config):
        return {"train": {"x": X, "y": X[:, :1], "label": np.arange(len(X)) % 2}}


def test_a_run_trains_and_validates_on_its_parts(tmp_path):
    setting = 'data.split = {train=0.75, validation=0.25, by="stratified", column="label"}'
    data = {"workers": 0, **read_settings([setting])["data"]}
    run, _ = trained(tmp_path / "a", task=Whole(), data=data)
    assert {name: len(source) for name, source in run.splits.items()} == {
        "train": 18,
        "validation": 6,
    }
    assert run.state.counters.samples == 4 * 18 and run.state.counters.best is not None
    other = trainer_of(tmp_path / "b", task=Whole(), data=data, seed=1)
    assert other.splits["train"].digest != run.splits["train"].digest
    fixed = {**data, "split": {**data["split"], "seed": 0}}
    same = trainer_of(tmp_path / "c", task=Whole(), data=fixed, seed=1)
    assert same.splits["train"].digest == run.splits["train"].digest
    with pytest.raises(Error, match="place in the epoch is for source"):
        trainer_of(
            tmp_path / "d", task=Whole(), data=data, seed=1,
            snapshot=run.state.state_dict() | {"model": None},
        )  # fmt: skip


def test_it_survives_a_file(tmp_path):
    config = resolve([("a", {"data": {"split": {"train": 0.5, "test": [1, 2]}}})])
    for text in (config.to_toml(), reference(config)):
        (tmp_path / "config.toml").write_text(text)
        assert resolve([("file", read_toml(tmp_path / "config.toml"))]) == config
    with pytest.raises(Error, match="data.split = .*Extra inputs"):
        resolve([("a", {"data": {"split": {"trian": 0.5}}})])
