"""What models share: the decoder, its layers, kernels, cache and loss. The architectures are in `picotrain.models`.

Precision: weights, logits and loss are fp32. `Linear` casts its weight to `compute_dtype`, and the model casts the embedding's
output. There is no autocast. `build` gives a model that trains in fp8 or keeps fewer activations. `float8` and `recompute` say how.
"""

from __future__ import annotations

from picotrain import first_calls
from picotrain.model.adapted import adapted, flaw
from picotrain.model.cache import KVCache
from picotrain.model.decoder import Decoder, LanguageModel
from picotrain.model.kernels import Names
from picotrain.model.layers import rms_norm, rotate
from picotrain.model.masks import attention_mask
from picotrain.model.training import DTYPES, build, compute_dtype

__all__ = [
    "DTYPES", "Decoder", "KVCache", "LanguageModel", "Names", "adapted", "attention_mask", "build", "compute_dtype", "flaw", "rms_norm",
    "rotate",
]  # fmt: skip

first_calls.settle()  # whoever has a model has imported this
