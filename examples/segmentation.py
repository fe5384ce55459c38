"""Segmentation: a U-Net that marks discs in noise, images and masks from HDF5, judged by IoU.

    python -m examples.segmentation_data discs.h5        # or files of yours, with these fields
    hpctrain data adopt discs.h5 --out discs
    hpctrain train examples/segmentation.py --data discs

segmentation_plain.py is the same in plain PyTorch.
"""

import torch
from torch import nn
from torch.nn import functional as F

import hpctrain


def conv(channels, out):
    # No BatchNorm: its statistics would be those of a rank's part of a batch.
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.GroupNorm(4, out), nn.ReLU())


class UNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.down, self.low = conv(1, width), conv(width, 2 * width)
        self.up, self.head = conv(3 * width, width), nn.Conv2d(width, 1, 1)

    def forward(self, image):
        fine = self.down(image)
        coarse = F.interpolate(self.low(F.max_pool2d(fine, 2)), scale_factor=2)
        return self.head(self.up(torch.cat([fine, coarse], dim=1)))


class Discs(hpctrain.Task):
    defaults = {"train.epochs": 4, "train.batch_size": 16, "optimizer.name": "sgd",
                "optimizer.lr": 0.1, "optimizer.weight_decay": 0.0, "schedule.name": "constant",
                "data.order": "none", "train.dtype": "float64"}  # fmt: skip
    monitor, mode = "iou", "max"

    def model(self):
        torch.manual_seed(0)
        return UNet()

    def loss(self, model, batch):
        return F.binary_cross_entropy_with_logits(model(batch["image"]), batch["mask"])

    def predictions(self, model, batch):
        marked, mask = model(batch["image"]) > 0, batch["mask"] > 0.5
        return {"both": (marked & mask).sum((1, 2, 3)), "either": (marked | mask).sum((1, 2, 3))}

    def metrics(self):  # over the pixels of the whole set
        return {"iou": lambda both, either: both.sum() / either.sum()}
