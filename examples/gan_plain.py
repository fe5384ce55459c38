"""A generator and a discriminator in plain PyTorch; gan.py is the same on any number of ranks."""

import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
real = torch.randn(2048, 2, dtype=torch.float64) * 0.3 + torch.tensor([1.0, -1.0])
noise = torch.randn(2048, 4, dtype=torch.float64)
make = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2)).double()
judge = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()
maker = torch.optim.SGD(make.parameters(), lr=0.05)
judging = torch.optim.SGD(judge.parameters(), lr=0.05)


def adversarial(points, truth):
    score = judge(points)
    return F.binary_cross_entropy_with_logits(score, torch.full_like(score, truth))


for _ in range(3):
    for rows in torch.arange(2048).split(64):
        judging.zero_grad()
        fake = make(noise[rows])
        loss = adversarial(real[rows], 1.0) + adversarial(fake.detach(), 0.0)
        loss.backward()
        judging.step()

        maker.zero_grad()
        adversarial(fake, 1.0).backward()
        maker.step()
print(f"mean of what is made {make(noise).mean(0).tolist()}")
