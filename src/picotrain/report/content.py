"""What a report says, once, as Markdown: the templates beside this file hold the words, this module the tables in them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picotrain.markdown import Markdown, cell, fence, table
from picotrain.report.facts import Record, Run, core_points
from picotrain.text import clock, several, short, size

if TYPE_CHECKING:
    from jinja2 import Environment

Summary = Mapping[str, Any]
MAX_ROWS = 12  # of a table by step; the whole is in metrics.jsonl
STATES = {
    "finished": "This run is finished",
    "stopped": "This run was stopped and can be resumed",
    "bad_data": "This run ended at text that cannot be read (see the events) and can be resumed",
    "diverged": "This run diverged: its loss is no longer finite",
    "running": "This run is still training",
    "interrupted": "This run was interrupted and can be resumed",
}
CONFIG_KEYS = ("run.seed", "optimizer", "schedule", "train.grad_clip", "train.device_batch_size", "parallel.kind", "hardware.compile")
LINE_END = "\0"  # within a code block while a page is put together; no text holds one


def render(run: Run, summary: Summary, pictures: Mapping[str, str]) -> str:
    """The whole page as Markdown; pictures: what stands for each kind ("learned", "course", "core") that there is."""
    return fill("report.md.j2", run=run, s=summary, pictures=pictures)


def fill(template: str, **values: Any) -> str:
    """A page of Markdown from a template. Every value is escaped, as a line of its own text."""
    text = re.sub(r"(?m)^[ \t]+|[ \t]+$", "", _templates().get_template(template).render(values))
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    text = re.sub(r"(?<=[^\n|])\n(?=[^\n|*>#<`])", " ", text)  # a paragraph is one line, as its text may be searched for
    return text.replace(LINE_END, "\n") + "\n"


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, finalize=cell, undefined=StrictUndefined
    )
    filters: dict[str, Any] = {function.__name__: function for function in (number, count, percent, short, several)} | {"fence": _fence}
    tables = (validations, evaluations, by_source, core_tasks, core_course, checkpoints, throughput, model, sources, data, config)
    texts = (*tables, environment, attempts, events, state, core_points, measured)
    names: dict[str, Any] = {function.__name__: function for function in texts}
    found.filters.update(filters)
    found.globals.update(names)
    return found


def _fence(text: str, language: str = "") -> Markdown:
    return Markdown(fence(text, language).replace("\n", LINE_END))


def state(s: Summary) -> str:
    """In one sentence, how far the run came."""
    share = f" of {s['num_steps']:,} ({100 * s['steps_done'] / s['num_steps']:.1f} %)" if s["num_steps"] else ""
    time = f", {clock(s['total_training_time_s'])} of training" if s["total_training_time_s"] else ""
    return f"{STATES[s['status']]}: {s['steps_done']:,} steps{share}, {short(s['tokens'])} tokens{time}."


def validations(run: Run, s: Summary) -> Markdown:
    best = s["best_val_step"]
    rows = [
        (count(v["step"]), number(v["val_bpb"]), number(v.get("val_loss")), "best" if v["step"] == best else "")
        for v in _thin([line for line in run.val if line.get("val_bpb") is not None], best)
    ]
    return table(("step", "val_bpb", "val_loss (nats per token)", ""), rows)


def evaluations(run: Run) -> Markdown:
    """What `picotrain eval` measured, by step."""
    scores = [(results, results.get("bpb") or {}) for results in run.evals]
    rows = [(count(r["step"]), number(b.get("val")), number(b.get("train")), number(r.get("val_loss"))) for r, b in scores if b]
    return table(("step", "val_bpb", "train_bpb", "val_loss (nats per token)"), rows)


def by_source(run: Run) -> Markdown:
    """The same by source, of the last evaluation."""
    found = [results["bpb"].get("by_source") for results in run.evals if results.get("bpb")][-1:]
    values = found[0] if found and isinstance(found[0], Mapping) else {}
    return table(("source", "val_bpb"), [(name, number(v) if isinstance(v, int | float) else v) for name, v in values.items()])


def _thin(lines: Sequence[Record], keep: int | None = None) -> list[Record]:
    """At most about MAX_ROWS lines, evenly spread; the first, the last and that at step `keep` always."""
    stride, last = -(-len(lines) // MAX_ROWS), len(lines) - 1
    return [line for i, line in enumerate(lines) if i % stride == 0 or i == last or line["step"] == keep]


def measured(tasks: Record) -> int:
    return sum(task.get("centered") is not None for task in tasks.values())


def core_tasks(tasks: Record) -> Markdown:
    figures = [
        (label, *(number(task.get(key)) for key in ("centered", "accuracy", "stderr")), count(task.get("n")))
        for label, task in tasks.items()
    ]
    return table(("task", "centered", "accuracy", "stderr", "examples"), figures)


def core_course(points: Sequence[Record]) -> Markdown:
    rows = [(count(point["step"]), number(point.get("core_metric"))) for point in _thin(points)]
    return table(("step", "CORE"), rows if len(rows) > 1 else [])


def checkpoints(run: Run) -> Markdown:
    rows = []
    for c in run.checkpoints:
        marks = ", ".join(mark for mark, name in (("best", run.best), ("latest", run.latest)) if name == c.name)
        saved = f"{c.seconds:.1f} s" if c.seconds is not None else ""
        files = c.problem or "whole: manifest and sizes agree"
        rows.append((f"checkpoints/{c.name}", count(c.step), size(c.bytes), saved, number(c.val_bpb), files, marks))
    return table(("folder", "step", "size", "saved in", "val_bpb", "files", ""), rows)


def throughput(s: Summary) -> Markdown:
    if s["median_tok_per_sec"] is None:
        return Markdown()
    return _facts(
        ("tokens per second, median", f"{s['median_tok_per_sec']:,.0f}"),
        ("MFU, median", percent(s["median_mfu"]) or "not known: the peak of this hardware is not known"),
        ("time per step, median", s["median_dt_ms"] is not None and f"{s['median_dt_ms']:,.1f} ms"),
        ("share of the time that waited for data", percent(s["data_wait_share"])),
        ("99th percentile of a step's wait for data", s["data_wait_p99_ms"] is not None and f"{s['data_wait_p99_ms']:.2f} ms"),
        ("training time (without evaluation and saving)", clock(s["total_training_time_s"])),
        ("hardware", f"{s['world_size'] or '?'} x {s['hardware_name'] or '?'} ({s['device'] or '?'}), {s['precision'] or '?'}"),
    )


def model(run: Run, s: Summary) -> Markdown:
    plan = run.plan
    by_part = ", ".join(f"{key} {n:,}" for key, n in (plan.get("parameters") or {}).items() if key != "total")
    dims = ("depth", "width", "n_heads", "n_kv_heads", "head_dim", "vocab_size")
    factors = {"device_batch_size": "rows", "seq_len": "tokens", "dp_size": "ranks", "grad_accum_steps": "micro-batches"}
    return _facts(
        ("parameters", s["parameters"] and f"{s['parameters']:,}" + (f" ({by_part})" if by_part else "")),
        ("shape", ", ".join(f"{key} {plan[key]:,}" for key in dims if plan.get(key))),
        ("FLOPs per token", count(s["flops_per_token"])),
        ("tokens per step", count(s["total_batch_size"])),
        ("which is", " x ".join(f"{plan[key]:,} {what}" for key, what in factors.items() if (plan.get(key) or 1) > 1)),
        ("steps planned", s["num_steps"] and f"{s['num_steps']:,} (set by {plan.get('horizon', 'the config')})"),
        ("epochs", s["epochs"] is not None and f"{s['epochs']:.2f}"),
    )


def sources(run: Run, s: Summary) -> Markdown:
    """What a mixture was made of, and how much of each was trained on."""
    mixture, tokens, epochs = run.mixture, s["source_tokens"] or {}, s["source_epochs"] or {}
    if mixture is None or len(mixture.sources) == 1:
        return Markdown()
    rows = [
        (c.name, percent(share), count(tokens.get(c.name, 0)), f"{epochs[c.name]:.2f}" if c.name in epochs else "", count(c.text_bytes))
        for c, share in zip(mixture.corpora, mixture.shares, strict=True)
    ]
    return table(("source", "weight", "tokens trained on", "epochs", "bytes of text"), rows)


def data(run: Run, s: Summary) -> Markdown:
    mixture, tokenizer = run.mixture, run.data.get("tokenizer") or {}
    corpus = mixture.corpora[0] if mixture and len(mixture.sources) == 1 else None
    return _facts(
        ("corpus" if corpus or not mixture else "mixture", mixture.name if mixture else s["data"]),
        ("folder", corpus and corpus.root),
        ("fetched from", corpus and corpus.remote and corpus.remote.url),
        ("training shards", corpus and count(len(corpus.shards))),
        ("training documents", corpus and count(corpus.documents)),
        ("training text", corpus and f"{corpus.text_bytes:,} bytes"),
        ("validation shard", corpus and corpus.val.name),
        ("corpus fingerprint", (run.data.get("corpus") or {}).get("fingerprint")),
        ("lanes", run.plan.get("lanes")),
        ("vocabulary", count(s["vocab_size"])),
        ("bytes per token", number(run.plan.get("bytes_per_token"))),
        ("encoder", tokenizer.get("encoder")),
        ("tokenizer fingerprint", tokenizer.get("fingerprint")),
    )


def config(run: Run) -> Markdown:
    """What makes the training, of the whole that stands in config.yaml."""
    rows = [(key, value) for key, value in _flat(run.config) if f"{key}.".startswith(tuple(f"{name}." for name in CONFIG_KEYS))]
    return table(("key", "value"), [row for row in rows if row[1] != "None"])


def environment(run: Run) -> Markdown:
    return _facts(*_flat(run.environment))


def attempts(run: Run) -> Markdown:
    return table(("attempt", "given on the command line"), run.attempts if len(run.attempts) > 1 else [])


def events(run: Run) -> Markdown:
    rows = [(e.get("time"), count(e.get("step") or 0), e.get("name"), e.get("message")) for e in run.events]
    return table(("time", "step", "event", ""), rows)


def _facts(*rows: tuple[str, Any]) -> Markdown:
    """Pairs of a name and a value, without those that have none."""
    return table(("what", "value"), [row for row in rows if row[1]])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (dotted key, value) pairs."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", str(value))]
    return rows


def number(value: float | None) -> str:
    """Four digits after the point; nothing for what was not measured."""
    return "" if value is None else f"{value:.4f}"


def percent(share: float | None) -> str:
    """A share of 1 in percent; nothing for what was not measured."""
    return "" if share is None else f"{100 * share:.1f} %"


def count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
