"""Checkpoints: open formats, written under a temporary name and renamed when whole, verified before they are used.

    checkpoints/step_00001000/
      model-00001-of-00001.safetensors + model.safetensors.index.json    weights, as `transformers` shards them
      optimizer-00001-of-00001.safetensors + optimizer.safetensors.index.json
      state.json       step, loader lanes, loop state, RNG, length of metrics.jsonl
      manifest.json    size and xxh3 hash of every file above; written last
      metrics.json     what was measured at this step after the save; outside the manifest
    checkpoints/latest, checkpoints/best    one-line text files naming a step directory

A folder whose manifest is missing or does not match is not a checkpoint. Nothing that is loaded is a pickle.
"""

from picotrain.checkpoint.folder import (
    PREFIX,
    complete,
    find,
    is_whole,
    newest,
    read_metrics,
    read_state,
    record_metrics,
    require_parts,
    step_dir,
    verify,
    write_pointer,
)
from picotrain.checkpoint.retain import is_rolling
from picotrain.checkpoint.saver import Saved, Saver, save
from picotrain.checkpoint.store import load, load_tensors, require_fits

__all__ = [
    "PREFIX",
    "Saved",
    "Saver",
    "complete",
    "find",
    "is_rolling",
    "is_whole",
    "load",
    "load_tensors",
    "newest",
    "read_metrics",
    "read_state",
    "record_metrics",
    "require_fits",
    "require_parts",
    "save",
    "step_dir",
    "verify",
    "write_pointer",
]
