"""A run directory mirrored to a URL in the background (`Archive`), and fetched back on an empty machine (`restore`).

    archive.json    whose archive it is: {run_id, name, host, pid, time}; written first. The run directory has the same file
    config.yaml, plan.json, ..., metrics.jsonl, report.md, attempts/, eval/, profile/      as in the run directory
    checkpoints/step_*/     the manifest is the last file to arrive and the first to go: what is not whole does not look whole
    checkpoints/latest, checkpoints/best    name whole ones

The store may be any that fsspec can write: `s3://`, `gs://`, `hf://datasets/...`, `sftp://`, `file://`.
"""

from picotrain.checkpoint.archive.mirror import FAILED, WORKS, Archive, Note
from picotrain.checkpoint.archive.probe import check, probe
from picotrain.checkpoint.archive.restore import restore

__all__ = ["FAILED", "WORKS", "Archive", "Note", "check", "probe", "restore"]
