"""logger.trackers=tensorboard: event files in the run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from picotrain.metrics import scalars


class TensorBoard:
    """Event files under `<run>/tensorboard`."""

    package, sends = "tensorboard", ""

    def __init__(self, run_dir: Path, config: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"))

    def log(self, record: dict[str, Any]) -> None:
        step = record["step"]
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, step)
        for i, sample in enumerate(record.get("samples", ())):
            self._writer.add_text(f"sample/{i}", sample["prompt"] + sample["text"], step)

    def close(self) -> None:
        self._writer.close()
