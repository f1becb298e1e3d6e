"""What a run shows and keeps while it trains: metrics.jsonl, the console, trackers, and the meters behind them."""

from picotrain.metrics import MetricsFile, read_metrics
from picotrain.monitor.console import Console
from picotrain.monitor.meters import Pace, Smoother, mfu
from picotrain.monitor.monitor import Monitor
from picotrain.monitor.trackers import build_trackers, missing_trackers

__all__ = ["Console", "MetricsFile", "Monitor", "Pace", "Smoother", "build_trackers", "mfu", "missing_trackers", "read_metrics"]
