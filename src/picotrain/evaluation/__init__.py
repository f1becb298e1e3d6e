"""Weights in, numbers out: bits per byte here, the CORE metric in `picotrain.evaluation.core`.

bundle   the tasks and examples of an evaluation bundle; `fetch` gets one
prompts  examples -> prompts -> token ids of which a span is scored
scorer   token ids -> the loss and the likeliest tokens of each span
core     a task's accuracy, shared among ranks; the metric over tasks
"""

from picotrain.evaluation.bpb import Bpb, Rows, bits_per_byte
from picotrain.evaluation.together import EvaluationFailed

__all__ = ["Bpb", "EvaluationFailed", "Rows", "bits_per_byte"]
