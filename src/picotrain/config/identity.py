"""Which configs are the same experiment, what its run is called, and what a resume may change."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, Literal

from picotrain.config.keys import leaves
from picotrain.config.schema import Config

Change = Literal["free", "rounding", "announced", "refused"]

# What changing a key does to a run that is resumed; the longest entry that begins a key holds.
#   free: the losses stay the same to the bit     rounding: the same rows, sums in another order
#   announced: allowed, as a changed experiment   refused: another run
_CHANGES: dict[str, Change] = {
    "schema_version": "refused",
    "run": "free",
    "run.seed": "refused",
    "model": "refused",
    "data": "refused",
    "data.path": "free",  # a corpus that has moved; its fingerprint tells another one
    "data.on_bad_shard": "free",
    "data.cache_bytes": "free",
    "data.licence": "free",  # words
    "data.shard_text_bytes": "free",  # an estimate; what follows from it is data.num_shards
    "tokenizer": "refused",
    "tokenizer.path": "free",  # as above
    "tokenizer.encoder": "free",  # identical ids
    "optimizer": "announced",
    "optimizer.kind": "refused",
    "schedule": "announced",
    "train": "announced",  # the horizon, grad_clip
    "train.seq_len": "refused",
    "train.total_batch_size": "refused",
    "train.device_batch_size": "rounding",
    "train.precision": "rounding",
    "train.deterministic": "rounding",
    "train.eval_every": "free",
    "train.eval_tokens": "free",
    "train.core_metric_every": "free",
    "train.core_metric_max_per_task": "free",
    "train.sample_every": "free",
    "train.save_every": "free",
    "train.max_skipped": "free",
    "hardware": "rounding",
    "parallel": "rounding",
    "launch": "rounding",
    "checkpoint": "free",
    "archive": "free",
    "evaluation": "free",
    "evaluation.bpb": "rounding",
    "sampling": "free",
    "logger": "free",
    "profiler": "free",
}


def classify_change(key: str) -> Change:
    """What changing a dotted key does to a run that is resumed."""
    while key not in _CHANGES:
        key, dot, _ = key.rpartition(".")
        if not dot:
            raise KeyError(f"no entry for {key!r}: add it to _CHANGES")
    return _CHANGES[key]


def flatten(config: Config) -> dict[str, Any]:
    """Every value by its dotted key, in the schema's order."""
    tree = config.model_dump()
    return {key: _value(tree, key) for key in leaves(type(config))}


def _value(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def diff(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """The keys in which two configs differ, with both values."""
    before, after = flatten(a), flatten(b)
    both = dict.fromkeys([*before, *after])  # parts of different kinds have different keys
    return [(key, before.get(key), after.get(key)) for key in both if before.get(key) != after.get(key)]


def experiment_hash(config: Config) -> str:
    """8 hex digits for what makes the experiment: every key whose change a resume announces or refuses, and where
    its text and vocabulary come from. Hardware, cadence, names and the like do not count."""
    values = {key: value for key, value in flatten(config).items() if makes_experiment(key)}
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def makes_experiment(key: str) -> bool:
    """Whether a dotted key counts in `experiment_hash`."""
    if key == "schema_version":
        return False
    return key in ("data.path", "tokenizer.path") or classify_change(key) in ("announced", "refused")


def run_name(config: Config) -> str:
    """The default name of a run, fit for a folder: model, data and the hash of the experiment, e.g. d4-pystdlib-1f0e55ac."""
    data = re.sub(r"[^\w.-]+", "-", config.data.name).strip(".-") or "data"
    return f"{config.model.label}-{data}-{experiment_hash(config)}"
