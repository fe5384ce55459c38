"""The model of contrastive.py, trained by a loop of plain PyTorch on one process."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

pixels = load_digits().data[:1500] / 16
noise = np.random.default_rng(0).normal(scale=0.1, size=(2, *pixels.shape))
views = torch.tensor(pixels + noise)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
for _ in range(3):
    for batch in views.split(100, dim=1):
        optimizer.zero_grad()
        one, two = (F.normalize(model(view), dim=1) for view in batch)
        loss = F.cross_entropy(one @ two.T / 0.1, torch.arange(len(one)))
        loss.backward()
        optimizer.step()
print(f"loss {loss.item():.4f}")
