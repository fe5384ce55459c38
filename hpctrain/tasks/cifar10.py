"""CIFAR-10, or any set of small colour images in classes, imported with `hpctrain data import`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import convert_conv2d_weight_memory_format

from hpctrain.data.batch import Batch
from hpctrain.data.normalize import normalize
from hpctrain.tasks.task import Loss, Task

# Of CIFAR-10's training images, by channel, of values 0 to 255.
MEAN = (125.3, 123.0, 113.9)
STD = (63.0, 62.1, 66.7)
PAD = 4


@dataclass
class Cifar10(Task):
    """CIFAR-10 with a narrow residual network, fast enough for a CPU."""

    classes: int = 10
    widths: tuple[int, int, int] = (16, 48, 96)
    label_smoothing: float = 0.1

    defaults = {
        "train.epochs": 10,
        "train.batch_size": 256,
        "optimizer.name": "sgd",
        "optimizer.lr": 0.4,
        "optimizer.lr_batch_size": 256,
        "optimizer.weight_decay": 5e-4,
        "schedule.name": "linear",
        "schedule.warmup_epochs": 2.0,
    }
    monitor = "accuracy"
    mode = "max"

    def model(self) -> nn.Module:
        """Return a residual network in channels-last order, which CPUs and GPUs alike prefer."""
        narrow, middle, wide = self.widths
        model = nn.Sequential(
            convolution(3, narrow),
            convolution(narrow, middle),
            nn.MaxPool2d(2),
            convolution(middle, middle),
            nn.MaxPool2d(2),
            Residual(middle),
            convolution(middle, wide),
            nn.MaxPool2d(2),
            Residual(wide),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(wide, self.classes),
        )
        return convert_conv2d_weight_memory_format(model, torch.channels_last)

    def transform(self, batch: Batch, training: bool) -> Batch:
        """Normalise; when training, flip half of the images and shift each by up to 4 pixels.

        Args:
            batch: With ``image`` of shape (n, height, width, 3), uint8.
            training: Whether to augment.
        """
        images = batch.empty(*batch["image"].shape)
        normalize(batch["image"], MEAN, STD, out=images)
        if training and batch.samples:
            images = augment(images, batch.uniform(3))
        # From (n, height, width, channels); a view, which is what channels-last means.
        return batch.replace(image=images.permute(0, 3, 1, 2))

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the cross entropy with smoothed labels, and accuracy.

        Args:
            model: The network.
            batch: As :meth:`transform` returns it, with ``label`` of shape (n,).
        """
        scores = model(batch["image"])
        correct = scores.argmax(dim=1) == batch["label"]
        loss = F.cross_entropy(scores, batch["label"], label_smoothing=self.label_smoothing)
        return loss, {"accuracy": correct.float().mean()}


def augment(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Flip and shift images by random numbers that belong to them.

    Args:
        images: Shape (n, height, width, channels).
        draws: Shape (n, 3), in [0, 1): whether to flip, and the shifts down and right.
    """
    n, height, width, _ = images.shape
    rows = torch.arange(height) + (draws[:, 1:2] * (2 * PAD + 1)).long() - PAD
    columns = torch.arange(width) + (draws[:, 2:3] * (2 * PAD + 1)).long() - PAD
    columns = torch.where(draws[:, 0:1] < 0.5, columns.flip(1), columns)
    # Beyond an edge the image is mirrored.
    rows, columns = reflect(rows, height), reflect(columns, width)
    return images[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def reflect(index: torch.Tensor, size: int) -> torch.Tensor:
    """Fold indices outside ``[0, size)`` back in, the edge itself not repeated.

    Args:
        index: Of any shape, less than ``size`` beyond an edge.
        size: Of the dimension.
    """
    return (size - 1) - ((size - 1) - index.abs()).abs()


def convolution(inputs: int, outputs: int) -> nn.Module:
    """Return a convolution of 3 x 3, batch-normalised and rectified.

    Args:
        inputs: Channels.
        outputs: Channels.
    """
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Residual(nn.Module):
    """Two convolutions beside a path that skips them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(channels, channels), convolution(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block to (n, channels, height, width), whose shape is kept."""
        out: torch.Tensor = x + self.body(x)
        return out
