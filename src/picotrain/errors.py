"""The errors a user can cause, each with the exit code its command ends with.

Whatever derives from `PicotrainError` reaches the user as one message and no traceback.
Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

from dataclasses import dataclass


class PicotrainError(Exception):
    """Base of every user-facing error; the message says what is wrong, where, and what would be right."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config: where it is, what is wrong, what would be right."""

    path: str  # dotted key, e.g. "train.seq_len"; "" when no single key is at fault
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{where}{self.message}" + (f" ({self.hint})" if self.hint else "")


class ConfigError(PicotrainError):
    """All the problems of a config at once."""

    what = "the config"

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{self.what} has {count}:\n" + "\n".join(f"  - {p}" for p in problems))


class UsageError(ConfigError):
    """All the problems of a command line at once, those of its overrides among them."""

    what = "the command line"


class DataError(PicotrainError):
    """A corpus, shard or document that cannot be used."""


class TokenizerError(PicotrainError):
    """A tokenizer that cannot be trained, loaded or trusted."""


class CheckpointError(PicotrainError):
    """A checkpoint that is missing, damaged or does not belong to this run."""


class RunError(PicotrainError):
    """A run directory that cannot be used: locked, of another experiment, unwritable."""


class LaunchError(PicotrainError):
    """Worker processes that could not be started or that failed."""

    exit_code = 1


class Diverged(PicotrainError):
    """The loss is no longer finite; the last good checkpoint is kept."""

    exit_code = 3


class OutOfMemory(PicotrainError):
    """The device has too little memory for a micro-batch; everything saved is kept."""

    exit_code = 4


class ArchiveBehind(PicotrainError):
    """The run has ended as it should, and its archive lacks the end; the run directory has everything."""

    exit_code = 5


class Hung(PicotrainError):
    """A rank made no progress and was ended; a new start goes on from the newest checkpoint (exit code: that of `timeout`)."""

    exit_code = 124


class Stopped(PicotrainError):
    """A signal ended the run early; everything is saved and `picotrain resume` goes on (exit code: EX_TEMPFAIL)."""

    exit_code = 75
