"""The model: a decoder-only GPT as one plain nn.Module.

    ids -> embed -> norm -> [x + attn(norm(x)), x + mlp(norm(x))] per block -> norm -> head -> soft-cap -> logits

With windows off it is, definition by definition, NanoChat of `transformers`: rotary positions and then a norm on queries
and keys, ReLU-squared MLP, RMSNorm without weights (also after the embedding), no biases, an untied head whose logits
are capped by a tanh. The names of its parameters are the names in a checkpoint.

Precision: weights are fp32; `Linear` casts its weight, and `GPT` the embedding's output, to `compute_dtype`. Logits and
loss are fp32. There is no autocast. `build` gives a model that trains in fp8 or keeps fewer activations; `float8` and
`recompute` say how. Shapes: B rows, T tokens, C width, H heads, D head_dim, V padded vocabulary.
"""

from __future__ import annotations

from picotrain import first_calls
from picotrain.model.cache import KVCache
from picotrain.model.gpt import GPT
from picotrain.model.kernels import Names
from picotrain.model.layers import rms_norm, rotate
from picotrain.model.masks import attention_mask
from picotrain.model.training import DTYPES, build, compute_dtype

__all__ = ["DTYPES", "GPT", "KVCache", "Names", "attention_mask", "build", "compute_dtype", "rms_norm", "rotate"]

first_calls.settle()  # whoever has a model has imported this
