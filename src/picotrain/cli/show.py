"""Facts for the terminal."""

from __future__ import annotations

from picotrain import hardware
from picotrain.cli.estimate import told_by
from picotrain.config import Config
from picotrain.data.corpus import Corpus
from picotrain.data.units import default_unit_bytes, units
from picotrain.planning import Plan
from picotrain.terminal import Printer
from picotrain.text import brief, duration, several, short, size

UNKNOWN = "not known yet"
RECOMPUTED = {
    "none": "",
    "selective": "norms, rotations and the like, in the backward; results of matmuls and attention are kept (selective)",
    "full": "every block, in the backward; only what enters it is kept (full)",
}


def plan_table(plan: Plan, measure: str = "", here: bool = True) -> None:
    """The plan, one fact a line. measure: the command that measures its step, shown where the time is unknown or assumed; here: whether
    the plan is for this machine."""
    p = plan.parameters
    kv = "" if plan.n_kv_heads == plan.n_heads else f", {plan.n_kv_heads} key-value heads"
    batch = " x ".join(
        several(count, what)
        for count, what in (
            (plan.device_batch_size, "row"),
            (plan.seq_len, "token"),
            (plan.dp_size, "rank"),
            (plan.grad_accum_steps, "accumulation step"),
        )
    )
    units_text = (
        UNKNOWN
        if plan.num_units is None
        else f"{several(plan.lanes or 0, 'lane')} over {several(plan.num_units, 'unit')} of >= {size(plan.unit_bytes)}"
    )
    guessed = f" (estimated from {plan.text_estimate})" if plan.text_estimate else ""
    about = "about " if guessed and plan.horizon == "train.num_train_epochs" else ""
    text = f" over {size(plan.text_bytes)} of text" if plan.text_bytes else ""
    counted = "" if plan.epoch_rows is None else f", {plan.epoch_rows:,} rows each"
    epochs = UNKNOWN if plan.epochs is None else f"{plan.epochs:.2f}{text}{counted}{guessed}"
    measures = f"; `{measure}` measures it{'' if here else ' there'}" if measure and plan.predicted_by != "measured" else ""
    time = _time(plan, measures) if plan.predicted_step_ms else f"{UNKNOWN}: {plan.predicted_from}{measures}"
    cost = "" if plan.predicted_cost is None else f", about ${plan.predicted_cost:,.0f}"
    parts = " + ".join(f"{n:,} {part.replace('_', ' ')}" for part, n in p.items() if part != "total")
    rates = f"matrices {plan.matrix_lr:.2g}, embedding {plan.embed_lr:.2g}, head {plan.head_lr:.2g}; weight decay {plan.weight_decay:.2g}"
    held = " + ".join(f"{size(n)} {part}" for part, n in plan.predicted_memory.items())
    staging = f"; and {size(plan.staging_bytes)} of host memory for background saves (rank 0)" if plan.device != "cpu" else ""
    rows = {
        "model": f"depth {plan.depth}, width {plan.width}, {plan.n_heads} heads of {plan.head_dim}{kv}, vocabulary {plan.vocab_size:,}",
        "parameters": f"{p['total']:,} = {parts}",
        "FLOPs per token": f"{plan.flops_per_token:,}",
        "hardware": f"{plan.world_size} x {plan.hardware_name} ({plan.device}), {plan.precision}{', compiled' if plan.compile else ''}",
        "attention": _attention(plan),
        "recomputed": RECOMPUTED[plan.recompute],
        "batch": f"{plan.total_batch_size:,} tokens = {batch}",
        "horizon": f"{about}{several(plan.num_steps, 'step')}, {plan.total_tokens:,} tokens (set by {plan.horizon})",
        "epochs": epochs,
        "sources": ", ".join(f"{name} {passes:.2f} passes" for name, passes in plan.sources.items()),
        "licence": "; ".join(f"{name}: {licence}" for name, licence in plan.licences.items()),
        "data stream": units_text,
        "peak rates": rates,
        "checkpoint": size(plan.checkpoint_bytes),
        "memory per rank": f"about {size(plan.predicted_memory_bytes)} = {held}{staging}",
        "time and cost": time + cost,
    }
    out = Printer()
    out.facts({key: value for key, value in rows.items() if value}, plan.name)
    for note in plan.notes:
        warns = note.startswith("warning")
        out.message(note if warns else f"note: {note}", "yellow" if warns else "dim")


def _attention(plan: Plan) -> str:
    """The kernels, or that the first start will choose them."""

    def kernel(name: str, order: tuple[str, ...]) -> str:
        return f"the first of {', '.join(order)} that works, which the first start finds out" if name == "auto" else name

    full = kernel(plan.attention, hardware.attention_kernels(plan.device))
    if plan.window_attention is None:
        return full
    return f"{full}; in windows {kernel(plan.window_attention, hardware.window_kernels(plan.device))}"


def _time(plan: Plan, measures: str) -> str:
    """Of a step and of all of them with their validations, and from what it is known."""
    step_s, source = (plan.predicted_step_ms or 0) / 1000, told_by(plan)
    whole = (
        f"{duration(3600 * plan.predicted_hours)} in all" if plan.predicted_hours else "for a number of steps that follows from the corpus"
    )
    validation = f", {brief(plan.predicted_eval_s)} a validation" if plan.predicted_eval_s else ""
    return f"about {brief(step_s)} a step, {short(plan.total_batch_size / step_s)} tokens/s{validation}, {whole} ({source}{measures})"


def corpus_table(corpus: Corpus, config: Config) -> None:
    """A corpus' shards, documents and bytes."""
    found = units(corpus.shards, config.data.unit_bytes or default_unit_bytes(config.train.seq_len or 512))
    rows = {
        "folder": str(corpus.root),
        "training": f"{several(len(corpus.shards), 'shard')}, {several(corpus.documents, 'document')}, {size(corpus.text_bytes)} of text",
        "validation": f"{corpus.val.name}, {several(corpus.val.rows, 'document')}, {size(corpus.val.text_bytes)} of text",
        "units": f"{len(found)} at seq_len {config.train.seq_len}",
        "fingerprint": corpus.fingerprint,
    }
    Printer().facts(rows, corpus.name)
