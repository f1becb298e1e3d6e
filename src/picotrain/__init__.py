"""picotrain: one resolved config trains a small language model. From Python: `picotrain.api`, whose names stand here, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from picotrain.api import Loaded, Trained, compose, evaluate, generate, load, plan, train
    from picotrain.config import Config
    from picotrain.errors import ConfigError, PicotrainError
    from picotrain.planning import Plan

__version__ = "0.1.0"
__all__ = [
    "Config", "ConfigError", "Loaded", "PicotrainError", "Plan", "Trained", "compose", "evaluate", "generate", "load", "plan", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """What is exported, imported when it is asked for: `picotrain --help` needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'picotrain' has no attribute {name!r}")
    from picotrain import api

    return getattr(api, name)
