"""A decoder-only transformer over the bytes of a text, made to be divided over a mesh of ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hpctrain.data.batch import Batch
from hpctrain.errors import Error
from hpctrain.tasks.task import Loss, Task

VOCABULARY = 256
"""Bytes."""


@dataclass
class Gpt(Task):
    """A decoder-only transformer over bytes (Radford et al., "GPT-2", 2019).

    Its data are a text, as charlm's: `hpctrain data import corpus.txt shards/`.
    """

    width: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 1024
    tied: bool = True
    """Whether the embedding of bytes and the output layer are one parameter."""

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
        """Return the model, which scores the next byte: embedding, blocks, and head in sequence."""
        if self.width % self.heads:
            raise Error(
                f"options.width = {self.width} is no multiple of options.heads = {self.heads}.",
                hint="each head has width / heads features.",
            )
        embedding = Embedding(self.width, self.context)
        head = Head(self.width)
        if self.tied:
            head.output.weight = embedding.tokens.weight
        scale = (2 * self.layers) ** -0.5
        blocks = [Block(self.width, self.heads, scale) for _ in range(self.layers)]
        return nn.Sequential(embedding, *blocks, head)

    def parallelize(self, model: nn.Module) -> Mapping[str, Any]:
        """Divide attention by heads, and perceptrons by hidden features; the rest is replicated."""
        from hpctrain.mesh.styles import attention, mlp

        plan: dict[str, Any] = {}
        for n in range(1, self.layers + 1):
            plan |= attention(f"{n}.attention", qkv="qkv", out="out", heads=self.heads)
            plan |= mlp(f"{n}.mlp", up="0", down="2")
        return plan

    def transform(self, batch: Batch, training: bool) -> Batch:
        """Convert tokens to int64, which the embedding takes.

        Args:
            batch: With ``tokens``, (n, context + 1), bytes.
            training: Makes no difference.
        """
        return batch.replace(tokens=batch["tokens"].long())

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Return the cross entropy of each next byte, in nats, and the same in bits.

        Args:
            model: Scores the byte after each.
            batch: With ``tokens``, (n, length + 1): inputs, and targets one place on.
        """
        tokens = batch["tokens"]
        scores = model(tokens[:, :-1])
        loss = F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())
        return loss, {"bits_per_byte": loss.detach() / math.log(2)}


class Embedding(nn.Module):
    """Bytes and their positions as vectors.

    Args:
        width: Of the vectors.
        context: The longest text.
    """

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embed bytes and their positions: from (n, length) to (n, length, width)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        found: torch.Tensor = self.tokens(tokens) + self.positions(positions)
        return found


class Attention(nn.Module):
    """Causal attention with one projection for queries, keys and values.

    It computes as many heads as come out of that projection, so that it may be divided by heads.

    Args:
        width: Of the vectors.
        heads: That they are divided into.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.features = width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Let each place attend to itself and those before; (n, length, width) is kept."""
        fused = self.qkv(x)
        parts = fused.unflatten(2, (3, fused.shape[2] // (3 * self.features), self.features))
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: torch.Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return found


class Block(nn.Module):
    """Attention, then a perceptron, each beside a path that skips it.

    Args:
        width: Of the vectors.
        heads: Of the attention.
        scale: Of the start values of what is added to the skipping path.
    """

    def __init__(self, width: int, heads: int, scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                last = name in ("attention.out.weight", "mlp.2.weight")
                nn.init.normal_(parameter, std=0.02 * (scale if last else 1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add attention and perceptron to the residual stream; (n, length, width) is kept."""
        x = x + self.attention(self.norm1(x))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class Head(nn.Module):
    """Scores of the next byte.

    Args:
        width: Of the vectors.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.output.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Score the next byte at each place: from (n, length, width) to (n, length, 256)."""
        found: torch.Tensor = self.output(self.norm(x))
        return found
