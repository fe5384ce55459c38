"""A character-level language model over a text imported with `hpctrain data import`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from hpctrain.data.batch import Batch
from hpctrain.tasks.task import Loss, Task


@dataclass
class CharLM(Task):
    """A small transformer decoder over bytes."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 1024

    defaults = {
        "train.epochs": 5,
        "train.batch_size": 64,
        "train.clip_norm": 1.0,
        "optimizer.lr": 2e-3,
        "optimizer.weight_decay": 0.1,
        "optimizer.betas": [0.9, 0.95],
        "schedule.warmup_steps": 100,
    }

    def model(self) -> nn.Module:
        """Return a decoder that takes bytes and scores the next byte."""
        return Decoder(self.width, self.layers, self.heads, self.context)

    def transform(self, batch: Batch, training: bool) -> Batch:
        """Convert tokens to the type that the embedding wants.

        Args:
            batch: With ``tokens`` of shape (n, context + 1), uint8.
            training: Makes no difference.
        """
        return batch.replace(tokens=batch["tokens"].long())

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the cross entropy of each next byte, in nats, and the same in bits.

        Args:
            model: The decoder.
            batch: With ``tokens`` of shape (n, context + 1), int64.
        """
        tokens = batch["tokens"]
        scores = model(tokens[:, :-1])
        loss = F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())
        return loss, {"bits_per_byte": loss.detach() / math.log(2)}


class Decoder(nn.Module):
    """A transformer decoder: pre-norm blocks with learned positions and tied embeddings."""

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return scores of the next byte: tokens of shape (n, length) to (n, length, 256)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


class Block(nn.Module):
    """A transformer block: causal attention, then a perceptron, each with a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the block to (n, length, width), whose shape is kept."""
        n, length, width = x.shape
        q, k, v = (
            part.view(n, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(width, dim=2)
        )
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.transpose(1, 2).reshape(n, length, width))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out
