"""Shards that are somewhere else: any folder that fsspec can reach (`https://`, `s3://`, `gs://`, `hf://datasets/...`).

`list_shards` and `read_shards` tell what is there, from one listing and the ends of the files; `RemoteFiles` fetches whole
shards into a folder ahead of need. Without torch; fsspec and its protocol packages are imported when a URL is used.
"""

from picotrain.config.places import is_url, redacted
from picotrain.data.remote.files import RemoteFiles
from picotrain.data.remote.manifest import list_shards, manifest_name, read_shards
from picotrain.data.remote.store import RemoteFile

__all__ = ["RemoteFile", "RemoteFiles", "is_url", "list_shards", "manifest_name", "read_shards", "redacted"]
