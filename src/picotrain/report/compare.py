"""What a comparison says, from the plain results of `picotrain compare`: its headline, as Markdown and as a page of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from picotrain.markdown import Markdown, table
from picotrain.report.content import count, fill, number, percent
from picotrain.report.html import Tile
from picotrain.report.html import fill as fill_page
from picotrain.text import several, short

Results = Mapping[str, Any]
MINUS = "−"  # between names, of which one may hold a hyphen
BADGES = {  # of a page: class of the style sheet, and words
    "larger": ("finished", "larger than the noise"),
    "no larger": ("running", "no larger than the noise"),
    "not known": ("stopped", "not known"),
}


def markdown(results: Results) -> str:
    """The whole comparison as one page of Markdown."""
    tables = (subjects, differences, texts, documents, centered, accuracies, skipped, speeds, machines)
    named = {function.__name__: function for function in tables}
    return fill("compare.md.j2", r=results, title=_title(results), names=_names(results), level=_level(results), **named)


def page(results: Results) -> str:
    """The whole comparison as one HTML file that needs no other, in the style of report.html."""
    first, *others = results["verdicts"]
    badge, status = ("stopped", "compared") if set(others) - {first} else BADGES[first]
    title = _title(results)
    return fill_page(markdown(results), title, status, badge, list(_tiles(results)), "Written by picotrain compare.")


def headlines(results: Results) -> list[str]:
    """For each further model one sentence: whether its difference from the first is larger than the noise, and by which figures."""
    first, *others = _names(results)
    rows, found = results["bpb"]["rows"], []
    for i, (other, verdict) in enumerate(zip(others, results["verdicts"], strict=True)):
        bpb = rows[0]["differences"][i] if rows else None
        if bpb and bpb["low"] is not None:
            low, high = sorted((abs(bpb["low"]), abs(bpb["high"])))
            reach = f"{low:.4f} to {high:.4f}" if verdict != "no larger" else _range(bpb)
            reach = f"({_level(results)} interval {reach}, {several(rows[0]['documents'], 'document')}); {_core_clause(results, i)}."
            better, worse = (other, first) if bpb["value"] < 0 else (first, other)
            if verdict == "no larger":
                text = f"The difference of {other} from {first} is no larger than the noise: {_signed(bpb['value'])} bits per byte"
            else:
                text = f"{better} is better than {worse} by more than the noise: {abs(bpb['value']):.4f} bits per byte less"
            found.append(f"{text} {reach}")
        elif _core_difference(results, i):
            size = "larger" if verdict == "larger" else "no larger"
            found.append(f"The difference of {other} from {first} is {size} than the noise by CORE alone: {_core_clause(results, i)}.")
        else:
            found.append(f"Whether {other} differs from {first} is not known: too little was measured of both.")
    return found


def _core_clause(results: Results, i: int) -> str:
    metric = _core_difference(results, i)
    if not metric:
        return "CORE was not evaluated"
    outside = metric["low"] > 0 or metric["high"] < 0
    size = f"is {'higher' if metric['value'] > 0 else 'lower'} by more" if outside else "differs by no more"
    tests = [task["differences"][i] for task in results["core"]["tasks"] if task["differences"][i]]
    alone = sum(test["p_holm"] < 0.05 for test in tests)
    after = f", and {alone} of {len(tests)} tasks differ after Holm's correction" if alone else ""
    return f"the CORE of {_names(results)[i + 1]} {size} than the noise ({_signed(metric['value'])}, {_range(metric)}){after}"


def _core_difference(results: Results, i: int) -> Results | None:
    return results["core"].get("differences", {i: None})[i]


def subjects(results: Results) -> Markdown:
    first = _names(results)[0]
    rows = [
        (
            *(one["name"], count(one["step"]), _short(one["parameters"]), _short(one["tokens"])),
            number(one["val_bpb"]) or "not measured",
            "" if one is results["subjects"][0] else one["loop_problem"] or "yes",
        )
        for one in results["subjects"]
    ]
    return table(("model", "step", "parameters", "tokens trained", "val_bpb of its own loop", f"comparable with {first}"), rows)


def differences(results: Results, experiment: bool) -> Markdown:
    """Keys that differ, of those that make the experiment or of the others."""
    known = [i for i, one in enumerate(results["subjects"]) if one["kind"] == "run"]
    rows = [(row["key"], *(_value(row["values"][i]) for i in known)) for row in results["config"] if row["experiment"] == experiment]
    return table(("key", *(_names(results)[i] for i in known)), rows)


def texts(results: Results) -> Markdown:
    """What the models were trained on, and whether that is the same."""
    facts = {
        "corpus": lambda one: one["corpus"],
        "corpus fingerprint": lambda one: one["corpus_fingerprint"] and one["corpus_fingerprint"][:12],
        "validation shards": lambda one: ", ".join(shard[:12] for shard in one["val_shards"]),
        "tokenizer fingerprint": lambda one: one["tokenizer_fingerprint"] and one["tokenizer_fingerprint"][:12],
        "vocabulary": lambda one: count(one["vocab_size"]),
        "tokens per row (seq_len)": lambda one: count(one["seq_len"]),
        "UTF-8 bytes per token of these documents": lambda one: one["bytes_per_token"] and f"{one['bytes_per_token']:.3f}",
    }
    rows = []
    for what, fact in facts.items():
        values = [fact(one) or "not known" for one in results["subjects"]]
        same = "not known" if "not known" in values else "yes" if len(set(values)) == 1 else "no"
        rows.append((what, *values, same))
    return table(("", *_names(results), "the same?"), rows)


def documents(results: Results) -> Markdown:
    rows = [
        (
            row["origin"] or "all",
            count(row["documents"]),
            *(number(v) or "not evaluated" for v in row["bpb"]),
            *map(_figure, row["differences"]),
        )
        for row in results["bpb"]["rows"]
    ]
    return table(("source", "documents", *_names(results), *_against(results)), rows)


def centered(results: Results) -> Markdown:
    core = results["core"]
    rows = [("CORE", "", *map(number, core["core_metric"]), *map(_figure, core["differences"]))]
    for task in _done(results):
        found = [difference and difference["centered"] for difference in task["differences"]]
        rows.append((task["label"], count(task["n"]), *map(number, task["centered"]), *map(_figure, found)))
    return table(("task", "examples", *_names(results), *_against(results)), rows)


def accuracies(results: Results, i: int) -> Markdown:
    """Of the first model and of the one with this number."""
    names, rows = _names(results), []
    for task in _done(results):
        if found := task["differences"][i - 1]:
            accuracy = (number(task["accuracy"][0]), number(task["accuracy"][i]), _figure(found["accuracy"]))
            rows.append(
                (task["label"], *accuracy, count(found["only_first"]), count(found["only_other"]), _p(found["p"]), _p(found["p_holm"]))
            )
    head = (names[0], names[i], _against(results)[i - 1], f"only {names[0]}", f"only {names[i]}")
    return table(("task", *head, "p", "p (Holm)"), rows)


def skipped(results: Results) -> Markdown:
    return table(("task", "why"), [(task["label"], task["problem"]) for task in results["core"]["tasks"] if task["problem"]])


def speeds(results: Results) -> Markdown:
    rows = [
        (one["name"], f"{one['median_tok_per_sec']:,.0f}", percent(one["median_mfu"]) or "not known", _machine(one))
        for one in results["subjects"]
        if one["median_tok_per_sec"] is not None
    ]
    return table(("model", "tokens per second, median", "MFU, median", "hardware"), rows)


def machines(results: Results) -> set[str]:
    """The hardware of the models whose speed is known."""
    return {_machine(one) for one in results["subjects"] if one["median_tok_per_sec"] is not None}


def _machine(one: Results) -> str:
    return f"{one['world_size'] or '?'} x {one['hardware_name'] or '?'}"


def _done(results: Results) -> list[Results]:
    return [task for task in results["core"]["tasks"] if not task["problem"]]


def _tiles(results: Results) -> Iterator[Tile]:
    """The headline figures, model by model."""
    rows, core = results["bpb"]["rows"], results["core"]
    for what, values, against in (
        ("Bits per byte", rows and rows[0]["bpb"], rows and rows[0]["differences"]),
        ("CORE", core.get("core_metric"), core.get("differences")),
    ):
        for i, name in enumerate(_names(results)):
            value = number(values[i] if values else None)
            more = "" if not value else _figure(against[i - 1]) if i else "the baseline"
            yield f"{what} of {name}", value, more, "not evaluated"


def _names(results: Results) -> list[str]:
    return [one["name"] for one in results["subjects"]]


def _title(results: Results) -> str:
    return " and ".join(filter(None, (", ".join(_names(results)[:-1]), _names(results)[-1])))


def _level(results: Results) -> str:
    return f"{100 * results['confidence']:.3g} %"


def _against(results: Results) -> list[str]:
    first, *others = _names(results)
    return [f"{other} {MINUS} {first}" for other in others]


def _figure(difference: Results | None) -> str:
    """A difference with its interval."""
    if difference is None:
        return "not known"
    return f"{_signed(difference['value'])} ({_range(difference) if difference['low'] is not None else 'too few'})"


def _range(difference: Results) -> str:
    return f"{_signed(difference['low'])} to {_signed(difference['high'])}"


def _signed(value: float) -> str:
    """With its sign, but for a zero."""
    text = f"{abs(value):.4f}"
    return text if float(text) == 0 else ("+" if value > 0 else "-") + text


def _p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"


def _value(value: Any) -> str:
    return "null" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _short(value: int | None) -> str:
    return "not known" if value is None else short(value)
