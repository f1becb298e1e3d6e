"""What a comparison says, from the plain results of `picotrain compare`: its headline, as Markdown and as a page of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from picotrain.report.charts import Charts
from picotrain.report.content import Block, Columns, Note, Prose, Section, Table, number, percent
from picotrain.report.html import fill, tile
from picotrain.report.markdown import write
from picotrain.text import several, short

Results = Mapping[str, Any]
MINUS = "−"  # between names, of which one may hold a hyphen


def markdown(results: Results) -> str:
    """The whole comparison as one page of Markdown."""
    return write(_title(results), sections(results), {})


def page(results: Results) -> str:
    """The whole comparison as one HTML file that needs no other, in the style of report.html."""
    badges = {"larger": "finished", "no larger": "running", "not known": "stopped"}  # classes of the style sheet
    words = {"larger": "larger than the noise", "no larger": "no larger than the noise", "not known": "not known"}
    first, *others = results["verdicts"]
    return fill(
        title=f"{_title(results)}: compared",
        name=_title(results),
        status="compared" if set(others) - {first} else words[first],
        badge="stopped" if set(others) - {first} else badges[first],
        found=sections(results),
        tiles=_tiles(results),
        footer="Written by picotrain compare.",
        charts=Charts(),
    )


def sections(results: Results) -> list[Section]:
    """The comparison, section by section, as blocks without markup."""
    leads = {"larger": "Larger than the noise.", "no larger": "No larger than the noise.", "not known": "Not known."}
    top = [Prose(text, leads[verdict]) for text, verdict in zip(results["headline"], results["verdicts"], strict=True)]
    found = [
        Section("", [*top, Prose(_noise(results))]),
        Section("What is compared", list(_subjects(results))),
        Section("Is it fair?", [Note(text) for text in results["warnings"]] or [Prose("Nothing speaks against it.")]),
        Section("Config differences", list(_config(results))),
        Section("Training text and tokenizers", [_data(results)]),
        Section("Bits per byte of whole documents", list(_bpb(results))),
        Section("CORE by task", list(_core(results))),
        Section("Speed of training", list(_speed(results))),
        Section("Samples side by side", list(_samples(results))),
    ]
    return [section for section in found if section.blocks]


def headlines(results: Results) -> list[str]:
    """For each further model one sentence: whether its difference from the first is larger than the noise, and by which figures."""
    first, *others = _names(results)
    found = []
    for i, (other, verdict) in enumerate(zip(others, results["verdicts"], strict=True)):
        rows, core = results["bpb"]["rows"], results["core"]
        bpb, metric = rows[0]["differences"][i] if rows else None, core["differences"][i] if "differences" in core else None
        if bpb and bpb["low"] is not None:
            better, worse = (other, first) if bpb["value"] < 0 else (first, other)
            low, high = sorted((abs(bpb["low"]), abs(bpb["high"])))
            reach = f"{_level(results)} interval {low:.4f} to {high:.4f}, {several(rows[0]['documents'], 'document')}"
            text = f"{better} is better than {worse} by more than the noise: {abs(bpb['value']):.4f} bits per byte less ({reach})"
            if verdict == "no larger":
                reach = f"{_level(results)} interval {_range(bpb)}, {several(rows[0]['documents'], 'document')}"
                text = (
                    f"The difference of {other} from {first} is no larger than the noise: {_signed(bpb['value'])} bits per byte ({reach})"
                )
            found.append(f"{text}; {_core_clause(results, i)}.")
        elif metric:
            size = "larger" if verdict == "larger" else "no larger"
            found.append(f"The difference of {other} from {first} is {size} than the noise by CORE alone: {_core_clause(results, i)}.")
        else:
            found.append(f"Whether {other} differs from {first} is not known: too little was measured of both.")
    return found


def _core_clause(results: Results, i: int) -> str:
    core = results["core"]
    metric = core["differences"][i] if "differences" in core else None
    if not metric:
        return "CORE was not evaluated"
    outside = metric["low"] > 0 or metric["high"] < 0
    size = (
        ("is higher" if metric["value"] > 0 else "is lower") + " by more than the noise" if outside else "differs by no more than the noise"
    )
    tests = [task["differences"][i] for task in core["tasks"] if task["differences"][i]]
    alone = sum(test["p_holm"] < 0.05 for test in tests)
    after = f", and {alone} of {len(tests)} tasks differ after Holm's correction" if alone else ""
    return f"the CORE of {_names(results)[i + 1]} {size} ({_signed(metric['value'])}, {_range(metric)}){after}"


def _noise(results: Results) -> str:
    """What the intervals cover, and what they do not."""
    text = (
        "Noise is what another choice of documents and examples would change. Training again from another seed gives another model, too; "
    )
    text += "how much that changes is not in these intervals, and only runs with several seeds tell."
    if results["seeds_only"]:
        text = "These runs differ in their seed alone: their difference is what chance in training does. The intervals cover what another "
        text += "choice of documents and examples would change."
    if len(results["verdicts"]) > 1:
        text += (
            f" Each is compared with {_names(results)[0]}; an interval is at {_level(results)}, so that all of them hold together at 95 %."
        )
    return text


def _subjects(results: Results) -> Iterator[Block]:
    rows = []
    for one in results["subjects"]:
        loop = number(one["val_bpb"]) or "not measured"
        rows.append(
            (one["name"], _count(one["step"]), _short(one["parameters"]), _short(one["tokens"]), loop, one["loop_problem"] or "yes")
        )
    rows[0] = (*rows[0][:-1], "")
    first = rows[0][0]
    yield Table(("model", "step", "parameters", "tokens trained", "val_bpb of its own loop", f"comparable with {first}"), rows)
    yield Prose(
        "What a training loop measured compares only at equal tokenizer, seq_len and validation rows; whole documents compare always."
    )


def _config(results: Results) -> Iterator[Block]:
    known = [i for i, one in enumerate(results["subjects"]) if one["kind"] == "run"]
    if len(known) < 2:
        return
    names = _names(results)
    for experiment, lead in ((True, "What makes the experiment:"), (False, "What does not change the experiment:")):
        rows = [row for row in results["config"] if row["experiment"] == experiment]
        if rows:
            yield Prose(lead)
            yield Table(("key", *(names[i] for i in known)), [(row["key"], *(_value(row["values"][i]) for i in known)) for row in rows])
    if not results["config"]:
        yield Prose("None: the configs are the same.")


def _data(results: Results) -> Block:
    subjects = results["subjects"]
    facts = {
        "corpus": lambda one: one["corpus"],
        "corpus fingerprint": lambda one: _print(one["corpus_fingerprint"]),
        "validation shards": lambda one: ", ".join(shard[:12] for shard in one["val_shards"]) or None,
        "tokenizer fingerprint": lambda one: _print(one["tokenizer_fingerprint"]),
        "vocabulary": lambda one: _count(one["vocab_size"]) or None,
        "tokens per row (seq_len)": lambda one: _count(one["seq_len"]) or None,
        "UTF-8 bytes per token of these documents": lambda one: one["bytes_per_token"] and f"{one['bytes_per_token']:.3f}",
    }
    rows = [(what, *(fact(one) or "not known" for one in subjects), _same([fact(one) for one in subjects])) for what, fact in facts.items()]
    return Table(("", *_names(results), "the same?"), rows)


def _bpb(results: Results) -> Iterator[Block]:
    bpb, names = results["bpb"], _names(results)
    for name, problem in bpb["problems"].items():
        yield Note(f"{name} was not evaluated: {problem}.")
    if not bpb["rows"]:
        return
    spread = f" (of {bpb['of']:,}, spread evenly)" if bpb["spread"] else ""
    yield Prose(
        f"Measured on {several(bpb['documents'], 'document')}{spread} of the validation shard of {bpb['text_of']}, in windows of "
        f"{bpb['window']:,} tokens, each led by the model's own token for a beginning. Below zero the further model is the better one; "
        f"intervals are paired bootstraps over documents at {_level(results)}."
    )
    rows = []
    for row in bpb["rows"]:
        values = [number(value) or "not evaluated" for value in row["bpb"]]
        rows.append((row["origin"] or "all", f"{row['documents']:,}", *values, *map(_figure, row["differences"])))
    yield Table(("source", "documents", *names, *_against(names)), rows)


def _core(results: Results) -> Iterator[Block]:
    core, names = results["core"], _names(results)
    if core["problem"]:
        yield Prose(f"Not evaluated: {core['problem']}.")
        return
    most = core["max_per_task"]
    size = f"at most {most:,}" if most and most > 0 else "all"
    yield Prose(
        f"{core['evaluated']} of {len(core['tasks'])} tasks of {core['bundle']}, with {size} examples each; random baselines by "
        f"{core['baseline_table']}. Examples count that every model answered."
    )
    done = [task for task in core["tasks"] if not task["problem"]]
    if done:
        yield from _core_tables(results, done)
    for i, name in enumerate(names):
        if done and core["core_metric"][i] is None:
            yield Note(f"{name} was not evaluated: none of its tasks could be finished.")
    skipped = [(task["label"], task["problem"]) for task in core["tasks"] if task["problem"]]
    if skipped:
        yield Prose("Not evaluated:")
        yield Table(("task", "why"), skipped)


def _core_tables(results: Results, done: Sequence[Results]) -> Iterator[Block]:
    core, names = results["core"], _names(results)
    rows = [("CORE", "", *map(number, core["core_metric"]), *map(_figure, core["differences"]))]
    for task in done:
        differences = [difference and difference["centered"] for difference in task["differences"]]
        rows.append((task["label"], f"{task['n']:,}", *map(number, task["centered"]), *map(_figure, differences)))
    yield Prose("Centered accuracy, 0 for guessing and 1 for all right:")
    yield Table(("task", "examples", *names, *_against(names)), rows)
    for i, name in enumerate(names[1:]):
        rows = []
        for task in done:
            if found := task["differences"][i]:
                accuracy = (number(task["accuracy"][0]), number(task["accuracy"][i + 1]), _figure(found["accuracy"]))
                alone = (f"{found['only_first']:,}", f"{found['only_other']:,}", _p(found["p"]), _p(found["p_holm"]))
                rows.append((task["label"], *accuracy, *alone))
        if rows:
            yield Prose(f"Accuracy, and the examples that {names[0]} or {name} alone got right (p: McNemar's exact test, then after Holm):")
            head = ("task", names[0], name, f"{name} {MINUS} {names[0]}", f"only {names[0]}", f"only {name}", "p", "p (Holm)")
            yield Table(head, rows)


def _speed(results: Results) -> Iterator[Block]:
    rows, machines = [], set()
    for one in results["subjects"]:
        if one["median_tok_per_sec"] is not None:
            machine = f"{one['world_size'] or '?'} x {one['hardware_name'] or '?'}"
            machines.add(machine)
            rows.append((one["name"], f"{one['median_tok_per_sec']:,.0f}", percent(one["median_mfu"]) or "not known", machine))
    if rows:
        yield Table(("model", "tokens per second, median", "MFU, median", "hardware"), rows)
    if len(machines) > 1:
        yield Note("The runs were trained on different hardware: their speeds do not compare.")


def _samples(results: Results) -> Iterator[Block]:
    samples, names = results["samples"], _names(results)
    how = (
        "the likeliest token each time" if samples["temperature"] == 0 else f"temperature {samples['temperature']:g}, the same seed for all"
    )
    yield Prose(f"At most {samples['max_tokens']:,} tokens, {how}.")
    for i, prompt in enumerate(samples["prompts"]):
        yield Prose(f"[{prompt}]" if prompt else "none", "Prompt:")
        yield Columns([(name, texts[i]) for name, texts in zip(names, samples["texts"], strict=True)])


def _tiles(results: Results) -> Iterator[str]:
    """The headline figures, model by model."""
    rows, core = results["bpb"]["rows"], results["core"]
    for i, name in enumerate(_names(results)):
        bpb = rows[0]["bpb"][i] if rows else None
        against = _figure(rows[0]["differences"][i - 1]) if rows and i else "the baseline"
        yield tile(f"Bits per byte of {name}", number(bpb), against, "not evaluated")
    for i, name in enumerate(_names(results)):
        metric = core["core_metric"][i] if "core_metric" in core else None
        against = "" if metric is None else _figure(core["differences"][i - 1]) if i else "the baseline"
        yield tile(f"CORE of {name}", number(metric), against, "not evaluated")


def _names(results: Results) -> list[str]:
    return [one["name"] for one in results["subjects"]]


def _title(results: Results) -> str:
    return " and ".join(filter(None, (", ".join(_names(results)[:-1]), _names(results)[-1])))


def _level(results: Results) -> str:
    return f"{100 * results['confidence']:.3g} %"


def _against(names: Sequence[str]) -> list[str]:
    return [f"{other} {MINUS} {names[0]}" for other in names[1:]]


def _figure(difference: Results | None) -> str:
    """A difference with its interval."""
    if difference is None:
        return "not known"
    return (
        f"{_signed(difference['value'])} ({_range(difference)})"
        if difference["low"] is not None
        else f"{_signed(difference['value'])} (too few)"
    )


def _range(difference: Results) -> str:
    return f"{_signed(difference['low'])} to {_signed(difference['high'])}"


def _signed(value: float) -> str:
    """With its sign, but for a zero."""
    text = f"{abs(value):.4f}"
    return text if float(text) == 0 else ("+" if value > 0 else "-") + text


def _p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"


def _same(values: Sequence[Any]) -> str:
    if None in values:
        return "not known"
    return "yes" if len(set(values)) == 1 else "no"


def _print(fingerprint: str | None) -> str | None:
    return fingerprint[:12] if fingerprint else None


def _value(value: Any) -> str:
    return "null" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _short(value: int | None) -> str:
    return "not known" if value is None else short(value)
