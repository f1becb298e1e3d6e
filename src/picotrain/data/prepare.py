"""Text, Markdown, source code, JSON lines and Parquet -> a corpus of well-shaped Parquet shards.

Documents are split into training and validation by a hash of their content, so that copies never stand on both sides,
and shuffled by a seeded hash, so that the same input gives the same shards on every machine. The documents are held in
memory once. Without torch; pyarrow is imported inside functions.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from picotrain.data.corpus import ORIGIN, TEXT, Corpus, hint_for, read_footer, read_json, read_texts, scan, write_atomic
from picotrain.errors import DataError

PLAIN = (".txt", ".md")  # running text: cut when long
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (*PLAIN, ".py", *JSON_LINES, ".parquet")
INPUTS = "inputs.json"  # every input file with its size and hash, beside origin.json
VAL_FRACTION = 0.05
CUT_ABOVE, CUT_NEAR = 256 << 10, 64 << 10  # characters
ROW_GROUP_BYTES, SHARD_BYTES = 1 << 20, 64 << 20  # of text
MIN_ROW_GROUP_BYTES = 16 << 10
VERSION = 1  # part of the identity: raised when the same input would give other shards

Say = Callable[[str], None]
Progress = Callable[[int, int], None]  # bytes of input read, of all
Undecodable = Literal["error", "skip"]  # what a text file that is not UTF-8 is
Identified = tuple[str, list[tuple[str, int, str]]]  # the hash of all inputs; source, bytes and hash of each


class Input(NamedTuple):
    """A file to take documents from; `source` is how its documents name it."""

    path: Path
    source: str


class Document(NamedTuple):
    digest: bytes  # of the text: decides the split
    order: bytes  # of text, source and place: decides the order
    text: str
    source: str
    bytes: int


@dataclass
class Notes:
    """What was not taken as it was."""

    empty: int = 0
    undecodable: list[str] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)  # source -> pieces


def silent(_message: str) -> None:
    """Say nothing."""


def prepare(
    inputs: str | Path | Iterable[str | Path] | Sequence[Input],
    out: Path,
    *,
    name: str | None = None,
    undecodable: Undecodable = "error",
    identified: Identified | None = None,
    say: Say = silent,
    progress: Progress | None = None,
) -> Corpus:
    """Make the corpus folder `out` from files, folders (searched for the known suffixes) and globs.

    A folder made from the same content is kept as it is, an older one is replaced as a whole; an interrupted call leaves
    no half-made folder, and a concurrent one waits. `identified` is `identify` of the files, where that is known.
    Raises DataError for anything that cannot be used, naming it.
    """
    files = expand(inputs)
    out = Path(out).expanduser().absolute()
    name = out.name if name is None else name
    with locked(out, say):
        identity, listed = identified or identify(files)
        origin = read_json(out / ORIGIN)
        if origin is not None and origin.get("identity") == identity:
            return scan(out, name)
        if origin is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out} is there and was not made by picotrain; name another folder, or remove it")
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
        try:
            partial.mkdir()
            write_atomic(partial / INPUTS, json.dumps(listed).encode())
            _build(files, partial, identity, undecodable, say, progress)
            _put_in_place(partial, out)
        except OSError as error:  # reading errors are DataErrors by now
            raise DataError(f"{out} cannot be written: {error.strerror}; free space or name another folder") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return scan(out, name)


def expand(inputs: str | Path | Iterable[str | Path | Input]) -> list[Input]:
    """The files that are meant by files, folders and globs, sorted within each. Raises DataError when there are none."""
    found: list[Input] = []
    for item in [inputs] if isinstance(inputs, str | Path) else list(inputs):
        found += [item] if isinstance(item, Input) else _expand_one(Path(item).expanduser())
    unique = list({entry.path.absolute(): entry for entry in found}.values())
    if not unique:
        raise DataError("no input files were given")
    return unique


def identify(files: Sequence[Input]) -> Identified:
    """32 hex digits for the content of these files, and (source, bytes, hash) of each."""
    listed = [(file.source, *_size_and_hash(file.path)) for file in files]
    identity = hashlib.blake2b(json.dumps([VERSION, VAL_FRACTION, listed]).encode(), digest_size=16).hexdigest()
    return identity, listed


def cut_plain_text(text: str) -> list[str]:
    """Pieces of about 64 K characters, cut after a blank line where there is one, else after a line, else after a word.

    Joined they are the text again. Up to 256 K characters a text stays whole.
    """
    if len(text) <= CUT_ABOVE:
        return [text]
    pieces, start = [], 0
    while len(text) - start > CUT_NEAR * 3 // 2:
        end = _cut_at(text, start)
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


@contextmanager
def locked(path: Path, say: Say = silent) -> Iterator[None]:
    """Hold `path` against other processes, by a lock file beside it that vanishes with the lock."""
    lock = path.with_name(f".{path.name}.lock")
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock, "w")  # noqa: SIM115  # held open: closing it would end the lock
        except OSError as error:
            raise DataError(f"{path.parent} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that makes {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file.fileno(), lock):
            break
        file.close()  # its holder removed it when it was done: this lock protects nothing
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _expand_one(path: Path) -> list[Input]:
    if path.is_dir():
        files = sorted(_walk(path))
        if not files:
            raise DataError(f"{path} holds no file that can be read; known are {', '.join(SUFFIXES)}")
        return [Input(file, file.relative_to(path).as_posix()) for file in files]
    if not path.exists() and glob.has_magic(str(path)):
        files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [file for file in files if file.is_file() and file.name.endswith(SUFFIXES)]
        if not files:
            raise DataError(f"nothing that can be read matches {path}; known are {', '.join(SUFFIXES)}")
        base = Path(os.path.commonpath([file.parent for file in files]))
        return [Input(file, file.relative_to(base).as_posix()) for file in files]
    if not path.exists():
        raise DataError(f"there is no {path.absolute()}{hint_for(path.absolute())}")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: cannot read a {path.suffix or 'file without a suffix'}; known are {', '.join(SUFFIXES)}")
    return [Input(path, path.name)]


def _walk(folder: Path) -> Iterator[Path]:
    """Every file of a known suffix below a folder; hidden files and folders are left out."""
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]  # in place: where os.walk goes next
        yield from (Path(here, name) for name in names if name.endswith(SUFFIXES) and not name.startswith("."))


def _size_and_hash(path: Path) -> tuple[int, str]:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            return file.tell(), digest
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _build(files: Sequence[Input], folder: Path, identity: str, undecodable: Undecodable, say: Say, progress: Progress | None) -> None:
    """Shards and origin.json from the files, into `folder`."""
    notes = Notes()
    train, val = _split(list(_documents(files, notes, undecodable, progress)), files)
    _write_shards(train, val, folder, identity)
    for source, pieces in notes.cut.items():
        say(f"{source} is a plain text over {CUT_ABOVE >> 10} KB: cut into {pieces} documents at blank lines near {CUT_NEAR >> 10} KB")
    if notes.undecodable:
        say(f"skipped {len(notes.undecodable)} files that are not UTF-8")
    if notes.empty:
        say(f"left out {notes.empty} empty documents")
    text_bytes = sum(document.bytes for document in (*train, *val))
    say(f"prepared {len(train):,} training and {len(val):,} validation documents, {text_bytes / 1e6:,.1f} MB of text")
    origin = {"kind": "prepared", "identity": identity, "files": len(files), "train_documents": len(train), "val_documents": len(val)}
    origin |= {"text_bytes": text_bytes, "empty": notes.empty, "undecodable": notes.undecodable, "cut": notes.cut}
    write_atomic(folder / ORIGIN, json.dumps(origin, indent=1).encode())


def _documents(files: Sequence[Input], notes: Notes, undecodable: Undecodable, progress: Progress | None) -> Iterator[Document]:
    """Every document that is not empty, hashed."""
    sizes = [file.path.stat().st_size for file in files]
    for number, file in enumerate(files, 1):
        for place, text in enumerate(_read(file, notes, undecodable)):
            if not text or text.isspace():
                notes.empty += 1
                continue
            raw = text.encode()
            digest = hashlib.blake2b(raw, digest_size=8).digest()
            order = hashlib.blake2b(digest + f"{file.source}:{place}".encode(), digest_size=8).digest()
            yield Document(digest, order, text, file.source, len(raw))
        if progress is not None:
            progress(sum(sizes[:number]), sum(sizes))


def _read(file: Input, notes: Notes, undecodable: Undecodable) -> Iterator[str]:
    """The texts of one file."""
    if file.path.suffix == ".parquet":
        shard = read_footer(file.path)
        for rg in range(len(shard.row_groups)):
            yield from read_texts(file.path.parent, shard, rg)
    elif file.path.name.endswith(JSON_LINES):
        yield from _read_jsonl(file.path)
    else:
        text = _read_text(file.path, undecodable)
        if text is None:
            notes.undecodable.append(file.source)
            return
        pieces = cut_plain_text(text) if file.path.suffix in PLAIN else [text]
        if len(pieces) > 1:
            notes.cut[file.source] = len(pieces)
        yield from pieces


def _read_text(path: Path, undecodable: Undecodable) -> str | None:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        if undecodable == "skip":
            return None
        where = f"byte 0x{error.object[error.start]:02x} at offset {error.start:,}"
        raise DataError(f"{path} is not UTF-8 ({where}); convert it (iconv -f ... -t UTF-8) or leave it out") from None


def _read_jsonl(path: Path) -> Iterator[str]:
    """The field `text` of every line; blank lines are nothing. Bad lines are counted, and the first is named."""
    import pyarrow as pa

    bad, first = 0, ""
    try:
        with pa.input_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}.get(path.suffix)) as stream:
            for number, line in enumerate(io.BufferedReader(stream, 1 << 20), 1):  # type: ignore[type-var]  # a NativeFile is a raw stream
                if not line.strip():
                    continue
                text, reason = _text_of(line)
                if reason:
                    bad, first = bad + 1, first or f"{path}:{number}: {reason}"
                elif not bad:
                    yield text
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if bad:
        lines = "1 bad line" if bad == 1 else f"{bad:,} bad lines"
        raise DataError(f"{path} has {lines}, the first is {first}; each line must be a JSON object with a string `{TEXT}`")


def _text_of(line: bytes) -> tuple[str, str]:
    """(text, "") or ("", what is wrong)."""
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            return "", f"a JSON {type(value).__name__}, not an object"
        if TEXT not in value:
            return "", f"no field `{TEXT}`; its fields are {', '.join(value) or '(none)'}"
        if not isinstance(text := value[TEXT], str):
            return "", f"`{TEXT}` is {type(text).__name__}, not a string"
        text.encode()
        return text, ""
    except UnicodeEncodeError:
        return "", f"`{TEXT}` holds a lone surrogate"
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8
        return "", f"not JSON ({error})"


def _split(documents: list[Document], files: Sequence[Input]) -> tuple[list[Document], list[Document]]:
    """(training, validation), each in its shuffled order; equal texts go to the same side."""
    digests = sorted({document.digest for document in documents})
    if len(digests) < 2:
        what = "no document" if not documents else "one document" if len(documents) == 1 else f"{len(documents)} documents, all the same"
        where = files[0].path if len(files) == 1 else f"the {len(files)} input files"
        raise DataError(
            f"{where} gave {what}, and a corpus needs at least two different ones, to train on and to validate on; "
            f"give more files, or a plain text ({', '.join(PLAIN)}) over {CUT_ABOVE >> 10} KB, which is cut into documents"
        )
    limit = int(VAL_FRACTION * 2**64).to_bytes(8, "big")
    held_out = {digest for digest in digests if digest < limit} or {digests[0]}
    if len(held_out) == len(digests):
        held_out.remove(digests[-1])
    documents.sort(key=lambda document: document.order)
    return [d for d in documents if d.digest not in held_out], [d for d in documents if d.digest in held_out]


def _write_shards(train: list[Document], val: list[Document], folder: Path, identity: str) -> None:
    """shard_00000 .. shard_N: training shards of about 64 MiB of text, and the validation shard as the last."""
    shards = [*_runs(train, SHARD_BYTES), val]
    row_group_bytes = min(ROW_GROUP_BYTES, max(MIN_ROW_GROUP_BYTES, sum(document.bytes for document in train) // 16))
    for index, documents in enumerate(shards):
        _write_shard(documents, folder / f"shard_{index:05d}.parquet", row_group_bytes, identity)


def _write_shard(documents: list[Document], path: Path, row_group_bytes: int, identity: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # The identity of the inputs stands in the footer, so that a shard's fingerprint is one of its content.
    schema = pa.schema([(TEXT, pa.string()), ("source", pa.string())], metadata={"picotrain.identity": identity})
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False) as writer:
        for group in _runs(documents, row_group_bytes):
            columns = [[document.text for document in group], [document.source for document in group]]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=len(group))


def _runs(documents: list[Document], size: int) -> list[list[Document]]:
    """Consecutive documents in runs of at least `size` bytes; a short rest of less than half joins the run before."""
    runs: list[list[Document]] = []
    filled = size
    for document in documents:
        if filled >= size:
            runs.append([])
            filled = 0
        runs[-1].append(document)
        filled += document.bytes
    if len(runs) > 1 and filled < size // 2:
        rest = runs.pop()
        runs[-1] += rest
    return runs


def _cut_at(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends: after the last good place in the second half of 64 K characters."""
    low, high = start + CUT_NEAR // 2, start + CUT_NEAR
    for mark in ("\n\n", "\r\n\r\n", "\n", " "):
        found = text.rfind(mark, low, high)
        if found >= 0:
            return found + len(mark)
    return high


def _put_in_place(partial: Path, out: Path) -> None:
    """Rename the finished folder to `out`; an older one is moved away first and then removed."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.rename(out, old)
    os.rename(partial, out)
    shutil.rmtree(old, ignore_errors=True)
