"""Blocks recomputed or compiled: the same numbers, with dropout, an average, and several ranks."""

import pytest
import torch
from torch import nn

from hpctrain.errors import Error
from hpctrain.tasks.blocks import blocks_of
from tests.unit.test_ranks import Net, on, same, single


class Deep(Net):
    """Three blocks with dropout, counted."""

    dropout = 0.3

    def __init__(self):
        self.runs = 0

    def model(self):
        body = [
            nn.Sequential(nn.Linear(4, 4), nn.Dropout(self.dropout), nn.Tanh()) for _ in range(3)
        ]
        model = nn.Sequential(*body, nn.Linear(4, 1))
        model[0][0].register_forward_pre_hook(self.count)
        return model

    def count(self, module, inputs):
        self.runs += module.training


class Sure(Deep):
    """Without dropout: ranks that are threads draw from one generator."""

    dropout = 0.0


@pytest.mark.parametrize("size", [1, 2])
def test_recomputing_changes_no_bit(tmp_path, size):
    plain, again = Deep(), Deep()
    knobs = {"ema_decay": 0.9, "clip_norm": 0.5}
    if size == 1:
        one = single(tmp_path / "a", plain, **knobs)
        other = single(tmp_path / "b", again, recompute="blocks", **knobs)
        assert again.runs == 2 * plain.runs > 0  # it is what it says
        same(one, other, 0.0)
        assert list(one.state.ema.state_dict()) == list(other.state.ema.state_dict())
    else:
        ones = on(2, tmp_path / "a", Sure, **knobs)
        others = on(2, tmp_path / "b", Sure, recompute="blocks", **knobs)
        for one, other in zip(ones, others, strict=True):
            same(one, other, 0.0)


def test_compiled_blocks(tmp_path):
    class Plain(Net):
        def model(self):
            return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    knobs = {"steps": 3}
    one = single(tmp_path / "a", Plain(), **knobs)
    other = single(tmp_path / "b", Plain(), compile="aot_eager", recompute="blocks", **knobs)
    assert other.state.model[0]._compiled_call_impl is not None
    same(one, other, 1e-12)
    assert list(one.state.model.state_dict()) == list(other.state.model.state_dict())


def test_mistakes_are_one_line(tmp_path):
    class Whole(Net):
        def model(self):
            return nn.Linear(4, 1)

    class Odd(Net):
        def blocks(self, model):
            return ["layer"]

    for task, knobs, message in (
        (Whole, {"recompute": "blocks"}, "no blocks were found"),
        (Net, {"compile": "inducter"}, "torch has no compiler 'inducter'"),
        (Odd, {"recompute": "blocks"}, "gives what is no module"),
    ):
        with pytest.raises(Error, match=message) as raised:
            single(tmp_path, task(), **knobs)
        assert raised.value.hint


def test_which_they_are():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(2, 2)
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)])

    model = Parts()
    assert blocks_of(model, None) == list(model.layers)
    task = type("Task", (), {"blocks": lambda self, model: [model.embed]})()
    assert blocks_of(model, task) == [model.embed]
    assert blocks_of(torch.nn.Linear(2, 2), None) == []
