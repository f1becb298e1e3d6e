"""Text of a data source that writes its own shards (`picotrain.contracts.Source`), kept in the cache folder."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from picotrain.contracts import Source
from picotrain.data.corpus import scan, short_hash
from picotrain.data.prepare import Say, locked
from picotrain.errors import DataError
from picotrain.signals import ending

_NOT_TEXT = {"name", "val_shard", "licence", "lanes", "unit_bytes", "on_bad_shard"}  # keys that do not change what is written


def folder_of(data: Source, cache: Path) -> Path:
    """Where its shards are, once they are written."""
    values = [data.version, data.model_dump(mode="json", exclude=_NOT_TEXT)]
    return cache / "corpora" / f"{data.kind}-{short_hash(values)}"


def make(data: Source, cache: Path, say: Say) -> Path:
    """The folder with its shards, written when it is not there: whole or not at all. Raises DataError, also for what is no corpus."""
    folder = folder_of(data, cache)
    with locked(folder, say):
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial, ending(f"writing {data.name}"):
            inner = Path(partial) / "shards"
            inner.mkdir()
            say(f"preparing {data.name}")
            data.write(inner, say)
            try:
                scan(inner, data.name, data.val_shard)
            except DataError as error:
                raise DataError(f"what data.kind={data.kind} wrote is no corpus: {str(error).replace(str(inner), 'its folder')}") from error
            inner.rename(folder)
    return folder
