"""A slice's parameters that have no gradient in an update are left alone, as torch leaves them."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from hpctrain.optim.lamb import Lamb
from hpctrain.ps.consistency.schedules import Rounds
from hpctrain.ps.partition.layout import Layout, Parameter
from hpctrain.ps.server import slice_state as holding
from hpctrain.ps.update_rules import rule_of

MAKE = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "lamb": lambda p: Lamb(p, lr=0.1, weight_decay=0.1),
}


@settings(max_examples=25)
@given(
    kind=st.sampled_from(sorted(MAKE)),
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
    used=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_parts_without_a_gradient(kind, sizes, used, seed):
    generator = torch.Generator().manual_seed(seed)
    plain = [
        torch.randn(n, generator=generator, dtype=torch.float64).requires_grad_() for n in sizes
    ]
    optimizer = MAKE[kind](plain)
    rule = rule_of(optimizer)
    layout, _ = Layout.of(
        [Parameter(torch.float64, 0, n) for n in sizes], 2**20, whole=rule.per_tensor
    )
    (piece,) = layout.slices
    weights = torch.cat([p.detach() for p in plain])
    held = holding.SliceState(piece, 0, 0, weights, rule.new_state(weights), Rounds([0]))
    for version, uses in enumerate(used):
        gradients = [
            torch.randn(n, generator=generator, dtype=torch.float64) if use else None
            for n, use in zip(sizes, uses, strict=False)
        ]
        for parameter, gradient in zip(plain, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        flat = torch.cat(
            [
                torch.zeros(n).double() if g is None else g
                for n, g in zip(sizes, gradients, strict=True)
            ]
        )
        absent = _named(piece.bounds, sizes, gradients)
        hyper = rule.hyper(optimizer.param_groups[0])
        push = holding.Pushed(0, version, version, 1.0, hyper, flat.clone(), absent=absent)
        held.update(rule, push, 1.0, version + 1)
    expected = torch.cat([p.detach() for p in plain])
    assert torch.allclose(held.weights, expected, rtol=1e-12, atol=1e-14)


def _named(bounds, sizes, gradients):
    """Parts by where they begin, as the worker finds them."""
    found, start = set(), 0
    for size, gradient in zip(sizes, gradients, strict=True):
        if gradient is None and size:
            found.add(max(n for n, edge in enumerate(bounds[:-1]) if edge <= start))
        start += size
    return frozenset(found)


@pytest.mark.parametrize("who", [(0,), (0, 1)])
def test_weights_that_workers_have_changed(who):
    """All of them have to, and alike; then the next update starts from theirs."""
    layout, _ = Layout.of([Parameter(torch.float64, 0, 3)], 2**20)
    weights = torch.zeros(3, dtype=torch.float64)
    held = holding.SliceState(layout.slices[0], 0, 0, weights, {}, Rounds([0, 1]))
    changed = torch.arange(3.0, dtype=torch.float64)
    for worker in who:
        held.put[worker] = changed.clone().view(torch.uint8)
    if len(who) == 1:
        with pytest.raises(Exception, match="workers hold different parameters"):
            held.take_put([0, 1])
    else:
        held.take_put([0, 1])
        assert torch.equal(held.weights, changed) and not held.put
