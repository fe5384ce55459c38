"""The model of tabular.py, trained by a loop of plain PyTorch."""

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import f1_score, roc_auc_score
from torch import nn
from torch.nn import functional as F

HELD = 169
x, y = load_breast_cancer(return_X_y=True)
x = torch.tensor((x - x[HELD:].mean(0)) / x[HELD:].std(0))
y = torch.tensor(y)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0)).double()
optimizer = torch.optim.AdamW(
    [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ],
    lr=1e-3,
)
for _ in range(15):
    for rows in torch.arange(HELD, len(x)).split(50):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(x[rows]), y[rows].double()).backward()
        optimizer.step()
with torch.no_grad():
    score = model(x[:HELD])
metrics = {"auc": roc_auc_score(y[:HELD], score), "f1": f1_score(y[:HELD], score > 0)}
print(metrics)
