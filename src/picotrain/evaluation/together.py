"""Work that ranks share without talking to each other: they meet once, at its end, whatever became of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from picotrain.errors import PicotrainError
from picotrain.parallel import Parallel


class EvaluationFailed(PicotrainError):
    """An evaluation that could not be finished on some rank; raised on all. trace: where, if it was a bug, else ""."""

    def __init__(self, message: str, trace: str = ""):
        super().__init__(message)
        self.trace = trace


def together(parallel: Parallel, work: Callable[[], Any]) -> list[Any]:
    """What `work` (without collectives) returned on each rank, as JSON, in rank order. Every rank calls it.

    Raises EvaluationFailed on every rank where it raised on any. A rank that raised brings the reason instead of a result, so nobody waits
    for it.
    """
    result, problem, trace = None, "", ""
    try:
        result = work()
    except PicotrainError as error:
        problem = str(error)
    except Exception as error:
        problem, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    everybody = parallel.gather([result, problem, trace])
    for rank, (_, found, where) in enumerate(everybody):
        if found:
            raise EvaluationFailed(found if parallel.world_size == 1 else f"rank {rank}: {found}", where)
    return [each for each, _, _ in everybody]
