"""What the scripts share. They import it before torch, which reads how threads are to wait when it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from picotrain import hardware
from picotrain.bench import script as script

if TYPE_CHECKING:
    import torch

    from picotrain.models.gpt.module import GPT
    from picotrain.run import Material

hardware.wait_briefly()


def model_of(run_dir: Path, dtype: torch.dtype | None = None) -> tuple[Material, GPT]:
    """The material of a run, and the model of its last checkpoint, on the CPU, in the dtype it computes in (None: the run's own)."""
    from picotrain import checkpoint
    from picotrain.model import compute_dtype
    from picotrain.models.gpt.module import GPT
    from picotrain.run import read_material
    from picotrain.state import load_model_tensors

    material = read_material(run_dir)
    plan = material.plan
    dtype = dtype or compute_dtype(plan.precision)
    model = material.config.model.build(plan.vocab_size, plan.seq_len, dtype)
    assert isinstance(model, GPT)
    load_model_tensors(model, checkpoint.load_tensors(checkpoint.find(run_dir / "checkpoints", "last"), "model"))
    return material, model.to(dtype)
