"""Work that ranks share without talking to each other: they meet once, at its end, whatever became of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch

from picotrain.errors import PicotrainError
from picotrain.model import LanguageModel
from picotrain.parallel import Parallel


class EvaluationFailed(PicotrainError):
    """An evaluation that could not be finished on some rank; raised on all. trace: where, if it was a bug, else ""."""

    def __init__(self, message: str, trace: str = ""):
        super().__init__(message)
        self.trace = trace


@contextmanager
def undisturbed(model: LanguageModel) -> Generator[None]:
    """Evaluation mode, without gradients and compiled code (every batch may have a shape of its own, and would be compiled anew); then the
    model and torch's random states are as they were."""
    was_training = model.training
    model.eval()
    gpus = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), torch.random.fork_rng(gpus):
            yield
    finally:
        model.train(was_training)


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
