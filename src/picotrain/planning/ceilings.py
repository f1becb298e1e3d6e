"""How fast this machine multiplies matrices, measured once by `picotrain.cli.estimate` and kept in the cache folder. No torch.

A ceiling holds for the device, threads, precision and version of torch that it was measured with. Of several the newest counts. Where
other processes computed meanwhile, that is said, and a later plan measures again.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from picotrain import hardware
from picotrain.config.schema import Config
from picotrain.disk import parse_json, read_plain

FILE = "ceilings.jsonl"


class Ceiling(BaseModel):
    """FLOPs per second of torch.mm on one device. `setting` names what it holds for; `busy`: the load, where others computed."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    setting: str
    gflops: Annotated[float, Field(gt=0, lt=1e12, allow_inf_nan=False)]
    busy: str = ""


def is_here(config: Config) -> bool:
    """Whether a decided config is for a device of this machine."""
    hw = config.hardware
    machine = hardware.cpu() if hw.device == "cpu" else hardware.detect()
    return hw.device == machine.device and hw.name == machine.name


def setting(config: Config) -> str:
    """What a ceiling must have been measured with to hold for a decided config on this machine."""
    hw = config.hardware
    device = [hardware.cpu_identity(), f"{hw.threads} threads"] if hw.device == "cpu" else [hw.name or hw.device]
    return ", ".join([*device, precision(config), f"torch {_torch_version()}"])


def precision(config: Config) -> str:
    """Of the matmuls to measure: the config's, bf16 for fp8."""
    return "fp32" if config.train.precision == "fp32" else "bf16"


def find(config: Config) -> Ceiling | None:
    """The newest ceiling of this machine for a decided config; None: there is none, or the config is for another machine."""
    if not config.run.cache_dir or not is_here(config):
        return None
    try:
        lines = read_plain(Path(config.run.cache_dir) / FILE).splitlines()
    except OSError:
        return None
    wanted = setting(config)
    return next((found for line in reversed(lines) if (found := _read(line)) and found.setting == wanted), None)


def _read(line: bytes) -> Ceiling | None:
    try:
        return Ceiling.model_validate(parse_json(line))
    except (ValueError, ValidationError):
        return None


def _torch_version() -> str:
    """Without importing it."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
