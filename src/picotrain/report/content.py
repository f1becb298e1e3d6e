"""What a report says, as blocks without markup: one text for report.md and report.html, which escape it each in its own way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from picotrain.report.facts import Run, core_points
from picotrain.text import clock, short, size

Summary = Mapping[str, Any]
MAX_ROWS = 12  # of a table by step; the whole is in metrics.jsonl


@dataclass(frozen=True)
class Prose:
    """A paragraph; `lead` stands before it in bold."""

    text: str
    lead: str = ""


@dataclass(frozen=True)
class Note:
    """Something that is wrong with the run's files."""

    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """Pairs of a name and a value."""

    rows: Sequence[tuple[str, Any]]
    head: tuple[str, str] = ("what", "value")


@dataclass(frozen=True)
class Table:
    """Rows of values by step, task, ...; `bars`: a share for each row, to be drawn beside it where that is possible."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    bars: Sequence[float | None] = ()


@dataclass(frozen=True)
class Code:
    """A text as it is; folded away below its title if it has one."""

    text: str
    language: str
    title: str = ""


@dataclass(frozen=True)
class Columns:
    """Texts as they are, side by side where there is room, each below its name."""

    texts: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Picture:
    """Where pictures of this kind belong."""

    kind: Literal["learned", "course", "core"]


Block = Prose | Note | Bullets | Facts | Table | Code | Columns | Picture


@dataclass(frozen=True)
class Section:
    title: str  # "": what stands above all sections
    blocks: Sequence[Block] = field(default=())


def sections(run: Run, s: Summary) -> list[Section]:
    """The report of a run, section by section; without those of which nothing is known."""
    found = [
        Section("", [Prose(state(s)), *(Note(problem) for problem in _warnings(run, s))]),
        Section("Did it learn?", list(_learned(run, s))),
        Section("Course of the training", [Picture("course")] if run.train else []),
        Section("CORE", list(_core(run, s))),
        Section("Samples", list(_samples(run))),
        Section("Checkpoints", list(_checkpoints(run))),
        Section("Throughput", [_throughput(s)]),
        Section("Model and batch", list(_model(run, s))),
        Section("Data and tokenizer", list(_data(run, s))),
        Section("Config", list(_config(run))),
        Section("Environment", [Facts(flat(run.environment))] if run.environment else []),
        Section("Attempts and events", list(_events(run))),
    ]
    return [section for section in found if section.blocks]


def _warnings(run: Run, s: Summary) -> list[str]:
    behind = [f"The archive is behind: {s['archive_trouble']}"] if s["archive_trouble"] else []
    return [*run.problems, *behind]


def state(s: Summary) -> str:
    """In one sentence, how far the run came."""
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


def verdict(s: Summary) -> Prose:
    """Whether the loss improved on text the model was not trained on, in words."""
    first, best, last = (s[f"{which}_val_bpb"] for which in ("initial", "best", "final"))
    if first is None:
        return Prose("Validation was never measured, so that nothing can be said about unseen text.", "Not known.")
    at_first, at_best, at_last = (f"at step {s[f'{which}_val_step']:,}" for which in ("initial", "best", "final"))
    if s["improved"] is None:
        return Prose(f"Validation was measured once: {first:.4f} bits per byte {at_first}.", "Not known yet.")
    if not s["improved"]:
        return Prose(
            f"On unseen text the model had {first:.4f} bits per byte {at_first} and was never better; {at_last} it has {last:.4f}.", "No."
        )
    ratio = s["val_bpb_ratio"]
    text = f"On unseen text the model went from {first:.4f} bits per byte {at_first} to {last:.4f} {at_last}: {ratio:.3f} of the start."
    if last > best:
        text += f" It was best {at_best}, with {best:.4f}, and is {100 * (last / best - 1):.2f} % above that now."
    return Prose(text, "Yes.")


def _learned(run: Run, s: Summary) -> Iterator[Block]:
    yield verdict(s)
    measured = [line for line in run.val if line.get("val_bpb") is not None]
    if run.train or measured:
        yield Picture("learned")
    if measured:
        marks = {s["best_val_step"]: "best"}
        rows = [
            (f"{v['step']:,}", f"{v['val_bpb']:.4f}", number(v.get("val_loss")), marks.get(v["step"], "")) for v in _thin(measured, marks)
        ]
        yield Table(("step", "val_bpb", "val_loss (nats per token)", ""), rows)
    if s["train_loss"] is not None:
        yield Prose(f"Training loss at the last step: {s['train_loss']:.4f} nats per token, smoothed {number(s['smooth_train_loss'])}.")
    yield from _evaluated(run)


def _evaluated(run: Run) -> Iterator[Block]:
    """What `picotrain eval` measured, by step and by source."""
    scores = [(results, results.get("bpb") or {}) for results in run.evals]
    rows = [(f"{r['step']:,}", number(b.get("val")), number(b.get("train")), number(r.get("val_loss"))) for r, b in scores if b]
    if not rows:
        return
    yield Prose("Measured by picotrain eval:")
    yield Table(("step", "val_bpb", "train_bpb", "val_loss (nats per token)"), rows)
    by_source = scores[-1][1].get("by_source")
    if isinstance(by_source, Mapping) and by_source:
        values = [(name, value.get("bpb") if isinstance(value, Mapping) else value) for name, value in by_source.items()]
        yield Table(("source", "val_bpb"), [(name, number(v) if isinstance(v, (int, float)) else v) for name, v in values])


def _thin(lines: Sequence[dict[str, Any]], keep: Mapping[int, str]) -> list[dict[str, Any]]:
    """At most about MAX_ROWS lines, evenly spread; the first, the last and those at the steps in `keep` always."""
    stride = -(-len(lines) // MAX_ROWS)
    last = len(lines) - 1
    return [line for i, line in enumerate(lines) if i % stride == 0 or i == last or line["step"] in keep]


def _core(run: Run, s: Summary) -> Iterator[Block]:
    points = core_points(run)
    if not points:
        yield Prose("CORE: not evaluated.")
        return
    last = points[-1]
    tasks = last.get("tasks") or {}
    measured = [task for task in tasks.values() if task.get("centered") is not None]
    mean = f"{last['core_metric']:.4f}" if last.get("core_metric") is not None else "not known, as the evaluation is not complete"
    yield Prose(f"CORE: {mean}, at step {last['step']:,}; {len(measured)} of {len(tasks)} tasks were measured.")
    if tasks:
        yield Picture("core")
        rows = [
            (label, number(task.get("centered")), number(task.get("accuracy")), number(task.get("stderr")), _count(task.get("n")))
            for label, task in tasks.items()
        ]
        yield Table(("task", "centered", "accuracy", "stderr", "examples"), rows, [task.get("centered") for task in tasks.values()])
    if len(points) > 1:
        yield Table(("step", "CORE"), [(f"{point['step']:,}", number(point.get("core_metric"))) for point in _thin(points, {})])


def _samples(run: Run) -> Iterator[Block]:
    if not run.samples:
        return
    line = run.samples[-1]
    yield Prose(f"At step {line['step']:,}; the prompt stands in brackets.")
    for sample in line.get("samples", ()):
        prompt = f"[{sample['prompt']}]" if sample.get("prompt") else ""
        yield Code(prompt + sample.get("text", ""), "text")


def _checkpoints(run: Run) -> Iterator[Block]:
    if not run.checkpoints:
        yield Prose("None was saved.")
        return
    rows = []
    for c in run.checkpoints:
        marks = ", ".join(mark for mark, name in (("best", run.best), ("latest", run.latest)) if name == c.name)
        saved = f"{c.seconds:.1f} s" if c.seconds is not None else ""
        files = c.problem or "whole: manifest and sizes agree"
        rows.append((f"checkpoints/{c.name}", f"{c.step:,}", size(c.bytes), saved, number(c.val_bpb), files, marks))
    yield Prose(f"The best checkpoint is checkpoints/{run.best}." if run.best else "No checkpoint was validated, so that none is the best.")
    yield Table(("folder", "step", "size", "saved in", "val_bpb", "files", ""), rows)


def _throughput(s: Summary) -> Block:
    if s["median_tok_per_sec"] is None:
        return Prose("No step was measured.")
    mfu = f"{100 * s['median_mfu']:.1f} %" if s["median_mfu"] is not None else "not known: the peak of this hardware is not known"
    rows = [
        ("tokens per second, median", f"{s['median_tok_per_sec']:,.0f}"),
        ("MFU, median", mfu),
        ("time per step, median", s["median_dt_ms"] is not None and f"{s['median_dt_ms']:,.1f} ms"),
        ("share of the time that waited for data", percent(s["data_wait_share"])),
        ("99th percentile of a step's wait for data", s["data_wait_p99_ms"] is not None and f"{s['data_wait_p99_ms']:.2f} ms"),
        ("training time (without evaluation and saving)", clock(s["total_training_time_s"])),
        ("hardware", f"{s['world_size'] or '?'} x {s['hardware_name'] or '?'} ({s['device'] or '?'}), {s['precision'] or '?'}"),
    ]
    return Facts([row for row in rows if row[1]])


def _model(run: Run, s: Summary) -> Iterator[Block]:
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
    if known := [row for row in rows if row[1]]:
        yield Facts(known)
    if plan.get("notes"):
        yield Bullets(plan["notes"])


def _data(run: Run, s: Summary) -> Iterator[Block]:
    corpus = run.data.get("corpus") or {}
    tokenizer = run.data.get("tokenizer") or {}
    sources = corpus.get("sources")
    if sources:
        yield _sources(sources, s)
    rows = [
        *([("mixture", corpus.get("name"))] if sources else _corpus_rows(corpus, s)),
        ("corpus fingerprint", corpus.get("fingerprint")),
        ("lanes", run.plan.get("lanes")),
        ("vocabulary", s["vocab_size"] and f"{s['vocab_size']:,}"),
        ("bytes per token", number(run.plan.get("bytes_per_token"))),
        ("encoder", tokenizer.get("encoder")),
        ("tokenizer fingerprint", tokenizer.get("fingerprint")),
    ]
    if known := [row for row in rows if row[1]]:
        yield Facts(known)


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


def _sources(sources: Sequence[Mapping[str, Any]], s: Summary) -> Table:
    """What a mixture was made of, and how much of each was trained on."""
    total = sum(source["weight"] for source in sources)
    tokens, epochs = s["source_tokens"] or {}, s["source_epochs"] or {}
    rows = []
    for source in sources:
        corpus = source["corpus"]
        name = corpus["name"]
        passes = f"{epochs[name]:.2f}" if name in epochs else ""
        row = (name, percent(source["weight"] / total), f"{tokens.get(name, 0):,}", passes, _sum_groups(corpus["shards"], 1) or "")
        rows.append(row)
    return Table(("source", "weight", "tokens trained on", "epochs", "bytes of text"), rows)


def _sum_groups(shards: Sequence[Mapping[str, Any]], column: int) -> str | None:
    """The sum over all row groups [rows, text bytes] of one of the two."""
    try:
        return f"{sum(group[column] for shard in shards for group in shard['row_groups']):,}" if shards else None
    except (KeyError, IndexError, TypeError):
        return None


def _config(run: Run) -> Iterator[Block]:
    picked = ("run.seed", "optimizer", "schedule", "train.grad_clip", "train.device_batch_size", "parallel.kind", "hardware.compile")
    all_of_it = dict(flat(run.config))
    facts = [(key, v) for key, v in all_of_it.items() if any(key == p or key.startswith(p + ".") for p in picked) and v != "None"]
    if facts:
        yield Facts(facts, ("key", "value"))
    if run.overrides:
        yield Prose("Given on the command line:")
        yield Code("\n".join(run.overrides), "")
    yield Code(run.config_text.rstrip(), "yaml", "config.yaml")


def _events(run: Run) -> Iterator[Block]:
    if len(run.attempts) > 1:
        rows = [(name, " ".join(overrides.split())) for name, overrides in run.attempts]
        yield Table(("attempt", "given on the command line"), rows)
    rows = [(e.get("time", ""), f"{e.get('step') or 0:,}", e.get("name", ""), e.get("message", "")) for e in run.events]
    if rows:
        yield Table(("time", "step", "event", ""), rows)


def flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (dotted key, value) pairs."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        rows += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", str(value))]
    return rows


def number(value: float | None) -> str:
    """Four digits after the point; nothing for what was not measured."""
    return "" if value is None else f"{value:.4f}"


def percent(share: float | None) -> str:
    """A share of 1 in percent; nothing for what was not measured."""
    return "" if share is None else f"{100 * share:.1f} %"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"
