"""logger.trackers=wandb: Weights & Biases."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from picotrain.metrics import scalars


class WeightsAndBiases:
    """One of their runs per run here: its id is kept in `<run>/wandb_id.txt`, so that a resume goes on in the same one."""

    package, sends = "wandb", "config and metrics to Weights & Biases"

    def __init__(self, run_dir: Path, config: dict[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        name = (config.get("run") or {}).get("name") or run_dir.name
        self._run = wandb.init(
            project="picotrain", name=name, id=id_file.read_text().strip(), resume="allow", dir=str(run_dir), config=dict(config)
        )
        # Our own step is the axis: wandb's may not go back, which a resume does.
        self._run.define_metric("*", step_metric="step")

    def log(self, record: dict[str, Any]) -> None:
        values = scalars(record)
        if values:
            self._run.log({"step": record["step"], **values})

    def close(self) -> None:
        self._run.finish()
