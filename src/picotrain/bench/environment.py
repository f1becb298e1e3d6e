"""Where figures were measured: versions, hardware, threads, clocks, the commit. No torch."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

from picotrain import run as runs
from picotrain.config import compose
from picotrain.hardware import Machine

# What nvidia-smi is asked for: key -> its name for it.
FIXED = {
    "driver": "driver_version", "max_sm_mhz": "clocks.max.sm", "max_memory_mhz": "clocks.max.mem", "power_limit_w": "power.limit",
    "memory_total_mib": "memory.total",
}  # fmt: skip
STATE = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "power_w": "power.draw", "temperature_c": "temperature.gpu"}


def environment(machine: Machine) -> dict[str, Any]:
    """As a run's environment.json has it, and what figures depend on besides: cores, load, clocks, commit."""
    config = runs.resolve(compose(["data=pystdlib", f"hardware.device={machine.device}", "hardware.nproc_per_node=1"]))
    found: dict[str, Any] = runs.environment(config)
    memory = {"memory_bytes": machine.memory_bytes, "fast_bf16": machine.fast_bf16}
    found["hardware"] |= {"cores": machine.cores, **memory, "load_1m": round(os.getloadavg()[0], 2)}
    if machine.device == "cuda":
        found["gpu"] = gpu(FIXED | STATE)
    return found


def gpu(fields: dict[str, str], meanwhile: Callable[[], object] = lambda: time.sleep(0.01)) -> dict[str, Any]:
    """What nvidia-smi says of the GPU that is used, {} without it. `meanwhile` is called again and again until it has answered:
    clocks and power are of interest under load."""
    which = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "-i", which, f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return {}
    while process.poll() is None:
        meanwhile()
    values = process.communicate()[0].strip().split(", ")
    return dict(zip(fields, map(_number, values), strict=True)) if len(values) == len(fields) else {}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
