"""The model of time_series.py, trained by a loop of plain PyTorch."""

import torch
from time_series import LENGTH, series
from torch import nn

x = torch.tensor(series()[:, 0])
windows, held = x[:1500].unfold(0, LENGTH + 1, 1), x[1500:].unfold(0, LENGTH + 1, 1)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv1d(1, 8, 8, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(88, 1)
).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)


def error(batch):
    return model(batch[:, None, :LENGTH]) - batch[:, LENGTH:]


for _ in range(4):
    for batch in windows.split(64):
        optimizer.zero_grad()
        error(batch).square().mean().backward()
        optimizer.step()
with torch.no_grad():
    metrics = {"rmse": error(held).square().mean().sqrt().item()}
print(metrics)
