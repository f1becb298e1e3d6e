"""The trackers of a run: `picotrain.trackers` and those of other packages, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from picotrain import parts
from picotrain.contracts import Tracker
from picotrain.errors import ConfigError, Problem


def missing_trackers(names: Sequence[str]) -> list[Problem]:
    """One problem for each tracker that is unknown or whose package is not installed; imports no such package."""
    problems = []
    for name in names:
        if name not in parts.kinds("trackers"):
            problems.append(Problem("logger.trackers", f"no tracker is called {name!r}", f"one of {', '.join(parts.kinds('trackers'))}"))
        elif (package := parts.find("trackers", name, Tracker).package) and find_spec(package) is None:
            problems.append(Problem("logger.trackers", f"the package {package} is not installed", f"pip install 'picotrain[{package}]'"))
    return problems


def build_trackers(names: Sequence[str], run_dir: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of a run. Raises ConfigError for an unknown name, a missing package, or a tracker that does not start."""
    if problems := missing_trackers(names):
        raise ConfigError(problems)
    with ExitStack() as stack:  # where one does not start, those before it end
        trackers = [_start(name, run_dir, dict(config), stack) for name in names]
        stack.pop_all()
    return trackers


def _start(name: str, run_dir: Path, config: dict[str, Any], stack: ExitStack) -> Tracker:
    try:
        tracker = parts.find("trackers", name, Tracker)(run_dir, config)
        stack.callback(tracker.close)
        return tracker
    except Exception as error:  # third-party code: not logged in, no network, ...
        problem = Problem("logger.trackers", f"{name} does not start: {error}", "set it up, or leave it out")
        raise ConfigError([problem]) from error
