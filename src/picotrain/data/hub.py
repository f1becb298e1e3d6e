"""What huggingface_hub tells of its retries, as a line each."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from urllib.parse import urlsplit

_FAILED = re.compile(r"(?P<reason>.+) thrown while requesting \w+ (?P<url>\S+)", re.DOTALL)
_AGAIN = re.compile(r"(?:Retrying in|Waiting) (?P<pause>[\d.]+)s.*\[Retry (?P<number>\d+)/(?P<retries>\d+)\]", re.DOTALL)


@contextmanager
def retries_said(say: Callable[[str], None]) -> Generator[None]:
    """While it is entered, `say` gets one line for each retry, however many threads download; else the library logs two for each of them.

    What else it logs stays one line. A version that words them otherwise is passed on line by line.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils.logging import get_logger

    get_logger()  # the first call gives the library's logger the handler that is put aside here
    logger = logging.getLogger("huggingface_hub")
    handlers: list[logging.Handler] = [_Retries(say, urlsplit(constants.ENDPOINT).netloc)]
    before, logger.handlers = logger.handlers, handlers
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before, propagate


class _Retries(logging.Handler):
    def __init__(self, say: Callable[[str], None], host: str):
        super().__init__(logging.WARNING)
        self._say, self._host, self._reason = say, host, "no answer"
        self._silent_until: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if failed := _FAILED.fullmatch(text):
            self._reason = failed["reason"].strip("'\"").splitlines()[0]
            return
        pause = 0.0
        if again := _AGAIN.search(text):
            pause = float(again["pause"])
            tries = f"try {int(again['number']) + 1} of {int(again['retries']) + 1} in {pause:g} s"
            text = f"cannot reach {self._host} ({self._reason}); {tries}"
        if time.monotonic() >= self._silent_until.get(text, 0.0):  # the other threads have met the same
            self._silent_until[text] = time.monotonic() + max(pause, 1.0)
            self._say(" ".join(text.split()))
