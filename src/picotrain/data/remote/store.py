"""A folder of shards behind a URL: what is in it, and bytes of one file, with failures sorted into those that a retry
may mend (`Transient`) and those that it cannot (`DataError`).

HTTP is read as one stream, which needs no memory whatever the server does with ranges; every other protocol by blocks through
`cat_file`, which all of fsspec's file systems have. Any wait ends when `stop` is set.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import html
import re
import threading
from collections.abc import Callable, Coroutine, Generator
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urljoin, urlsplit

from picotrain.config.places import flaw, missing_package, redacted, scheme_of
from picotrain.data.corpus import hash_bytes
from picotrain.data.remote.errors import Cancelled, Transient, reason_of, sorted_error
from picotrain.errors import DataError

BLOCK_BYTES = 8 << 20  # a request to a store without streams
CONNECT_S = 15.0
STALL_S = 30.0  # without a byte, after which a transfer counts as broken
POLL_S = 0.1  # how often a wait looks whether it was given up
# What the stores call the thing that changes whenever a file does.
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "checksum", "generation")
VERSIONS += ("LastModified", "last_modified", "Last-Modified", "updated", "mtime")
LINK = re.compile(r"""<a\b[^>]*?\bhref\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s>]+))[^>]*>(.*?)(?=<a\b|\Z)""", re.IGNORECASE | re.DOTALL)
TAG = re.compile(r"<[^>]*>")

T = TypeVar("T")
Bytes = Generator[bytes, None, None]


class RemoteFile(NamedTuple):
    """A file as its store describes it. `version` changes with the content ("": unknown); `digest` is `algorithm:hex` of
    the content where the store tells ("": it does not)."""

    name: str
    bytes: int | None
    version: str
    digest: str = ""


def open_store(url: str, stop: threading.Event) -> Store:
    """The folder at `url`. Raises DataError when its protocol is unknown or its package is missing."""
    return HttpStore(url, stop) if urlsplit(url).scheme in ("http", "https") else Store(url, stop)


class Store:
    """The files directly in one folder of any fsspec file system."""

    def __init__(self, url: str, stop: threading.Event):
        self.url, self.shown, self._stop = url.rstrip("/"), redacted(url).rstrip("/"), stop
        if wrong := flaw(url, "read"):
            raise DataError(f"{wrong[0]} ({wrong[1]})")
        import fsspec

        scheme = scheme_of(url)
        try:
            # An instance of our own: no listing of an earlier store, and its connections end with it.
            self._fs: Any = fsspec.filesystem(scheme, skip_instance_cache=True, **self._options())
        except ImportError as error:
            _, install = missing_package(url) or ("", f"install the package that fsspec asks for ({error})")
            raise DataError(f"{self.shown}: {scheme}:// needs another package: {install}") from error
        except Exception as error:  # some connect at once (sftp://), some need to be told more than a URL does
            raise DataError(f"{self.shown} cannot be opened: {reason_of(error, self.url)}") from error

    def where(self, name: str = "") -> str:
        """How a file, or the folder, is called in messages: without credentials."""
        return _below(self.shown, name) if name else self.shown

    def files(self) -> list[RemoteFile]:
        """The files directly in the folder. Raises Missing, DataError, Transient."""
        found = self._call(self.where(), "ls", self._path(), detail=True, refresh=True)
        return [_described(info) for info in found if info.get("type") == "file"]

    def info(self, name: str) -> RemoteFile:
        """Size and version of a file as it is now. Raises Missing, DataError, Transient."""
        self._fs.invalidate_cache()
        return _described(self._call(self.where(name), "info", self._path(name)))._replace(name=name)

    def read(self, name: str, start: int = 0, end: int | None = None) -> Bytes:
        """Bytes [start, end) of a file, in blocks; to its end where None. Close it when it is not read to its end.

        Raises Missing, DataError, and Transient, also when there were fewer bytes."""
        at = start
        for block in self._blocks(name, start, end):
            block = block if end is None else block[: end - at]
            at += len(block)
            yield block
            if at == end:
                return
        if end is not None:
            raise Transient(f"it ended after {at:,} of {end:,} bytes")

    def _blocks(self, name: str, start: int, end: int | None) -> Bytes:
        if (end := self.info(name).bytes if end is None else end) is None:
            raise DataError(f"{self.where(name)}: its size is not known")
        while start < end:
            block = self._call(self.where(name), "cat_file", self._path(name), start=start, end=min(end, start + BLOCK_BYTES))
            if not block:
                return
            yield block
            start += len(block)

    def _options(self) -> dict[str, Any]:
        """Host and user of sftp://; as fsspec.core.url_to_fs does it, for a file system of our own."""
        from fsspec import get_filesystem_class

        return get_filesystem_class(scheme_of(self.url))._get_kwargs_from_urls(self.url)

    def _path(self, name: str = "") -> str:
        return self._fs._strip_protocol(f"{self.url}/{name}" if name else self.url)

    def _call(self, where: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the file system, where it can be given up: as a coroutine, or in a thread that is left behind."""
        if self._fs.async_impl:
            return self._run(where, getattr(self._fs, f"_{method}")(*args, **kwargs))
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        threading.Thread(target=_complete, args=(future, getattr(self._fs, method), args, kwargs), daemon=True).start()
        return self._wait(where, future)

    def _run(self, where: str, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._wait(where, asyncio.run_coroutine_threadsafe(coroutine, self._fs.loop))

    def _wait(self, where: str, future: concurrent.futures.Future[T]) -> T:
        try:
            while not future.done():
                if self._stop.is_set():
                    raise Cancelled
                concurrent.futures.wait([future], timeout=POLL_S)
        finally:
            future.cancel()  # nothing when it is done
        try:
            return future.result()
        except Exception as error:
            raise sorted_error(error, where, reason_of(error, self.url)) from error


class HttpStore(Store):
    """A folder on a web server. What is in it is read from the links of its page."""

    def files(self) -> list[RemoteFile]:
        page = b"".join(self._blocks("", 0, None)).decode(errors="replace")
        folder, found = urlsplit(self.url).path.rstrip("/") + "/", {}
        for *hrefs, text in LINK.findall(page):
            target = urlsplit(urljoin(_below(self.url.partition("?")[0], ""), html.unescape("".join(hrefs))))
            name = unquote(target.path.removeprefix(folder))
            if target.path.startswith(folder) and name and not {"/", "\\", "\0"} & set(name):
                # Most servers write date and size beside the link: that is all of a version there is to have for one request.
                beside = " ".join(html.unescape(TAG.sub("", text)).replace(name, "").split())
                found.setdefault(name, RemoteFile(name, None, f"listing:{hash_bytes(beside.encode(), 8)}" if beside else ""))
        return list(found.values())

    def _blocks(self, name: str, start: int, end: int | None) -> Bytes:
        response = self._run(self.where(name), self._get(self._path(name), start, end))
        skipped = start if response.status != 206 else 0  # a server without ranges begins at the beginning
        try:
            while block := self._run(self.where(name), response.content.read(1 << 20)):
                if len(block) > skipped:
                    yield block[skipped:]
                skipped = max(0, skipped - len(block))
        finally:
            self._fs.loop.call_soon_threadsafe(response.close)

    async def _get(self, url: str, start: int, end: int | None) -> Any:
        """The response to a request, its body still to come."""
        session = await self._fs.set_session()
        headers = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start else {}
        response = await session.get(self._fs.encode_url(url), headers=headers)
        try:
            response.raise_for_status()
        except BaseException:
            response.close()
            raise
        return response

    def _options(self) -> dict[str, Any]:
        try:
            from aiohttp import ClientTimeout
        except ImportError:
            return {}  # the constructor's business
        timeout = ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S)
        # Proxies, as everywhere; and bytes as they are stored, since a compressed transfer has no ranges.
        return {"client_kwargs": {"timeout": timeout, "trust_env": True, "headers": {"Accept-Encoding": "identity"}}}

    def _path(self, name: str = "") -> str:
        return _below(self.url, quote(name))


def _below(url: str, name: str) -> str:
    """The URL of a file in a folder, whose own may have a query."""
    base, query, rest = url.partition("?")
    return f"{base.rstrip('/')}/{name}{query}{rest}"


def _complete(future: concurrent.futures.Future[Any], call: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Run `call` and put what comes of it into `future`, unless nobody waits for it any more."""
    try:
        result = call(*args, **kwargs)
    except BaseException as error:
        if future.set_running_or_notify_cancel():
            future.set_exception(error)
    else:
        if future.set_running_or_notify_cancel():
            future.set_result(result)


def _described(info: dict[str, Any]) -> RemoteFile:
    """An entry of fsspec's `ls` or `info`. A hash of the content is told by the Hub (SHA-256) and by Google (MD5)."""
    lfs, digest = info.get("lfs"), ""
    if sha256 := lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None):
        digest = f"sha256:{sha256}"
    elif md5 := info.get("md5Hash"):
        digest = f"md5:{base64.b64decode(md5).hex()}"
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    return RemoteFile(str(info["name"]).rstrip("/").rpartition("/")[2], info.get("size"), version, digest)
