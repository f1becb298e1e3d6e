"""What has to be known before two models are compared: where their training or their measurement was not the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from picotrain.config.identity import flatten, makes_experiment
from picotrain.config.schema import Config
from picotrain.text import short

Facts = Mapping[str, Any]
# These tell one run from another and change nothing.
NAMES = ("schema_version", "run.name", "run.dir", "run.cache_dir", "run.resume")


def warnings(facts: Sequence[Facts], scored: Facts) -> list[str]:
    """Every way in which models 2, 3, ... are not comparable with the first; `scored`: of the run whose validation text is used."""
    first, *others = facts
    found = [warning for other in others for warning in _between(first, other)]
    return found + [warning for one in facts if one is not scored for warning in _seen(one, scored)]


def loop_problem(first: Facts, other: Facts) -> str:
    """Why the bits per byte that two training loops measured do not compare; "" where they do."""
    if first["val_bpb"] is None or other["val_bpb"] is None:
        return "not measured" if other["val_bpb"] is None else "nothing to compare with"
    reasons = {
        "tokenizer": "tokenizer_fingerprint",
        "seq_len": "seq_len",
        "validation text": "val_shards",
        "number of validation rows": "eval_rows",
    }
    different = [what for what, key in reasons.items() if first[key] != other[key] and None not in (first[key], other[key])]
    if different:
        return f"no: different {' and '.join(different)}"
    unknown = [what for what, key in reasons.items() if None in (first[key], other[key])]
    return f"not known: whether the {' and the '.join(unknown)} were the same" if unknown else ""


def _between(first: Facts, other: Facts) -> Iterator[str]:
    a, b = first["name"], other["name"]
    if "hf" in (first["kind"], other["kind"]):
        outside = b if other["kind"] == "hf" else a
        yield f"{outside} is a Hugging Face model: what it was trained on, on how much of it, and at what precision is not known here."
    elif first["corpus_fingerprint"] != other["corpus_fingerprint"]:
        text = f"The training data differ: {a} read {first['corpus']!r}, {b} {other['corpus']!r}"
        yield f"{text}{', which is not the same text' if first['corpus'] == other['corpus'] else ''}."
    same_tokenizer = _same_tokenizer(first, other)
    if same_tokenizer is None:
        yield (
            f"Whether {a} and {b} have the same tokenizer is not known: losses per token may not compare, bits per byte of whole "
            "documents do."
        )
    elif not same_tokenizer:
        yield (
            f"The tokenizers of {a} and {b} differ: losses per token do not compare, bits per byte of whole documents do; "
            "a window of as many tokens shows them different amounts of text."
        )
    if _differ(first, other, "seq_len"):
        yield (
            f"{a} was trained on rows of {_count(first['seq_len'])} tokens, {b} of {_count(other['seq_len'])}: documents are scored in "
            "windows that fit both, so that the longer context gains nothing here."
        )
    if first["val_shards"] and other["val_shards"] and first["val_shards"] != other["val_shards"]:
        yield f"The validation shards of {a} and {b} differ: what their training loops measured does not compare."
    if _differ(first, other, "tokens") and None not in (first["tokens"], other["tokens"]):
        ratio = _ratio(first["tokens"], other["tokens"])
        yield f"{a} was trained on {short(first['tokens'])} tokens, {b} on {short(other['tokens'])}{ratio}."
    if first["kind"] == other["kind"] == "run" and first["precision"] != other["precision"]:
        yield f"{a} computes in {first['precision']}, {b} in {other['precision']}."


def _seen(one: Facts, scored: Facts) -> Iterator[str]:
    """Whether a model may have been trained on the text that all are measured on."""
    a, b = scored["name"], one["name"]
    if one["kind"] == "hf":
        yield f"{b} may have been trained on the documents of {a}'s validation shard: nothing is known of its data."
    elif set(scored["val_shards"]) & set(one["train_shards"]):
        yield f"{b} was trained on the validation shard of {a}, on which all are measured here: its bits per byte are no fair figure."
    elif scored["val_shards"] != one["val_shards"]:
        yield f"{b} may have been trained on documents of {a}'s validation shard: its corpus is another one, with another validation shard."


def config_differences(configs: Sequence[Config | None]) -> list[dict[str, Any]]:
    """The keys in which the configs of the runs (None: no run) are not all the same: {key, values, experiment}, those first that make
    the experiment."""
    flat = [flatten(config) if config else None for config in configs]
    known = [values for values in flat if values is not None]
    keys = [key for key in known[0] if key not in NAMES and any(values[key] != known[0][key] for values in known[1:])]
    rows = [
        {"key": key, "values": [values[key] if values else None for values in flat], "experiment": makes_experiment(key)} for key in keys
    ]
    return sorted(rows, key=lambda row: not row["experiment"])


def seeds_only(differences: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the experiments are the same but for their seed."""
    return [row["key"] for row in differences if row["experiment"]] == ["run.seed"]


def _same_tokenizer(first: Facts, other: Facts) -> bool | None:
    """None: not known. Of a Hugging Face folder no more is known than how many tokens it has."""
    for key in ("tokenizer_fingerprint", "vocab_size"):
        if None not in (first[key], other[key]):
            same = first[key] == other[key]
            return same if key == "tokenizer_fingerprint" or not same else None
    return None


def _differ(first: Facts, other: Facts, key: str) -> bool:
    return first[key] != other[key]


def _count(value: int | None) -> str:
    return "any number of" if value is None else f"{value:,}"


def _ratio(first: int, other: int) -> str:
    if not first or not other:
        return ""
    return f", a factor of {max(first, other) / min(first, other):.3g}"
