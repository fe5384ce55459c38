"""Update rules do to slices, and to rows, what torch's optimizers do to parameters."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD, Adam, AdamW, SparseAdam

from hpctrain.errors import Error
from hpctrain.optim.lamb import Lamb
from hpctrain.ps.update_rules import GRAIN, rule_named, rule_of

SETTINGS = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "weight_decay": 0.05, "maximize": True}),
    (SGD, {"lr": 0.1, "momentum": 0.9}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    (SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05, "maximize": True}),
    (Adam, {"lr": 0.01}),
    (Adam, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    (AdamW, {"lr": 0.01}),
    (AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
]
SETTING_NAMES = [f"{kind.__name__}-{','.join(options)}" for kind, options in SETTINGS]
with_settings = pytest.mark.parametrize(("kind", "options"), SETTINGS, ids=SETTING_NAMES)
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-14, torch.float16: 1e-2, torch.bfloat16: 5e-2}
STEPS = 5


@pytest.fixture(autouse=True)
def _as_on_a_server():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(ours, theirs, dtype):
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=tolerance, atol=tolerance)


def lr_of(step):
    return 0.02 / step, 1 / (1 + step)


def train(rule, group, weights, gradients, cuts=None, bounds=None):
    """What the rule makes of weights that are cut into slices."""
    weights = weights.clone()
    state = rule.new_state(weights)
    for step, gradient in enumerate(gradients, start=1):
        lr, factor = lr_of(step)
        hyper = rule.hyper(group | {"lr": lr})
        for begin, end in pairwise(cuts or (0, len(weights))):
            rule.apply(
                weights[begin:end],
                gradient[begin:end].clone(),
                {name: values[begin:end] for name, values in state.items()},
                hyper,
                step,
                lr_factor=factor,
                bounds=bounds and [b - begin for b in bounds if begin <= b <= end],
            )
    return weights, state


def train_torch(optimizer, parameters, gradients):
    """What torch makes of parameters, whose gradients are listed step by step."""
    for step, of_step in enumerate(gradients, start=1):
        for group in optimizer.param_groups:
            group["lr"] = math.prod(lr_of(step))
        for parameter, gradient in zip(parameters, of_step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [True, False])
@with_settings
def test_as_torch(kind, options, fused, dtype):
    weights = random(1003, dtype=dtype)
    gradients = [random(1003, seed=step, dtype=dtype) for step in range(1, STEPS + 1)]
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = kind([parameter], fused=fused, **options)
    rule = rule_of(optimizer)
    ours, state = train(rule, optimizer.param_groups[0], weights, gradients)
    train_torch(optimizer, [parameter], [[gradient] for gradient in gradients])

    pairs = {"weights": (ours, parameter.data)}
    if kind is not SGD or "momentum" in options:
        assert set(rule.state_names) == optimizer.state[parameter].keys() - {"step"}
        pairs |= {n: (state[n], optimizer.state[parameter][n]) for n in rule.state_names}
    for mine, torchs in pairs.values():
        if fused:
            assert torch.equal(mine, torchs)
        else:
            close(mine, torchs, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@with_settings
def test_16_bits(kind, options, dtype):
    weights = random(1003).to(dtype)
    gradients = [random(1003, seed=step).to(dtype) for step in range(1, STEPS + 1)]
    parameter = torch.nn.Parameter(weights.double())
    optimizer = kind([parameter], **options)
    ours, _ = train(rule_of(optimizer), optimizer.param_groups[0], weights, gradients)
    train_torch(optimizer, [parameter], [[gradient.double()] for gradient in gradients])
    assert ours.dtype is dtype
    close(ours, parameter.data, dtype)


def test_sgd_without_momentum_needs_no_state():
    rule, weights, gradient = rule_named("sgd"), random(100), random(100, seed=1)
    rule.apply(weights, gradient, {}, rule.hyper(SGD([weights], 0.5).param_groups[0]), 1)
    close(weights, random(100) - 0.5 * gradient, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@with_settings
@settings(max_examples=15)
@given(length=st.integers(1, 2500), cuts=st.sets(st.integers(1, 2499)))
def test_slices_become_what_the_whole_becomes(kind, options, dtype, length, cuts):
    grains = {cut // GRAIN * GRAIN for cut in cuts if cut < length}
    weights = random(length).to(dtype)
    gradients = [random(length, seed=step).to(dtype) for step in (1, 2, 3)]
    optimizer = kind([weights], **options)
    rule, group = rule_of(optimizer), optimizer.param_groups[0]
    whole, state = train(rule, group, weights, gradients)
    slices, states = train(rule, group, weights, gradients, cuts=sorted({0, length} | grains))
    assert torch.equal(slices, whole)
    assert all(torch.equal(states[name], state[name]) for name in rule.state_names)


ROWS = [torch.tensor(rows) for rows in ([3, 0, 6], [6], [], [1, 2, 3, 5], [0, 6, 5])]


def train_rows(rule, group, weights, gradients):
    weights = weights.clone()
    state = rule.new_state(weights)
    for step, (rows, gradient) in enumerate(zip(ROWS, gradients, strict=True), start=1):
        lr, factor = lr_of(step)
        hyper = rule.hyper(group | {"lr": lr})
        rule.apply_rows(
            weights, rows.long(), gradient.clone(), state, hyper, step, lr_factor=factor
        )
    return weights, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize(
    ("kind", "sparse", "options"),
    [(SGD, SGD, {}), (Adam, SparseAdam, {"betas": (0.8, 0.95), "eps": 0.1})],
)
def test_rows_as_torch(kind, sparse, options, maximize, dtype):
    weights = random(8, 5, dtype=dtype)
    gradients = [random(len(rows), 5, seed=9 + len(rows), dtype=dtype) for rows in ROWS]
    optimizer = kind([weights], maximize=maximize, **options)
    rule = rule_of(optimizer)
    ours, state = train_rows(rule, optimizer.param_groups[0], weights, gradients)

    parameter = torch.nn.Parameter(weights.clone())
    optimizer = sparse([parameter], maximize=maximize, **options)
    of_steps = [
        [torch.sparse_coo_tensor(rows.long()[None], gradient, weights.shape)]
        for rows, gradient in zip(ROWS, gradients, strict=True)
    ]
    train_torch(optimizer, [parameter], of_steps)
    close(ours, parameter.data, dtype)
    assert torch.equal(ours[[4, 7]], weights[[4, 7]])
    for name in rule.state_names if kind is Adam else ():
        close(state[name], optimizer.state[parameter][name], dtype)
        assert not state[name][[4, 7]].any()


@with_settings
def test_rows_are_a_table_of_their_own(kind, options):
    """With momentum and weight decay too, for which torch has no equal."""
    options = options | ({} if kind is SGD else {"eps": 0.0})  # the one thing Adam has otherwise
    table, rows = random(50, 6), torch.tensor([40, 7, 11])
    gradients = [random(3, 6, seed=step) for step in (1, 2, 3)]
    optimizer = kind([table], **options)
    rule, hyper = rule_of(optimizer), rule_of(optimizer).hyper(optimizer.param_groups[0])
    before, alone = table.clone(), table[rows].view(-1)
    state, state_alone = rule.new_state(table), rule.new_state(alone)
    for step, gradient in enumerate(gradients, start=1):
        rule.apply_rows(table, rows, gradient.clone(), state, hyper, step)
        rule.apply(alone, gradient.view(-1).clone(), state_alone, hyper, step)
    assert torch.equal(table[rows].view(-1), alone)
    others = [row for row in range(50) if row not in rows]
    assert torch.equal(table[others], before[others])
    for name in rule.state_names:
        assert torch.equal(state[name][rows].view(-1), state_alone[name])
        assert not state[name][others].any()


SHAPES = [(7, 11), (64,), (3, 2, 5), (130,)]
LAMB = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}


def lamb_by_the_paper(weights, gradients, betas, eps, weight_decay):
    """Algorithm 2 in plain float64 numbers."""
    x, m, v = weights.tolist(), [0.0] * len(weights), [0.0] * len(weights)
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.tolist()
        m = [betas[0] * a + (1 - betas[0]) * b for a, b in zip(m, g, strict=True)]
        v = [betas[1] * a + (1 - betas[1]) * b * b for a, b in zip(v, g, strict=True)]
        u = [
            a / (1 - betas[0] ** t) / (math.sqrt(b / (1 - betas[1] ** t)) + eps) + weight_decay * c
            for a, b, c in zip(m, v, x, strict=True)
        ]
        norms = math.hypot(*x), math.hypot(*u)
        ratio = norms[0] / norms[1] if all(norms) else 1.0
        x = [a - math.prod(lr_of(t)) * ratio * b for a, b in zip(x, u, strict=True)]
    return torch.tensor(x, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [LAMB, LAMB | {"weight_decay": 0.0}])
def test_lamb(options, dtype):
    start = [10 * random(*shape, seed=n, dtype=dtype) for n, shape in enumerate(SHAPES)]
    start[1].zero_()  # no norm to be in proportion to
    gradients = [
        [random(*shape, seed=10 * step + n, dtype=dtype) for n, shape in enumerate(SHAPES)]
        for step in range(1, STEPS + 1)
    ]
    for of_step in gradients:
        of_step[2].zero_()  # without weight decay, no update to divide by
    parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    optimizer = Lamb(parameters, **options)
    train_torch(optimizer, parameters, gradients)
    for n, parameter in enumerate(parameters):
        flat = [of_step[n].flatten() for of_step in gradients]
        close(
            parameter.data.flatten(), lamb_by_the_paper(start[n].flatten(), flat, **options), dtype
        )
        assert torch.equal(parameter.grad, gradients[-1][n])

    bounds = [0]
    for tensor in start:
        bounds.append(bounds[-1] + tensor.numel())
    for cuts in ([0, bounds[-1]], [0, bounds[2], bounds[-1]]):
        ours, _ = train(
            rule_of(optimizer),
            optimizer.param_groups[0],
            torch.cat([tensor.flatten() for tensor in start]),
            [torch.cat([tensor.flatten() for tensor in of_step]) for of_step in gradients],
            cuts=cuts,
            bounds=bounds,
        )
        assert torch.equal(ours, torch.cat([p.data.flatten() for p in parameters]))


def test_lamb_goes_on_from_its_state():
    gradients = [[random(20, seed=step)] for step in range(1, STEPS + 1)]
    parameter = torch.nn.Parameter(random(20, seed=7))
    optimizer = Lamb([parameter], **LAMB)
    train_torch(optimizer, [parameter], gradients)
    again = torch.nn.Parameter(parameter.data.clone())
    resumed = Lamb([again])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_torch(optimizer, [parameter], gradients)
    train_torch(resumed, [again], gradients)
    assert torch.equal(again.data, parameter.data)
    assert resumed.state[again]["step"].equal(torch.tensor(2.0 * STEPS))


def test_lamb_evaluates_a_closure():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = Lamb([parameter], lr=0.1)

    def closure():
        loss = (parameter**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    close(parameter.data, torch.full((3,), 0.9), torch.float32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Adam(p, amsgrad=True), "amsgrad=False"),
        (lambda p: AdamW([{"params": p, "amsgrad": True}]), "amsgrad=False"),
        (lambda p: Adam(p, decoupled_weight_decay=True), "torch.optim.AdamW"),
        (lambda p: torch.optim.RMSprop(p), "RMSprop.*SGD, Adam, AdamW, Lamb"),
        (lambda p: type("Mine", (SGD,), {})(p), "Mine"),
        (lambda p: Lamb(p, betas=(0.9, 1.0)), "below 1"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(Error, match=message) as failure:
        rule_of(make([random(3)]))
    assert failure.value.hint


def test_names():
    for kind in (SGD, Adam, AdamW, Lamb):
        rule = rule_of(kind([random(3)]))
        assert rule_named(rule.name) is rule
        assert rule.hyper_names[0] == "lr"
    with pytest.raises(Error, match="did you mean 'adamw'"):
        rule_named("adamww")


def test_lamb_needs_whole_tensors():
    rule, table = rule_named("lamb"), random(4, 3)
    assert rule.per_tensor
    with pytest.raises(Error, match="norm"):
        rule.apply_rows(table, torch.tensor([1]), random(1, 3), rule.new_state(table), [], 1)
    parameter = torch.nn.Parameter(table)
    parameter.grad = table.to_sparse()
    with pytest.raises(Error, match="dense"):
        Lamb([parameter]).step()
