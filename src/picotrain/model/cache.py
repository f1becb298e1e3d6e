"""Keys and values of tokens that were read already, so that each is computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from picotrain.model.decoder import Decoder


class LayerCache:
    """Keys and values (B, H_kv, max_len, D) of one layer; the first `length` positions are filled."""

    def __init__(self, size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.k = torch.empty(size, dtype=dtype, device=device)
        self.v = torch.empty(size, dtype=dtype, device=device)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take in k and v (B, H_kv, T, D); return all keys and values so far."""
        start, end = self.length, self.length + k.size(2)
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class KVCache:
    """The keys and values of `batch` rows of up to `max_len` tokens (at most the model's seq_len). Each is computed once.

    `more`: room for this many tokens of `Decoder.branches`. Their positions are not their places in the cache.
    """

    def __init__(self, model: Decoder, batch: int, max_len: int, more: int = 0):
        if max_len > model.seq_len:
            raise ValueError(f"a cache of {max_len} tokens for a model of {model.seq_len}")
        self.max_len = max_len + more
        self.ids = torch.empty((batch, self.max_len), dtype=torch.int64, device=model.embed.weight.device)
        size = (batch, model.dims.n_kv_heads, self.max_len, model.dims.head_dim)
        self.layers = [LayerCache(size, model.compute_dtype, model.embed.weight.device) for _ in model.blocks]

    @property
    def length(self) -> int:
        """How many tokens are in."""
        return self.layers[0].length

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        for layer in self.layers:
            layer.length = 0
