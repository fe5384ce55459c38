"""A loop of your own in plain PyTorch; own_loop.py is the same on any number of ranks."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

torch.manual_seed(0)
pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16).float(), torch.tensor(labels)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loader = DataLoader([{"x": x[i], "y": y[i]} for i in range(1500)], 64, shuffle=True)
for _ in range(20):
    for batch in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
        loss.backward()
        optimizer.step()
accuracy = (model(x[1500:]).argmax(1) == y[1500:]).float().mean()
print(f"accuracy {accuracy:.3f}")
