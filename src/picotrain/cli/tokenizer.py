"""`picotrain tokenizer eval`: how well a tokenizer compresses, on the terminal or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from picotrain import run as runs
from picotrain.cli import say
from picotrain.cli.commands import resolved
from picotrain.compression import CODE, LANGUAGES, VOCABULARIES, Evaluation, evaluate, known_vocabularies
from picotrain.data import sources, tokenizers
from picotrain.data.corpus import Corpus, read_texts
from picotrain.terminal import Printer
from picotrain.text import printable
from picotrain.tokenizer import Tokenizer, load_tokenizer

VALIDATION_BYTES = 8_000_000  # text read of a validation shard
LOST = 2  # exit code when a text did not come back as it was


def evaluate_tokenizer(overrides: Sequence[str], path: Path | None, config_dir: Path | None, as_json: bool) -> int:
    """Measure the config's tokenizer (trained if need be), or the one at `path`; the exit code."""
    config = resolved(overrides, None, config_dir)
    cache = runs.cache_dir(config)
    data = sources.gather(config.data, cache, say)
    if path is None:
        path, _ = tokenizers.obtain_tokenizer(config.tokenizer, data, cache, say)
    tokenizer = load_tokenizer(path, config.tokenizer.encoder)
    try:
        validation = [text for corpus in data.corpora for text in _validation_texts(corpus, VALIDATION_BYTES // len(data.corpora))]
    finally:
        data.close()
    results = evaluate(tokenizer, validation, known_vocabularies())
    if as_json:
        print(json.dumps(_as_json(tokenizer, config.data.name, results), indent=2))
    else:
        _show(tokenizer, config.data.name, results)
    for name in results.failures:
        say(f"{name} does not come back as it was: decoding its tokens gives other bytes")
    return LOST if results.failures else 0


def _validation_texts(corpus: Corpus, max_bytes: int) -> list[str]:
    """The first documents of the validation shard: whole row groups until there are `max_bytes` of text."""
    texts: list[str] = []
    size = 0
    with corpus.files.hold(corpus.val) as path:
        for rg in range(len(corpus.val.row_groups)):
            texts += read_texts(path.parent, corpus.val, rg)
            size += corpus.val.row_groups[rg].text_bytes
            if size >= max_bytes:
                break
    return texts


def _facts(tokenizer: Tokenizer, results: Evaluation) -> dict[str, Any]:
    return {
        "path": str(tokenizer.path),
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "vocabulary_used": results.used,
        "encoder": tokenizer.encoder,
        "encode_mb_per_s": results.encode_mb_per_s,
    }


def _as_json(tokenizer: Tokenizer, corpus: str, results: Evaluation) -> dict[str, Any]:
    texts = {
        name: {"bytes": text.bytes, "tokens": text.tokens, "bytes_per_token": text.bytes_per_token}
        | {other: text.bytes_per_token_of(other) for other in VOCABULARIES}
        for name, text in results.texts.items()
    }
    return _facts(tokenizer, results) | {"corpus": corpus, "texts": texts, "round_trip_failures": results.failures}


def _show(tokenizer: Tokenizer, corpus: str, results: Evaluation) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("text")
    for heading in ("bytes", "this one", *VOCABULARIES):
        table.add_column(heading, justify="right")
    for name, text in results.texts.items():
        others = [text.bytes_per_token_of(other) for other in VOCABULARIES]
        label = f"{corpus}, validation" if name == "validation" else name
        figures = ["not here" if figure is None else f"{figure:.2f}" for figure in others]
        table.add_row(
            printable(label),
            f"{text.bytes:,}",
            f"{text.bytes_per_token:.2f}",
            *figures,
            end_section=name in ("validation", CODE[-1], LANGUAGES[-1]),
        )
    out = Printer()
    out.table(table, "bytes per token (more is better), <|bos|> not counted")
    count = len(results.texts["validation"].others)
    out.line("")
    out.line("", str(tokenizer.path))
    out.line("", f"{tokenizer.vocab_size:,} tokens, {results.used:.1%} of them used on the validation text")
    out.line("", f"encoded by {tokenizer.encoder} at {results.encode_mb_per_s:,.1f} MB/s on one thread")
    for note in filter(None, (*tokenizer.changes, tokenizer.note)):
        out.message(f"note: {note}")
    if count < len(VOCABULARIES):
        text = "tiktoken is not installed, or its cache folder does not hold that vocabulary; nothing is downloaded"
        out.line("not here: ", text, "dim")
    if not results.failures:
        out.line("", "every text comes back as it was")
