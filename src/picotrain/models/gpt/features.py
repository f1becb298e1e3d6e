"""What today's fastest recipes add to the plain model, each behind a switch of the `model` section, all off by default.

value embeddings    every other layer adds a row of a table of its own, by token, to the values (arXiv:2410.17897, gated as in nanochat)
residual scalars    layer i reads a x + b x0, x0 being the embedding; a and b are learned (modded-nanogpt)
smear               a gated share of the token before is added to each embedding (modded-nanogpt): bigrams without attention
qk_scale            attention logits are multiplied by it: normed queries and keys alone cannot make attention sharp
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from picotrain.model.layers import Linear


class Smear(nn.Module):
    """x_t + strength sigmoid(gate(x_t)) x_{t-1}; starts as the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.gate = Linear(channels, 1)
        self.strength = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, previous: Tensor) -> Tensor:
        """x and what stands before each token, zero where nothing does: (B, T, C)."""
        gate = torch.sigmoid(self.gate(x[..., : self.gate.in_features]))  # (B, T, 1)
        return x + self.strength.to(x.dtype) * gate * previous


class ResidualScalars(nn.Module):
    """The factors of the residual stream and of the embedding at the entry of each layer: (depth,) each."""

    def __init__(self, depth: int):
        super().__init__()
        self.stream = nn.Parameter(torch.empty(depth))
        self.embedding = nn.Parameter(torch.empty(depth))
