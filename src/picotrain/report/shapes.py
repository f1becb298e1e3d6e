"""What a report wants of a run's files: which keys it counts, compares or formats, and as what. Other keys are shown as they are.

Each may be missing or null: a report is written of runs in any state, by any version. The models with which a run itself reads its files
refuse a whole file for one wrong value.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, create_model

Count = Annotated[int, Field(strict=True, ge=0, le=2**53)]
Number = Annotated[float, Field(strict=True, ge=-1e30, le=1e30, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]


def _shape(counts: str = "", numbers: str = "", texts: str = "", **others: Any) -> type[BaseModel]:
    kinds: dict[str, Any] = dict(others)
    for names, kind in ((counts, Count), (numbers, Number), (texts, Text)):
        kinds |= dict.fromkeys(names.split(), kind)
    return create_model("Shape", **{key: (kind | None, None) for key, kind in kinds.items()})  # pyright: ignore[reportCallIssue, reportArgumentType]


ANY = _shape()
SAMPLE = _shape(texts="prompt text")
TASK = _shape("n", "accuracy centered stderr")
CORE = _shape(numbers="core_metric", tasks=dict[str, TASK])
LINE = _shape(  # of metrics.jsonl
    "step tokens",
    "loss smooth_loss lr grad_norm tok_per_sec mfu dt_ms data_wait_ms total_training_time_s epoch val_bpb val_loss core_metric seconds",
    "kind name time message path",
    samples=list[SAMPLE],
    source_tokens=dict[str, Count],
    source_epochs=dict[str, Number],
    tasks=dict[str, TASK],
    profiled=bool,
)
PLAN = _shape(
    "num_steps total_batch_size flops_per_token seq_len vocab_size depth width n_heads n_kv_heads head_dim device_batch_size dp_size "
    "grad_accum_steps world_size",
    "bytes_per_token",
    "name",
    parameters=dict[str, Count],
    notes=list[Text],
)
DATA = _shape(corpus=dict[str, Any], tokenizer=dict[str, Any])
CONFIG = _shape(run=dict[str, Any], data=dict[str, Any], sampling=_shape(prompts=list[str]))
SCORE = _shape(numbers="val_bpb")  # metrics.json of a checkpoint
MANIFEST = _shape(files=dict[str, _shape("bytes")])
EVAL = _shape("step", "val_loss", bpb=_shape(numbers="val train", by_source=Any), core=CORE)  # results.json of an evaluation
