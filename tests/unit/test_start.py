"""What a start is spared is not missed later."""

import gc

import numpy as np
import pytest
from sklearn.datasets import load_digits

from hpctrain.config import DataConfig
from hpctrain.errors import Error
from hpctrain.tasks import digits
from hpctrain.tasks.digits import Digits
from hpctrain.train import gc_control


@pytest.fixture(autouse=True)
def thawed():
    yield
    gc.unfreeze()


def test_garbage_is_collected_from_training_on():
    with gc_control.none_before_training():
        assert not gc.isenabled()
        gc_control.leave_alone()
        assert gc.isenabled() and gc.get_freeze_count() > 0
    assert gc.isenabled()


def test_garbage_is_collected_after_an_error_at_the_start():
    with pytest.raises(ZeroDivisionError), gc_control.none_before_training():
        _ = 1 / 0
    assert gc.isenabled()


def test_the_digits_are_those_of_scikit_learn():
    """Each once, in training or held out."""
    expected = load_digits()
    expected = np.column_stack([expected.data, expected.target])
    data = Digits().data(DataConfig())
    found = []
    for split in ("train", "validation"):
        samples = data[split].take(np.arange(len(data[split])))
        found.append(np.column_stack([samples["pixels"] * 16.0, samples["label"]]))
    found, expected = (sorted(rows.tolist()) for rows in (np.concatenate(found), expected))
    assert found == expected and len(found) == 1797


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(Error, match="pip install scikit-learn"):
        Digits().data(DataConfig())
