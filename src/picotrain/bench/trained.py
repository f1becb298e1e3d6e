"""The model that a run has trained, for benchmarks of what comes after."""

from __future__ import annotations

from pathlib import Path

import torch

from picotrain import checkpoint
from picotrain.model import GPT, compute_dtype
from picotrain.run import Material, read_material
from picotrain.state import load_model_tensors


def model_of(run_dir: Path, dtype: torch.dtype | None = None) -> tuple[Material, GPT]:
    """The material of a run, and the model of its last checkpoint, on the CPU, in the dtype it computes in (None: the run's own)."""
    material = read_material(run_dir)
    plan = material.plan
    dtype = dtype or compute_dtype(plan.precision)
    model = GPT(material.config.model, plan.vocab_size, plan.seq_len, dtype)
    load_model_tensors(model, checkpoint.load_tensors(checkpoint.find(run_dir / "checkpoints", "last"), "model"))
    return material, model.to(dtype)
