"""A loop of your own on any number of ranks: plain_loop.py with five lines changed.

Run it alone, or by `horovodrun -np 2 python examples/own_loop.py`, or by mpirun or srun.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import hpctrain

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16).float(), torch.tensor(labels)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
world = hpctrain.init()
optimizer = hpctrain.strategy("auto", world).wrap(model, optimizer)
loader = hpctrain.Loader({"x": x[:1500], "y": y[:1500]}, 64, world=world)
for _ in range(20):
    for batch in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
        (loss * batch.weight).backward()
        optimizer.step()
accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
print(f"accuracy {accuracy:.3f}")
