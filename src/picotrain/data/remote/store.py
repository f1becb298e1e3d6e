"""A folder of shards behind a URL: what is in it, and bytes of one file, with failures sorted into those that a retry
may mend (`Transient`) and those that it cannot (`DataError`).

HTTP is read as one stream with range and version headers, which is what makes a resume safe and needs no memory; every
other protocol by blocks through `cat_file`, which all of fsspec's file systems have. Any wait ends when `stop` is set.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Generator
from html.parser import HTMLParser
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urljoin, urlsplit

from picotrain.config.places import flaw, missing_package, redacted, scheme_of
from picotrain.data.corpus import hash_bytes
from picotrain.data.remote.errors import Cancelled, Missing, Transient, reason_of, sorted_error
from picotrain.errors import DataError

BLOCK_BYTES = 8 << 20  # a request to a store without streams
CONNECT_S = 15.0
STALL_S = 30.0  # without a byte, after which a transfer counts as broken
POLL_S = 0.1  # how often a wait looks whether it was given up
# What the stores call the thing that changes whenever a file does.
VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "checksum", "generation", "LastModified", "last_modified", "updated", "mtime")

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
            raise DataError(f"{self.shown} cannot be opened: {self._reason(error)}") from error

    def where(self, name: str = "") -> str:
        """How a file, or the folder, is called in messages: without credentials."""
        base, query, rest = self.shown.partition("?")
        return f"{base.rstrip('/')}/{name}{query}{rest}" if name else self.shown

    def files(self) -> list[RemoteFile]:
        """The files directly in the folder. Raises Missing, DataError, Transient."""
        found = self._call(self.where(), "ls", self._path(), detail=True, refresh=True)
        return [_described(info) for info in found if info.get("type") == "file"]

    def info(self, name: str) -> RemoteFile:
        """Size and version of a file as it is now. Raises Missing, DataError, Transient."""
        return _described(self._call(self.where(name), "info", self._path(name)))._replace(name=name)

    def read(self, name: str, start: int = 0, end: int | None = None, version: str = "") -> tuple[int, Bytes]:
        """Bytes [start, end) of a file: (where they really start, blocks). A server without ranges starts at 0, whatever
        was asked; one that knows versions refuses (Transient) when the file no longer has this one. Close the blocks."""
        if end is None:
            end = self.info(name).bytes
        if end is None:
            raise DataError(f"{self.where(name)}: its size is not known")
        return start, self._blocks(name, start, end)

    def _blocks(self, name: str, start: int, end: int) -> Bytes:
        while start < end:
            block = self._call(self.where(name), "cat_file", self._path(name), start=start, end=min(end, start + BLOCK_BYTES))
            if not block:
                return  # shorter than it was said to be: the reader's business
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
            raise sorted_error(error, where, self._reason(error)) from error

    def _reason(self, error: BaseException) -> str:
        return reason_of(error, self.url)


class HttpStore(Store):
    """A folder on a web server. What is in it is read from the links of its page."""

    def _options(self) -> dict[str, Any]:
        try:
            from aiohttp import ClientTimeout
        except ImportError:
            return {}  # the constructor's business
        timeout = ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=STALL_S)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # proxies, as everywhere

    def files(self) -> list[RemoteFile]:
        page = b"".join(self._stream(self._request("GET", "")))
        links = _Links()
        links.feed(page.decode(errors="replace"))
        found = {}
        folder = urlsplit(self._path()).path.rstrip("/") + "/"
        for href, text in links.found:
            target = urlsplit(urljoin(self._path().split("?")[0], href))
            name = unquote(target.path.removeprefix(folder))
            if target.path.startswith(folder) and name and not {"/", "\\", "\0"} & set(name):
                # Most servers write date and size beside the link: that is all of a version there is to have for one request.
                beside = " ".join(text.replace(name, "").split())
                found.setdefault(name, RemoteFile(name, None, f"listing:{hash_bytes(beside.encode(), 8)}" if beside else ""))
        return list(found.values())

    def info(self, name: str) -> RemoteFile:
        try:
            response = self._request("HEAD", name)
        except Missing:
            raise
        except DataError:  # a server that refuses HEAD may well answer GET, and says clearly if it does not
            return RemoteFile(name, None, "")
        size = response.headers.get("Content-Length", "")
        version = response.headers.get("ETag") or response.headers.get("Last-Modified", "")
        self._close(response)
        return RemoteFile(name, int(size) if size.isdecimal() else None, version)

    def read(self, name: str, start: int = 0, end: int | None = None, version: str = "") -> tuple[int, Bytes]:
        headers = {}
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        if version.startswith('"'):
            headers["If-Match"] = version
        elif version and not version.startswith("W/"):  # a weak ETag does not stand for bytes
            headers["If-Unmodified-Since"] = version
        response = self._request("GET", name, headers)
        if response.status != 206:
            return 0, self._stream(response)
        offset = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
        if offset != str(start):
            self._close(response)
            raise Transient(f"asked for bytes from {start:,}, the server sent {response.headers.get('Content-Range')!r}")
        return start, self._stream(response)

    def _path(self, name: str = "") -> str:
        base, query, rest = self.url.partition("?")
        return f"{base.rstrip('/')}/{quote(name)}{query}{rest}"

    def _request(self, method: str, name: str, headers: dict[str, str] | None = None) -> Any:
        """The response to a request, its body still to come. Raises for a status of 400 and above."""
        return self._run(self.where(name), self._send(method, self._path(name), headers or {}))

    async def _send(self, method: str, url: str, headers: dict[str, str]) -> Any:
        session = await self._fs.set_session()
        # Bytes as they are stored: a compressed transfer has no ranges.
        headers = {"Accept-Encoding": "identity", **headers}
        response = await session.request(method, self._fs.encode_url(url), headers=headers, allow_redirects=True)
        try:
            response.raise_for_status()
        except BaseException:
            response.close()
            raise
        return response

    def _stream(self, response: Any) -> Bytes:
        try:
            while block := self._run(redacted(str(response.url)), response.content.read(1 << 20)):
                yield block
        finally:
            self._close(response)

    def _close(self, response: Any) -> None:
        self._fs.loop.call_soon_threadsafe(response.close)


class _Links(HTMLParser):
    """(href, the text from there to the next link) of every link of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "a" and href:
            self.found.append((href, ""))

    def handle_data(self, data: str) -> None:
        if self.found:
            href, text = self.found[-1]
            self.found[-1] = (href, text + data)


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
    """An entry of fsspec's `ls` or `info`."""
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    return RemoteFile(str(info["name"]).rstrip("/").rpartition("/")[2], info.get("size"), version, _digest(info))


def _digest(info: dict[str, Any]) -> str:
    """A hash of the content among what a store tells: the Hub's sha256, Google's MD5, or an ETag of S3 that looks like one
    (of an upload in one part it is the MD5, unless the bucket encrypts: see `RemoteFiles`)."""
    import base64

    lfs = info.get("lfs")
    if lfs and (sha256 := lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)):
        return f"sha256:{sha256}"
    if info.get("md5Hash"):
        return f"md5:{base64.b64decode(info['md5Hash']).hex()}"
    etag = str(info.get("ETag") or "").strip('"').lower()
    return f"etag:{etag}" if len(etag) == 32 and not set(etag) - set("0123456789abcdef") else ""
