"""`picotrain data prepare | inspect | verify | download`: corpora made, looked at, proved and fetched."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.table import Table

from picotrain import invocation
from picotrain.cli.bars import BAR_WIDTH, bars
from picotrain.config import places
from picotrain.data import inspect as inspecting
from picotrain.data.folder import has_shards
from picotrain.data.inspect import Inspection, Verification
from picotrain.data.prepare import HARMLESS, KINDS, SKIPPED, Options, silent
from picotrain.data.prepare import prepare as prepare_corpus
from picotrain.errors import ConfigError, DataError
from picotrain.places import expanded
from picotrain.terminal import LABEL_WIDTH, Printer, is_terminal, say
from picotrain.text import several, short, size

SHOWN = 10  # special texts, bad shards without a hash
INTERRUPTED = 130  # the shell's code for Ctrl-C


def prepare(
    inputs: Sequence[Path], out: Path, *, seed: int, min_chars: int, keep_duplicates: bool, workers: int | None, strict: bool
) -> int:
    """Make a corpus folder and say what is in it; the exit code."""
    options = Options(seed, min_chars, keep_duplicates, tolerated=HARMLESS if strict else KINDS)
    try:
        with bars(in_bytes=True) as show:
            corpus = prepare_corpus(list(inputs), out, options=options, workers=workers, say=say, progress=show)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return INTERRUPTED
    rows = {
        "folder": str(corpus.root),
        "training": f"{several(len(corpus.shards), 'shard')}, {several(corpus.documents, 'document')}, {size(corpus.text_bytes)} of text",
        "validation": f"{corpus.val.name}, {several(corpus.val.rows, 'document')}, {size(corpus.val.text_bytes)} of text",
    }
    if (corpus.root / SKIPPED).exists():
        rows["left out"] = f"listed in {corpus.root / SKIPPED}"
    printer = Printer()
    printer.facts(rows)
    folder = shlex.quote(f"data.path={invocation.shown(corpus.root)}")
    printer.command(f"{'next':<{LABEL_WIDTH}} ", f"{invocation.command()} train data=files {folder}")
    return 0


def inspect(corpus: str, tokenizer: Path | None, max_bytes: int | None, samples: int, seed: int, as_json: bool) -> None:
    """Print what is in a corpus."""
    encoder = None
    if tokenizer is not None:
        from picotrain.tokenizer import load_tokenizer

        encoder = load_tokenizer(tokenizer)
    folder = corpus_folder(corpus)
    with bars(in_bytes=True, quiet=as_json) as show:
        told = silent if as_json and not is_terminal(sys.stderr) else say
        found = inspecting.inspect(folder, tokenizer=encoder, max_bytes=max_bytes, samples=samples, seed=seed, progress=show, say=told)
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        _show_inspection(found)


def verify(corpus: str) -> int:
    """Print what is bad in a corpus; 2 when anything is."""
    from picotrain import run as runs
    from picotrain.config import compose

    folder = corpus_folder(corpus)
    with bars(in_bytes=True) as show:
        found = inspecting.verify(folder, show, runs.cache_dir(compose()))
    _show_verification(found)
    if not found.bad:
        return 0
    count = len({item.shard for item in found.bad})
    lines = "".join(f"\n  - {item}" for item in found.bad)
    raise DataError(
        f"{count:,} of {several(found.shards, 'shard')} in {folder} {'is' if count == 1 else 'are'} bad; make or fetch them again:{lines}"
    )


def download(name: str, overrides: Sequence[str], shards: int | None, config_dir: Path | None) -> None:
    """Fetch shards of a data set on the Hub into the cache, as many as said or as a run of these words needs, and say where they are."""
    from picotrain import run as runs
    from picotrain.cli.commands import resolved
    from picotrain.cli.show import corpus_table
    from picotrain.config.groups import choices
    from picotrain.data import sources

    if name not in choices("data", config_dir) or _data_kind(name, config_dir) != "hub":
        names = [choice for choice in choices("data", config_dir) if _data_kind(choice, config_dir) == "hub"]
        raise DataError(f"{name!r} is no data set on the Hub; those there are: {', '.join(names)} (more of your own with --config-dir)")
    extra = [] if shards is None else [f"data.num_shards={shards}"]
    config = resolved([*overrides, f"data={name}", *extra], None, config_dir)
    if not any(word.startswith("data.num_shards=") for word in (*overrides, *extra)):
        plan = runs.preview(config)
        run = f"`picotrain train {' '.join([*overrides, f'data={name}'])}`"
        count = f"{several(config.data.num_shards or 0, 'training shard')}: {run} passes over them {plan.epochs or 0:.2f} times"
        say(f"{count} in {several(plan.num_steps, 'step')}; --shards N takes another number")
    try:
        corpus = sources.resolve(config.data, runs.cache_dir(config), say)
    except KeyboardInterrupt:
        say("interrupted; what is there is kept, and the same command goes on")
        raise SystemExit(INTERRUPTED) from None
    corpus_table(corpus, config)


def corpus_folder(corpus: str) -> Path:
    """The folder of shards that is meant: CORPUS itself, or what `data=files data.path=CORPUS` was prepared into. Raises DataError."""
    if wrong := places.flaw(corpus, "read"):
        raise DataError(f"{wrong[0]} ({wrong[1]})")
    if places.is_url(corpus):
        raise DataError(f"{corpus} is remote; fetch the shards into a folder first, and name that")
    path = expanded(corpus).absolute()
    if has_shards(path):
        return path
    from pydantic import ValidationError

    from picotrain import run as runs
    from picotrain.config import compose
    from picotrain.config.schema import DataConfig
    from picotrain.data import sources

    known = None
    with suppress(ValidationError):  # a path that the locale cannot read
        known = sources.known(DataConfig(kind="files", name=path.name, path=str(path)), runs.cache_dir(compose()))
    if known is None:
        raise DataError(f"{path} is no folder of Parquet shards; make one of it: `picotrain data prepare {path} --out DIR`")
    return known.root


def _data_kind(choice: str, config_dir: Path | None) -> str | None:
    """The kind of a choice of the data group; None where it cannot be composed on its own."""
    from picotrain.config import compose

    try:
        return compose([f"data={choice}"], config_dir=config_dir).data.kind
    except ConfigError:
        return None


def _show_inspection(found: Inspection) -> None:
    share = (
        "" if found.documents_read == found.documents else f" (of {several(found.documents_read, 'document')}, {size(found.bytes_read)})"
    )
    file_size, largest = size(found.file_bytes), size(found.largest_row_group_bytes)
    quantiles = ", ".join(f"{name} {value:,}" for name, value in found.quantiles_bytes.items())
    special = [f"{name} in {several(count, 'document')}" for name, count in list(found.special_text.items())[:SHOWN]]
    special += [f"{len(found.special_text) - SHOWN:,} more"] if len(found.special_text) > SHOWN else []
    invalid = several(found.invalid_utf8_documents, "document")
    if (first := found.first_invalid_utf8) is not None:
        invalid += f"; the first is {first.shard}, row group {first.row_group}, row {first.row}"
    rows = {
        "shards": f"{found.shards:,}, {file_size}; {found.validation_shard} validates",
        "documents": f"{found.documents:,}",
        "text": f"{size(found.text_bytes)} by the footers",
        "row groups": f"{found.row_groups:,}, the largest has {largest} of text",
    }
    if share:
        rows["read"] = f"{several(found.documents_read, 'document')}, {size(found.bytes_read)}: the rest is of these"
    if found.tokens is not None and found.bytes_per_token is not None:
        rows["tokens"] = f"{short(found.tokens)}, {found.bytes_per_token:.3f} bytes per token (a <|bos|> before each document counted)"
    rows |= {
        "length in bytes": f"mean {found.mean_bytes:,.0f}; {quantiles}",
        "exact duplicates": f"{several(found.duplicate_documents, 'document')} beyond the first of "
        f"{several(found.duplicated_texts, 'text')}; validation documents that are trained on too: {found.validation_duplicates:,}",
        "special-token text": f"{', '.join(special) or 'none'}{' (it stays text)' if special else ''}",
        "empty and null": f"{found.empty_documents:,} empty, {found.null_documents:,} null",
        "invalid UTF-8": invalid,
    }
    out = Printer()
    out.facts(rows, found.folder)
    if found.histogram:
        out.line("")
        room = out.rich.width - 32 if out.rich else BAR_WIDTH  # beside the three numbers
        out.table(_histogram(found.histogram, max(1, min(BAR_WIDTH, room))), "documents by length in bytes")
    for sample in found.samples:
        cut = "" if sample["bytes"] <= len(sample["text"].encode()) else " ..."
        out.line("")
        out.line("", f"{sample['shard']}, row group {sample['row_group']}, row {sample['row']}, {sample['bytes']:,} bytes:", "dim")
        out.line("", sample["text"] + cut)


def _histogram(bins: Sequence[tuple[int, int, int]], bar_width: int) -> Table:
    """A row for each power of two."""
    table = Table(box=None, pad_edge=False)
    table.add_column("from", justify="right", style="dim")
    table.add_column("below", justify="right", style="dim")
    table.add_column("documents", justify="right")
    table.add_column()
    most = max(count for *_, count in bins)
    for low, high, count in bins:
        bar = "█" * round(bar_width * count / most) or ("▏" if count else "")
        table.add_row(f"{low:,}", f"{high:,}", f"{count:,}", bar)
    return table


def _show_verification(found: Verification) -> None:
    rows = {"read": f"{several(found.shards, 'shard')}, {size(found.file_bytes)}, page checksums on where there are any"}
    rows["content hashes"] = _compared(found.shards, found.unhashed, "origin.json", "it is only known that they can be read")
    rows["fingerprints"] = _compared(found.shards, found.unlisted, "data.json", "their footers were compared with nothing")
    rows["result"] = "every shard is good" if not found.bad else f"{several(len(found.bad), 'problem')}"
    Printer().facts(rows, found.folder)


def _compared(shards: int, missing: Sequence[str], where: str, meaning: str) -> str:
    if not missing:
        return f"all compared with {where}"
    if len(missing) == shards:
        return f"none in {where}: {meaning}"
    names = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN:,} more" if len(missing) > SHOWN else "")
    return f"none in {where} for {len(missing):,} of {shards:,} ({names}): {meaning}"
