"""What can go wrong between here and a store, in two kinds; credentials kept out of every message."""

from __future__ import annotations

import errno
import random
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from picotrain.config.places import redacted
from picotrain.errors import DataError

ATTEMPTS = 6  # in a row without any progress
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
LONGEST_RETRY_AFTER_S = 120.0  # a server may ask for more than a training can wait
AGAIN = "try again later: what has arrived is kept"
PASSING = {408, 412, 416, 421, 423, 425, 429}  # the client errors that another attempt may not meet

# Of a disk: what no later attempt mends by itself. A full disk may have room again.
LASTING = {errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}

T = TypeVar("T")


class Transient(Exception):
    """An attempt that failed and may succeed when repeated. `after`: seconds that the server asked to wait; `advice`: what
    to do when no attempt succeeds."""

    def __init__(self, reason: str, after: float | None = None, advice: str = AGAIN):
        super().__init__(reason)
        self.after, self.advice = after, advice


class Missing(DataError):
    """There is nothing at this URL."""


class Cancelled(Exception):
    """The wait was given up because its owner was closed."""


def retry(attempt: Callable[[], T], where: str, stop: threading.Event, say: Callable[[str], None], progress: Callable[[], int]) -> T:
    """What `attempt` returns, tried again with growing, jittered pauses as long as it raises Transient.

    Gives up with a DataError after ATTEMPTS failures in a row between which `progress()` did not grow.
    """
    failures, furthest = 0, progress()
    while True:
        try:
            return attempt()
        except Transient as error:
            reached = progress()
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            if failures >= ATTEMPTS:
                raise DataError(f"{where} cannot be fetched: {error}; {failures} attempts failed; {error.advice}") from error
            # Jitter: a thousand ranks that were refused together must not come back together.
            pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)
            pause = max(pause, min(error.after or 0.0, LONGEST_RETRY_AFTER_S))
            say(f"{where}: {error}; trying again in {pause:.1f} s, try {failures + 1} of {ATTEMPTS}")
        if stop.wait(pause):
            raise Cancelled


def sorted_error(error: Exception, where: str, reason: str) -> Exception:
    """What a third party's error is to us: Missing, a DataError that no retry mends, or Transient."""
    if isinstance(error, Transient | DataError | Cancelled):
        return error
    if isinstance(error, FileNotFoundError) and isinstance(cause := error.__cause__, Exception) and _is_of_network(cause):
        return sorted_error(cause, where, reason)  # fsspec's HTTP says "not found" whatever keeps it from knowing a size
    status = _status(error)
    names = {type(link).__name__ for link in _chain(error)}
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return Missing(f"there is nothing at {where} ({reason}); check the URL, or the rights to list it")
    if isinstance(error, PermissionError) or status in (401, 403):
        hint = "the rights of the folder" if where.startswith("file:") else "the credentials, or that the files are public"
        return DataError(f"{where}: access is refused ({reason}); check {hint}")
    if names & {"NoCredentialsError", "PartialCredentialsError"}:
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a public bucket"
        return DataError(f"{where}: there are no credentials for it; {hint}")
    if any(isinstance(link, socket.gaierror) and link.errno != socket.EAI_AGAIN for link in _chain(error)):
        return DataError(f"{where}: there is no such host ({reason}); check the URL and the network")
    if isinstance(error, OSError) and error.errno in LASTING:
        return DataError(f"{where} cannot be used: {error.strerror or reason}; another folder would be right")
    if isinstance(error, ValueError) or (status is not None and 400 <= status < 500 and status not in PASSING):
        return DataError(f"{where} cannot be read: {reason}")
    return Transient(reason, _retry_after(error))


def reason_of(error: BaseException, url: str) -> str:
    """One line about an error, without what is secret in `url`."""
    status = _status(error)
    text = next((str(link).strip() for link in _chain(error) if str(link).strip()), type(error).__name__).splitlines()[0]
    if status is not None and status >= 400 and str(status) not in text:
        text = f"HTTP {status}: {text}"
    parts = urlsplit(url)
    secrets = [parts.query, parts.username, parts.password, *(pair.partition("=")[2] for pair in parts.query.split("&"))]
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***").replace(unquote(secret), "***")
    return redacted(text)


def _is_of_network(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__module__.startswith("aiohttp")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it."""
    seen = 0
    while error is not None and seen < 10:
        yield error
        yield from (inner for inner in (getattr(error, "os_error", None),) if isinstance(inner, BaseException))  # aiohttp's
        error, seen = error.__cause__ or error.__context__, seen + 1


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error tells of: aiohttp's, httpx's and requests', botocore's, gcsfs's."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            found = getattr(response, "status_code", getattr(link, "status", None))
        if isinstance(found, int):
            return found
    code = getattr(error, "code", None) if type(error).__module__.startswith("gcsfs") else None
    return code if isinstance(code, int) else None


def _retry_after(error: BaseException) -> float | None:
    """Seconds, where the server named them (it may name a date instead: then our own pauses do)."""
    for link in _chain(error):
        headers: Any = getattr(link, "headers", None) or getattr(getattr(link, "response", None), "headers", None)
        value = headers.get("Retry-After", "") if hasattr(headers, "get") else ""
        if value.isdecimal():
            return float(value)
    return None
