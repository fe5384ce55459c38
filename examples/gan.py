"""A generator and a discriminator, each with an optimizer of its own, on any number of ranks.

Run it alone, or by `horovodrun -np 2 python examples/gan.py`. gan_plain.py is the same in plain
PyTorch; what is different here is marked.
"""

import torch
from torch import nn
from torch.nn import functional as F

import hpctrain

torch.manual_seed(0)
real = torch.randn(2048, 2, dtype=torch.float64) * 0.3 + torch.tensor([1.0, -1.0])
noise = torch.randn(2048, 4, dtype=torch.float64)
make = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).double()
judge = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()
world = hpctrain.init()  # new
strategy = hpctrain.strategy("auto", world)  # new
maker = strategy.wrap(make, torch.optim.SGD(make.parameters(), lr=0.05))
judging = strategy.wrap(judge, torch.optim.SGD(judge.parameters(), lr=0.05))
samples = {"real": real, "noise": noise}
loader = hpctrain.Loader(samples, 64, shuffle="none", world=world)  # new: 64 over all ranks


def adversarial(points, truth):
    score = judge(points)
    return F.binary_cross_entropy_with_logits(score, torch.full_like(score, truth))


for _ in range(3):
    for batch in loader:
        judging.zero_grad()
        fake = make(batch["noise"])
        loss = adversarial(batch["real"], 1.0) + adversarial(fake.detach(), 0.0)
        (loss * batch.weight).backward()  # new: this rank's share of the mean
        judging.step()

        maker.zero_grad()
        (adversarial(fake, 1.0) * batch.weight).backward()
        maker.step()
if world.rank == 0:
    print(f"mean of what is made {make(noise).mean(0).tolist()}")
