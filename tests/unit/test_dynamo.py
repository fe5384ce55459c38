"""What costs as much as torch itself is imported by those who need it."""

import subprocess
import sys

PROGRAM = """
import sys
import torch
from hpctrain.train import dynamo

dynamo.import_when_used()

def trained(kind):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    optimizer = kind(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
        assert torch.is_grad_enabled()
    return model.weight.detach()

kinds = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]
before = [trained(kind) for kind in kinds]
print("torch._dynamo" in sys.modules)
import torch._dynamo

breaks = []
torch._dynamo.graph_break = lambda: breaks.append(1)
assert all(map(torch.equal, before, map(trained, kinds)))
disabled = torch.optim.AdamW.add_param_group.__wrapped__.__wrapped__.__dynamo_disable
print(len(breaks), disabled.__module__)
"""


def test_optimizers_import_no_compiler():
    """And once it is there, it is told what to leave out of compiled code."""
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert found.stdout.split() == ["False", "16", "torch._dynamo.eval_frame"], found.stderr
