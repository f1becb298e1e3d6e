"""Tables for the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from picotrain import hardware
from picotrain.config import Config
from picotrain.data.corpus import Corpus
from picotrain.data.units import default_unit_bytes, units
from picotrain.plan import Plan
from picotrain.text import brief, short, size

UNKNOWN = "not known yet"
RECOMPUTED = {
    "none": "",
    "selective": "norms, rotations and the like, in the backward; results of matmuls and attention are kept (selective)",
    "full": "every block, in the backward; only what enters it is kept (full)",
}
PIPE_WIDTH = 200  # columns where there is no terminal: nobody wants lines broken for a pager or a log


def console() -> Console:
    """For standard output: as wide as the terminal, or as PIPE_WIDTH."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def _grid(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", min_width=18)
    table.add_column()
    return table


def plan_table(plan: Plan, measure: str = "") -> None:
    """The plan, one fact a line. measure: the command that measures its step, shown where the time is unknown."""
    p = plan.parameters
    kv = "" if plan.n_kv_heads == plan.n_heads else f", {plan.n_kv_heads} key-value heads"
    batch = f"{plan.device_batch_size} rows x {plan.seq_len} tokens x {plan.dp_size} ranks x {plan.grad_accum_steps} accumulation steps"
    units_text = UNKNOWN if plan.num_units is None else f"{plan.lanes} lanes over {plan.num_units} units of >= {size(plan.unit_bytes)}"
    counted = ", estimated from the bytes of the text" if plan.epoch_rows is None else f" of {plan.epoch_rows:,} rows each"
    epochs = UNKNOWN if plan.epochs is None else f"{plan.epochs:.2f}{counted}"
    unknown = f"{UNKNOWN}; `{measure}` measures it, then plan tells the time" if measure else UNKNOWN
    time = _time(plan) if plan.predicted_step_ms else unknown
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
        "horizon": f"{plan.num_steps:,} steps, {plan.total_tokens:,} tokens (set by {plan.horizon})",
        "epochs": epochs,
        "sources": ", ".join(f"{name} {passes:.2f} passes" for name, passes in plan.sources.items()),
        "data stream": units_text,
        "peak rates": rates,
        "checkpoint": size(plan.checkpoint_bytes),
        "memory per rank": f"about {size(plan.predicted_memory_bytes)} = {held}{staging}",
        "time and cost": time + cost,
    }
    table = _grid(plan.name)
    for key, value in rows.items():
        if value:
            table.add_row(key, value)
    out = console()
    out.print(table)
    for note in plan.notes:
        out.print(f"note: {note}", style="yellow" if note.startswith("warning") else "dim", markup=False)


def _attention(plan: Plan) -> str:
    """The kernels, or that the first start will choose them."""

    def kernel(name: str, order: tuple[str, ...]) -> str:
        return f"the first of {', '.join(order)} that works, which the first start finds out" if name == "auto" else name

    full = kernel(plan.attention, hardware.attention_kernels(plan.device))
    if plan.window_attention is None:
        return full
    return f"{full}; in windows {kernel(plan.window_attention, hardware.window_kernels(plan.device))}"


def _time(plan: Plan) -> str:
    """Of a step and of all of them, and from what it is known."""
    step_s, hours = (plan.predicted_step_ms or 0) / 1000, plan.predicted_hours or 0
    whole = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
    source = f"assuming {plan.predicted_from}" if plan.predicted_by == "assumed" else f"from {plan.predicted_from}"
    return f"about {brief(step_s)} a step, {short(plan.total_batch_size / step_s)} tokens/s, {whole} ({source})"


def corpus_table(corpus: Corpus, config: Config) -> None:
    """A corpus' shards, documents and bytes."""
    found = units(corpus.shards, config.data.unit_bytes or default_unit_bytes(config.train.seq_len or 512))
    table = _grid(corpus.name)
    table.add_row("folder", str(corpus.root))
    table.add_row("training", f"{len(corpus.shards)} shards, {corpus.documents:,} documents, {size(corpus.text_bytes)} of text")
    table.add_row("validation", f"{corpus.val.name}, {corpus.val.rows:,} documents, {size(corpus.val.text_bytes)} of text")
    table.add_row("units", f"{len(found)} at seq_len {config.train.seq_len}")
    table.add_row("fingerprint", corpus.fingerprint)
    console().print(table)
