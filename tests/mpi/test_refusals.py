"""Ranks that are not about the same thing find out, in a line, before a gradient is used."""

import pytest
import torch
from torch import nn

import hpctrain
from hpctrain.config import PsConfig
from hpctrain.errors import Error
from tests.waiting import SECONDS


def linear(trained=True, size=3):
    torch.manual_seed(0)
    return nn.Linear(size, 1).double().requires_grad_(trained)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def one_pass(model):
    model(torch.ones(2, 3).double()).sum().backward()


@pytest.fixture
def server(world):
    """Parameter servers, closed in the end."""
    made = []

    def make(**options):
        config = PsConfig(servers=world.size, colocate=True, silence_seconds=SECONDS, **options)
        made.append(hpctrain.strategy("ps", hpctrain.init(), ps=config, timeout_seconds=SECONDS))
        return made[-1]

    yield make
    for each in made:
        each.world.comm.close()


def test_optimizers_in_another_order(strategy, world):
    models = [linear(), linear()]
    for model in models:
        model.optimizer = strategy.wrap(model, sgd(model))
    with pytest.raises(Error, match="different wrapped optimizers"):
        one_pass(models[world.rank % 2])


def test_another_number_of_passes(strategy, world):
    model = linear()
    optimizer = strategy.wrap(model, sgd(model))
    one_pass(model)
    if world.rank == 0:
        with pytest.raises(Error, match="no_sync"):
            one_pass(model)
    else:
        optimizer.step()
        with pytest.raises(Error, match="no_sync"):
            one_pass(model)


def test_another_rank_trains_other_parameters(strategy, world):
    model = linear()
    optimizer = strategy.wrap(model, sgd(model))
    one_pass(model)
    optimizer.step()
    model.bias.requires_grad_(world.rank == 0)
    with pytest.raises(Error, match="requires_grad"):
        one_pass(model)


def test_local_gradients_that_are_changed(strategy, world):
    model = linear()
    optimizer = strategy.wrap(model, sgd(model))
    with optimizer.no_sync():
        one_pass(model)
        one_pass(model)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with pytest.raises(Error, match="synchronize"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["horovod", "ps"])
def test_models_that_are_not_alike(strategy, server, world, kind):
    how = strategy if kind == "horovod" else server()
    model = linear(size=3 + (world.rank == 1))
    with pytest.raises(Error, match="ranks differ in parameter 'weight'"):
        how.wrap(model, sgd(model))


@pytest.mark.parametrize("kind", ["horovod", "ps"])
def test_what_cannot_be_shared(strategy, server, world, kind):
    how = strategy if kind == "horovod" else server()
    model = linear()
    with pytest.raises(Error, match="closure"):
        how.wrap(model, torch.optim.LBFGS(model.parameters()))
    lazy = nn.LazyLinear(2)
    with pytest.raises(Error, match="lazy"):
        how.wrap(lazy, sgd(lazy))
    if kind == "ps":
        turned = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
        with pytest.raises(Error, match="complex64 cannot be served"):
            how.wrap(turned, sgd(turned))


def test_a_second_model_with_the_same_servers(server, world):
    how = server()
    model = linear()
    how.wrap(model, sgd(model)).step()
    with pytest.raises(Error, match="trains a model already"):
        how.wrap(linear(), sgd(linear()))


@pytest.mark.parametrize("options", [{"consistency": "backup:0"}, {"pull_every": 2}])
def test_changed_gradients_that_are_averaged_later(server, world, options):
    model = linear()
    optimizer = server(**options).wrap(model, sgd(model))
    one_pass(model)
    optimizer.step()
    optimizer.zero_grad()
    one_pass(model)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with pytest.raises(Error, match="clip_norm"):
        optimizer.step()
    one_pass(model)  # and what is not changed may be pushed
    optimizer.zero_grad()
    one_pass(model)
    optimizer.step()


def test_changed_parameters_that_others_do_not_see(server, world):
    model = linear()
    optimizer = server(consistency="async").wrap(model, sgd(model))
    one_pass(model)
    optimizer.step()
    with torch.no_grad():
        model.weight.mul_(0.5)
    one_pass(model)
    with pytest.raises(Error, match="outside of the optimizer"):
        optimizer.step()
    with torch.no_grad():
        model.weight.copy_(optimizer._client.weights[0][:3])
