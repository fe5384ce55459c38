"""torch's compiler is imported when something is compiled, and works then as ever."""

import sys

import pytest

from hpctrain.process import run
from tests.waiting import SECONDS

PROGRAM = """
import inspect
import sys
import torch
from hpctrain.train import compiler

compiler.import_when_wanted()
weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([weight], lr=0.5)

def step():
    optimizer.zero_grad()
    weight.sum().backward()
    optimizer.step()

step()
inspect.getmodule(step)
assert weight.tolist() == [0.5] * 3
assert "sympy" not in sys.modules and "torch._dynamo.eval_frame" not in sys.modules

graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph

@torch.compile(backend=backend)
def compiled():
    return (weight + 1) * 2

assert compiled().tolist() == [3.0] * 3 and len(graphs) == 1
assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.__path__
step()
torch.compile(step, backend=backend)()
assert weight.tolist() == [-0.5] * 3 and len(graphs) > 1
compiler.import_when_wanted()
assert torch._dynamo.__path__
"""


@pytest.mark.slow
def test_the_compiler_comes_when_it_is_wanted():
    done = run([sys.executable, "-c", PROGRAM], timeout_seconds=SECONDS)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_submodules_can_be_imported():
    program = (
        "from hpctrain.train import compiler; compiler.import_when_wanted()\n"
        "import torch._dynamo.eval_frame\n"
        "assert torch._dynamo.eval_frame.innermost_fn and torch._dynamo.__path__"
    )
    done = run([sys.executable, "-c", program], timeout_seconds=SECONDS)
    assert done.returncode == 0, done.stdout
