"""Text, Markdown, source code, JSON lines, CSV and Parquet -> a corpus of well-shaped Parquet shards.

Two passes. The first hashes every document and writes it into segment files by ranges of hashes; the second reads one
range after the other, leaves out copies, shuffles by a seeded hash and writes a shard. So equal texts never stand on both
sides, and the shards depend on inputs, seed and options alone, not on the number of processes, nor on interruptions.

Memory of each process: about 250 MB with interpreter and libraries, of which 64 MiB are text; plus 400 bytes for each
document of a shard, and six times the largest document (documents over 256 MiB are not taken). That holds up to a
terabyte of text, beyond which shards grow. With `keep_duplicates` the copies of one text are held together. Disk: beside
the shards about two thirds of the text's size, until the call ends.

Without torch; pyarrow is imported inside functions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from picotrain.data.corpus import ORIGIN, Corpus, scan
from picotrain.data.prepare.cutting import CUT_ABOVE, CUT_NEAR, cut_plain_text
from picotrain.data.prepare.found import DUPLICATE, EMPTY, HARMLESS, KINDS, NOT_TEXT, NULL, SHORT, TOO_LONG, UNREADABLE, line_of
from picotrain.data.prepare.inputs import PLAIN, Identified, Input, Listed, identify
from picotrain.data.prepare.parts import Job, Part, Sizes, cut_into_parts
from picotrain.data.prepare.place import INPUTS, KEY, SKIPPED, WORK, Say, check_place, locked, put_in_place, silent
from picotrain.data.prepare.segments import EXAMPLES, Task, map_task
from picotrain.data.prepare.shards import ShardJob, ShardOptions, plan_jobs, write_job
from picotrain.data.prepare.walk import Left, expand, look
from picotrain.data.prepare.workers import WorkerLost, run
from picotrain.disk import find_json, write_whole
from picotrain.errors import DataError
from picotrain.hardware import cores
from picotrain.places import expanded

__all__ = ["CUT_ABOVE", "CUT_NEAR", "HARMLESS", "INPUTS", "KINDS", "NOT_TEXT", "SKIPPED", "Input", "Options", "Progress", "Say", "Sizes"]
__all__ += ["cut_plain_text", "expand", "identify", "locked", "look", "prepare", "silent"]

PARALLEL_ABOVE = 64 << 20  # bytes of text that are worth more processes
MAX_BUCKETS = 1 << 14
LAYOUT = 2  # of what an interrupted call leaves: one of an earlier version is begun anew

Progress = Callable[[str, int, int], object]  # what is being done, bytes of it, of all


class Options(NamedTuple):
    """What decides the shards beside the inputs.

    seed: of the order. min_chars: shorter documents are left out. keep_duplicates: do not leave out exact copies.
    tolerated: of KINDS, what is left out and listed instead of being an error.
    """

    seed: int = 0
    min_chars: int = 0
    keep_duplicates: bool = False
    tolerated: frozenset[str] = HARMLESS | {NULL}
    sizes: Sizes = Sizes()


def prepare(
    inputs: str | Path | Iterable[str | Path] | Sequence[Input],
    out: Path,
    *,
    name: str | None = None,
    identified: Identified | None = None,
    options: Options = Options(),  # noqa: B008  # immutable
    workers: int | None = None,
    say: Say = silent,
    progress: Progress = lambda what, done, total: None,
) -> Corpus:
    """Make the corpus folder `out` from files, folders (searched for the known suffixes) and globs.

    A folder made from the same content with the same options is kept as it is, an older one is replaced as a whole. An
    interrupted call leaves no half-made folder, and the next one with the same inputs and options goes on where it was;
    a concurrent one waits. `identified` is `identify` of the files, where that is known; `workers` is the number of
    processes, by default one for each core when there are over 64 MB of text.

    Beside the shards stand origin.json (counts, options, and the size and XXH3 hash of each shard), inputs.json and
    skipped.jsonl. Raises DataError for what cannot be used and is not tolerated, naming it.
    """
    out = expanded(out).absolute()
    name = out.name if name is None else name
    looked = look(inputs)
    files = [file for file in looked.files if not file.path.absolute().is_relative_to(out)]  # e.g. `prepare . --out corpus` again
    if not files:
        raise DataError(f"all the input files lie in {out}, which is to be made; name another --out")
    if (bad := next((left for left in looked.left if left.kind == UNREADABLE), None)) and UNREADABLE not in options.tolerated:
        raise DataError(f"{bad.source} cannot be read: {bad.reason}")
    for line in looked.words():
        say(line)
    with locked(out, say):
        content, listed = identified or _identify(files, options, progress)
        identity = _identity(content, options)
        origin = find_json(out / ORIGIN)
        if origin is not None and origin.get("identity") == identity and _is_whole(out, origin):
            say(f"{out} was made from the same inputs with the same options: kept as it is")
            return scan(out, name)
        partial = check_place(out)
        try:
            _Preparation(files, looked.left, listed, partial, identity, options, workers, say, progress).run()
            put_in_place(partial, out)
        except WorkerLost:
            raise
        except DataError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except OSError as error:  # reading errors are DataErrors by now
            why = error.strerror or error
            raise DataError(
                f"{out} cannot be written: {why}; free space and give the same command again: it goes on (what is done lies in {partial})"
            ) from error
    return scan(out, name)


def _identify(files: Sequence[Input], options: Options, progress: Progress) -> Identified:
    total = sum(file.path.stat().st_size for file in files if file.path.exists())
    done, lock = 0, Lock()

    def read(amount: int) -> None:
        nonlocal done
        with lock:
            done += amount
        progress("looking for changes", min(done, total), total)

    return identify(files, UNREADABLE in options.tolerated, read)


def _is_whole(out: Path, origin: dict[str, Any]) -> bool:
    """Whether every shard is there with its size. (`picotrain data verify` reads them.)"""
    try:
        return all((out / name).stat().st_size == shard["bytes"] for name, shard in origin["shards"].items())
    except OSError:
        return False


def _identity(content: str, options: Options) -> str:
    """What the shards depend on. It is part of their footers."""
    decisive = [content, options.seed, options.min_chars, options.keep_duplicates, sorted(options.tolerated), astuple(options.sizes)]
    return hashlib.blake2b(json.dumps(decisive).encode(), digest_size=16).hexdigest()


@dataclass
class _Preparation:
    """One call, in the folder `partial`, which survives an interruption."""

    files: Sequence[Input]
    left: Sequence[Left]
    listed: Listed
    partial: Path
    identity: str
    options: Options
    workers: int | None
    say: Say
    progress: Progress

    def run(self) -> None:
        """Fill the folder with the finished corpus."""
        parts, options, work = cut_into_parts(self.files, self.options.sizes), self.options, self.partial / WORK
        total = sum(part.bytes for task in parts for part in task)
        buckets = max(1, min(MAX_BUCKETS, -(-total // options.sizes.bucket)))
        workers = self.workers or (cores() if total > PARALLEL_ABOVE else 1)

        def task(number: int, parts: list[Part]) -> Task:
            files, base = tuple(self.files[part.file] for part in parts), work / f"task_{number:06d}"
            return Task(base, tuple(parts), files, buckets, options.sizes.held, options.min_chars, options.tolerated)

        tasks = [task(*numbered) for numbered in enumerate(parts)]
        self._open(tasks)
        self._run("reading", map_task, tasks, workers, total)
        mapped = [task.found() for task in tasks]
        self._check(mapped)
        for_all = ShardOptions(work / INPUTS, self.identity, options.seed, options.keep_duplicates, options.sizes.row_group)
        jobs = plan_jobs(tasks, mapped, options.sizes, for_all)
        self._run("writing shards", write_job, jobs, workers, sum(job.bytes for job in jobs))
        self._finish(tasks, mapped, jobs)

    def _open(self, tasks: Sequence[Task]) -> None:
        """The work folder, with what an earlier call has done if it was the same."""
        key = {"identity": self.identity, "layout": LAYOUT}
        if find_json(self.partial / KEY) != key:
            shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True, exist_ok=True)
        write_whole(self.partial / KEY, json.dumps(key).encode())  # first: it tells whose the folder is
        (self.partial / WORK).mkdir(exist_ok=True)
        listed = json.dumps([[str(file.path), file.source] for file in self.files])
        write_whole(self.partial / WORK / INPUTS, listed.encode())
        if done := sum(task.done.exists() for task in tasks):
            self.say(f"going on with an interrupted call: {done} of {len(tasks)} parts of the input are read")

    def _run(self, what: str, function: Callable[[Any], None], jobs: Sequence[Job], workers: int, total: int) -> None:
        left = [job for job in jobs if not job.done.exists()]
        run(function, left, workers, lambda done: self.progress(what, min(done, total), total))
        self.progress(what, total, total)

    def _check(self, mapped: Sequence[dict[str, Any]]) -> None:
        """Raise DataError unless there are two different texts."""
        count = sum(found["documents"] for found in mapped)
        if count and min(found["low"] for found in mapped) != max(found["high"] for found in mapped):
            return
        what = "no document" if not count else "one document" if count == 1 else f"{count:,} documents, all the same"
        where = self.files[0].path if len(self.files) == 1 else f"the {len(self.files):,} input files"
        skipped = [example for found in mapped for example in found["examples"]]
        raise DataError(
            f"{where} gave {what}, and a corpus needs at least two different ones, to train on and to validate on; "
            f"give more files, or a plain text ({', '.join(PLAIN)}) over {CUT_ABOVE >> 10} KB, which is cut into documents"
            + (f". What was skipped begins with: {skipped[0]}" if skipped else "")
        )

    def _finish(self, tasks: Sequence[Task], mapped: Sequence[dict[str, Any]], jobs: Sequence[ShardJob]) -> None:
        """Name the shards, the validation shard last, and write down where they come from and what was skipped."""
        written = [job.found() for job in jobs]
        val, *train = [(job, found) for job, found in zip(jobs, written, strict=True) if found["documents"]]
        width = max(5, len(str(len(train))))  # names are sorted as text
        shards = {}
        for index, (job, found) in enumerate([*train, val]):
            name = f"shard_{index:0{width}d}.parquet"
            if job.output.exists():  # else an interrupted call has moved it already
                os.replace(job.output, self.partial / name)
            shards[name] = {"bytes": found["file_bytes"], "xxh3_64": found["xxh3_64"]}
        counts = sum((Counter(found["counts"]) for found in mapped), Counter({DUPLICATE: sum(found["duplicates"] for found in written)}))
        self._summarize(mapped, counts)
        counts.update(left.kind for left in self.left)
        with open(self.partial / SKIPPED, "wb") as target:
            target.writelines(line_of(left.source, "", left.kind, left.reason).encode() for left in self.left)
            for part in (*tasks, *jobs):
                with open(part.skipped, "rb") as source:
                    shutil.copyfileobj(source, target)
        if not (self.partial / SKIPPED).stat().st_size:
            (self.partial / SKIPPED).unlink()
        write_whole(self.partial / INPUTS, json.dumps(self.listed).encode())
        documents, text_bytes = sum(found["documents"] for _, found in train), sum(found["bytes"] for found in written)
        origin = {
            "kind": "prepared",
            "identity": self.identity,
            "files": len(self.files),
            "seed": self.options.seed,
            "min_chars": self.options.min_chars,
            "keep_duplicates": self.options.keep_duplicates,
            "train_documents": documents,
            "val_documents": val[1]["documents"],
            "text_bytes": text_bytes,
            "skipped": {kind: count for kind, count in sorted(counts.items()) if count},
            "shards": shards,
        }
        write_whole(self.partial / ORIGIN, json.dumps(origin, indent=1).encode())
        text = f"{text_bytes / 1e6:,.1f} MB of text in {len(shards):,} shards"
        self.say(f"prepared {documents:,} training and {val[1]['documents']:,} validation documents, {text}")
        shutil.rmtree(self.partial / WORK)
        (self.partial / KEY).unlink()

    def _summarize(self, mapped: Sequence[dict[str, Any]], counts: Counter[str]) -> None:
        cut = [item for found in mapped for item in found["cut"].items()]
        for source, pieces in cut[:EXAMPLES]:
            where = f"at blank lines near {CUT_NEAR >> 10} KB"
            self.say(f"{source} is a plain text over {CUT_ABOVE >> 10} KB: cut into {pieces:,} documents {where}")
        if len(cut) > EXAMPLES:
            self.say(f"{len(cut) - EXAMPLES:,} more plain texts were cut so")
        for kind, count in sorted(counts.items()):
            if count:
                self.say(_left_out(kind, count, self.options.min_chars))
        if self.options.tolerated >= KINDS:  # else what is skipped was expected
            for example in [example for found in mapped for example in found["examples"]][:EXAMPLES]:
                self.say(f"  e.g. {example}")


def _left_out(kind: str, count: int, min_chars: int) -> str:
    """A line for the terminal."""
    verb, one, many, which = {
        EMPTY: ("left out", "empty document", "empty documents", ""),
        NULL: ("left out", "null", "nulls", ""),
        SHORT: ("left out", "document", "documents", f" shorter than {min_chars:,} characters"),
        DUPLICATE: ("left out", "exact duplicate", "exact duplicates", ""),
        NOT_TEXT: ("skipped", "file or row that is not UTF-8", "files or rows that are not UTF-8", ""),
        UNREADABLE: ("skipped", "file or row group that cannot be read", "files or row groups that cannot be read", ""),
        TOO_LONG: ("skipped", "document that is too long", "documents that are too long", ""),
    }.get(kind, ("skipped", kind, f"{kind}s", ""))
    return f"{verb} {count:,} {one if count == 1 else many}{which}"
