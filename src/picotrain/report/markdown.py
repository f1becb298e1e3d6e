"""report.md: the facts of a run as one readable page. Text from models, configs and files is fenced or escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from picotrain.report.facts import Run
from picotrain.text import clock, printable, short, size

Summary = Mapping[str, Any]
MAX_ROWS = 12  # of the validation table; the whole is in metrics.jsonl


def render(run: Run, summary: Summary, picture: str | None) -> str:
    """The whole page; `picture` is the file name of the loss curve, None where there is none."""
    sections = [
        ("", [f"# {_cell(summary['name'])}", _state(summary), *_problems(run)]),
        ("Did it learn?", _learned(run, summary, picture)),
        ("Samples", _samples(run)),
        ("Checkpoints", _checkpoints(run)),
        ("Throughput", _throughput(summary)),
        ("Model and batch", _model(run, summary)),
        ("Data and tokenizer", _data(run, summary)),
        ("Config", _config(run)),
        ("Environment", [_table(("what", "value"), _flat(run.environment))] if run.environment else []),
        ("Events", _events(run)),
    ]
    parts = []
    for title, blocks in sections:
        if blocks:
            parts += ([f"## {title}"] if title else []) + blocks
    return "\n\n".join(parts) + "\n"


def verdict(summary: Summary) -> str:
    """Whether the loss improved on text the model was not trained on, in words."""
    first, best, last = (summary[f"{which}_val_bpb"] for which in ("initial", "best", "final"))
    if first is None:
        return "**Not known.** Validation was never measured, so that nothing can be said about unseen text."
    at_first, at_best, at_last = (f"at step {summary[f'{which}_val_step']:,}" for which in ("initial", "best", "final"))
    if summary["improved"] is None:
        return f"**Not known yet.** Validation was measured once: {first:.4f} bits per byte {at_first}."
    if not summary["improved"]:
        return (
            f"**No.** On unseen text the model had {first:.4f} bits per byte {at_first} and was never better; {at_last} it has {last:.4f}."
        )
    ratio = summary["val_bpb_ratio"]
    text = f"**Yes.** On unseen text the model went from {first:.4f} bits per byte {at_first} to {last:.4f} {at_last}"
    text += f": {ratio:.3f} of the start."
    if last > best:
        text += f" It was best {at_best}, with {best:.4f}, and is {100 * (last / best - 1):.2f} % above that now."
    return text


def fence(text: str, language: str = "") -> str:
    """`text` as a code block that nothing in it can close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{printable(text)}\n{ticks}"


def _cell(value: Any) -> str:
    """A value as one line in which Markdown and HTML see no markup."""
    text = " ".join(printable("" if value is None else str(value)).split())
    return re.sub(r"[\\`*\[\]<>|&~#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _state(s: Summary) -> str:
    share = f" of {s['num_steps']:,} ({100 * s['steps_done'] / s['num_steps']:.1f} %)" if s["num_steps"] else ""
    words = {
        "finished": "This run is finished",
        "stopped": "This run was stopped and can be resumed",
        "bad_data": "This run ended at text that cannot be read (see the events) and can be resumed",
        "diverged": "This run diverged: its loss is no longer finite",
        "running": "This run is still training",
        "interrupted": "This run was interrupted and can be resumed",
    }[s["status"]]
    time = f", {clock(s['total_training_time_s'])} of training" if s["total_training_time_s"] else ""
    return f"{words}: {s['steps_done']:,} steps{share}, {short(s['tokens'])} tokens{time}."


def _problems(run: Run) -> list[str]:
    return ["\n".join(f"> **Note:** {_cell(problem)}" for problem in run.problems)] if run.problems else []


def _learned(run: Run, s: Summary, picture: str | None) -> list[str]:
    blocks = [verdict(s)]
    if picture:
        blocks.append(f"![training loss and validation bits per byte over steps]({picture})")
    measured = [line for line in run.val if line.get("val_bpb") is not None]
    if measured:
        marks = {s["best_val_step"]: "best"}
        rows = [
            (f"{v['step']:,}", f"{v['val_bpb']:.4f}", _number(v.get("val_loss")), marks.get(v["step"], "")) for v in _thin(measured, marks)
        ]
        blocks.append(_table(("step", "val_bpb", "val_loss (nats per token)", ""), rows))
    if s["train_loss"] is not None:
        blocks.append(f"Training loss at the last step: {s['train_loss']:.4f} nats per token, smoothed {_number(s['smooth_train_loss'])}.")
    core = f"{s['core_metric']:.4f}" if s["core_metric"] is not None else "not evaluated"
    return [*blocks, f"CORE: {core}."]


def _thin(lines: Sequence[dict[str, Any]], keep: Mapping[int, str]) -> list[dict[str, Any]]:
    """At most about MAX_ROWS lines, evenly spread; the first, the last and those at the steps in `keep` always."""
    stride = -(-len(lines) // MAX_ROWS)
    last = len(lines) - 1
    return [line for i, line in enumerate(lines) if i % stride == 0 or i == last or line["step"] in keep]


def _samples(run: Run) -> list[str]:
    if not run.samples:
        return []
    line = run.samples[-1]
    prompts = [f"[{sample['prompt']}]" if sample.get("prompt") else "" for sample in line.get("samples", ())]
    texts = [prompt + sample.get("text", "") for prompt, sample in zip(prompts, line.get("samples", ()), strict=True)]
    return [f"At step {line['step']:,}; the prompt stands in brackets.", *(fence(text, "text") for text in texts)]


def _checkpoints(run: Run) -> list[str]:
    if not run.checkpoints:
        return ["None was saved."]
    rows = []
    for c in run.checkpoints:
        note = "best" if c.name == run.best else "" if c.whole else "not whole: no manifest"
        saved = f"{c.seconds:.1f} s" if c.seconds is not None else ""
        rows.append((f"checkpoints/{c.name}", f"{c.step:,}", size(c.bytes), saved, _number(c.val_bpb), note))
    best = f"The best checkpoint is `checkpoints/{run.best}`." if run.best else "No checkpoint was validated, so that none is the best."
    return [best, _table(("folder", "step", "size", "saved in", "val_bpb", ""), rows)]


def _throughput(s: Summary) -> list[str]:
    if s["median_tok_per_sec"] is None:
        return ["No step was measured."]
    mfu = f"{100 * s['median_mfu']:.1f} %" if s["median_mfu"] is not None else "not known: the peak of this hardware is not known"
    rows = [
        ("tokens per second, median", f"{s['median_tok_per_sec']:,.0f}"),
        ("MFU, median", mfu),
        ("time per step, median", s["median_dt_ms"] is not None and f"{s['median_dt_ms']:,.1f} ms"),
        ("share of the time that waited for data", _percent(s["data_wait_share"])),
        ("99th percentile of a step's wait for data", s["data_wait_p99_ms"] is not None and f"{s['data_wait_p99_ms']:.2f} ms"),
        ("training time (without evaluation and saving)", clock(s["total_training_time_s"])),
        ("hardware", f"{s['world_size'] or '?'} x {s['hardware_name'] or '?'} ({s['device'] or '?'}), {s['precision'] or '?'}"),
    ]
    return [_table(("what", "value"), rows)]


def _model(run: Run, s: Summary) -> list[str]:
    plan = run.plan
    parts = {key: count for key, count in (plan.get("parameters") or {}).items() if key != "total"}
    by_part = ", ".join(f"{key} {count:,}" for key, count in parts.items())
    dims = ("depth", "width", "n_heads", "n_kv_heads", "head_dim", "vocab_size")
    factors = {"device_batch_size": "rows", "seq_len": "tokens", "dp_size": "ranks", "grad_accum_steps": "micro-batches"}
    batch = " x ".join(f"{plan[key]:,} {what}" for key, what in factors.items() if (plan.get(key) or 1) > 1)
    rows = [
        ("parameters", f"{s['parameters']:,}" + (f" ({by_part})" if by_part else "") if s["parameters"] else None),
        ("shape", ", ".join(f"{key} {plan[key]:,}" for key in dims if plan.get(key)) or None),
        ("FLOPs per token", s["flops_per_token"] and f"{s['flops_per_token']:,}"),
        ("tokens per step", s["total_batch_size"] and f"{s['total_batch_size']:,}"),
        ("which is", batch),
        ("steps planned", s["num_steps"] and f"{s['num_steps']:,} (set by {plan.get('horizon', 'the config')})"),
        ("epochs", s["epochs"] is not None and f"{s['epochs']:.2f}"),
    ]
    notes = "\n".join(f"* {_cell(note)}" for note in plan.get("notes") or ())
    return [_table(("what", "value"), [row for row in rows if row[1]]), *([notes] if notes else [])]


def _data(run: Run, s: Summary) -> list[str]:
    corpus = run.data.get("corpus") or {}
    tokenizer = run.data.get("tokenizer") or {}
    sources = corpus.get("sources")
    rows = [
        *([("mixture", corpus.get("name"))] if sources else _corpus_rows(corpus, s)),
        ("corpus fingerprint", corpus.get("fingerprint")),
        ("lanes", run.plan.get("lanes")),
        ("vocabulary", s["vocab_size"] and f"{s['vocab_size']:,}"),
        ("bytes per token", _number(run.plan.get("bytes_per_token"))),
        ("encoder", tokenizer.get("encoder")),
        ("tokenizer fingerprint", tokenizer.get("fingerprint")),
    ]
    known = [row for row in rows if row[1]]
    return [*([_sources(sources, s)] if sources else []), *([_table(("what", "value"), known)] if known else [])]


def _corpus_rows(corpus: Mapping[str, Any], s: Summary) -> list[tuple[str, Any]]:
    shards = corpus.get("shards") or []
    return [
        ("corpus", corpus.get("name") or s["data"]),
        ("folder", corpus.get("root")),
        ("fetched from", (corpus.get("remote") or [None])[0]),
        ("training shards", f"{len(shards):,}" if shards else None),
        ("training documents", _sum_groups(shards, 0)),
        ("training text", (text := _sum_groups(shards, 1)) and f"{text} bytes"),
        ("validation shard", (corpus.get("val") or {}).get("name")),
    ]


def _sources(sources: Sequence[Mapping[str, Any]], s: Summary) -> str:
    """What a mixture was made of, and how much of each was trained on."""
    total = sum(source["weight"] for source in sources)
    tokens, epochs = s["source_tokens"] or {}, s["source_epochs"] or {}
    rows = []
    for source in sources:
        corpus = source["corpus"]
        name = corpus["name"]
        passes = f"{epochs[name]:.2f}" if name in epochs else ""
        row = (name, _percent(source["weight"] / total), f"{tokens.get(name, 0):,}", passes, _sum_groups(corpus["shards"], 1) or "")
        rows.append(row)
    return _table(("source", "weight", "tokens trained on", "epochs", "bytes of text"), rows)


def _sum_groups(shards: Sequence[Mapping[str, Any]], column: int) -> str | None:
    """The sum over all row groups [rows, text bytes] of one of the two."""
    try:
        return f"{sum(group[column] for shard in shards for group in shard['row_groups']):,}" if shards else None
    except (KeyError, IndexError, TypeError):
        return None


def _config(run: Run) -> list[str]:
    picked = ("run.seed", "optimizer", "schedule", "train.grad_clip", "train.device_batch_size", "parallel.kind", "hardware.compile")
    flat = dict(_flat(run.config))
    facts = [(key, value) for key, value in flat.items() if any(key == p or key.startswith(p + ".") for p in picked) and value != "None"]
    blocks = [_table(("key", "value"), facts)] if facts else []
    if run.overrides:
        blocks += ["Given on the command line:", fence("\n".join(run.overrides))]
    return [*blocks, f"<details><summary>config.yaml</summary>\n\n{fence(run.config_text.rstrip(), 'yaml')}\n\n</details>"]


def _events(run: Run) -> list[str]:
    rows = [(e.get("time", ""), f"{e.get('step') or 0:,}", e.get("name", ""), e.get("message", "")) for e in run.events]
    return [_table(("time", "step", "event", ""), rows)] if rows else []


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (dotted key, value) pairs."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", str(value))]
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
