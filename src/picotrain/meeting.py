"""How ranks talk before there is a process group: over the store that torchrun, or our launcher, keeps for its workers.

Torch's agents keep one store for all their restarts, and nodes do not count restarts alike, so what an earlier attempt has left
there cannot be told from what is new. Therefore each rank asks with a name of its own that no earlier one had, and rank 0 answers to that
name. The answer holds what rank 0 has to say, and a prefix of this attempt's own for all that follows, the process group's keys included.
Torch comes with the first meeting.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from picotrain.errors import LaunchError
from picotrain.ranks import Ranks
from picotrain.text import first_line

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

POLL_S = 0.05
CONNECT = timedelta(minutes=5)  # the agent's store is there before its workers are
START_S = 30 * 60.0  # between the first and the last rank at the process group's door: imports from a slow disk


class PeerFailed(LaunchError):
    """Another rank could not start; it says why itself."""


class Meeting:
    """The ranks of one start. `tell` on rank 0 and `hear` on the others; then `all_here`; then `store` is the process group's."""

    def __init__(self, place: Ranks):
        """Raise LaunchError where the store is not to be reached."""
        from torch.distributed.rendezvous import rendezvous

        self.place = place
        self._group = uuid.uuid4().hex if place.rank == 0 else ""
        try:
            self._store: Store = next(rendezvous("env://", place.rank, place.world_size, timeout=CONNECT))[0]
        except (RuntimeError, ValueError) as error:
            raise LaunchError(
                f"rank {place.rank} does not reach torchrun's store at MASTER_ADDR:MASTER_PORT: {first_line(error)}"
            ) from error

    @property
    def store(self) -> Store:
        """Keys of this start alone."""
        from torch.distributed.distributed_c10d import PrefixStore

        return PrefixStore(f"picotrain/{self._group}", self._store)

    def tell(self, value: dict[str, Any], within_s: float = START_S) -> None:
        """Rank 0: give every other rank `value`. Raises LaunchError when one has not come within `within_s`."""
        answer = json.dumps(value | {"group": self._group})
        waiting = dict.fromkeys(range(1, self.place.world_size), "")  # the name that each was last answered to

        def all_heard() -> bool:
            for rank in list(waiting):
                name = self._read(f"picotrain/name/{rank}")
                if name and name != waiting[rank]:
                    self._store.set(f"picotrain/answer/{name}", answer)
                    waiting[rank] = name
                if name and self._read(f"picotrain/{self._group}/heard/{rank}"):
                    del waiting[rank]
            return not waiting

        self._until(all_heard, within_s, lambda: f"rank {min(waiting)} has not come within {within_s / 60:g} min")

    def hear(self) -> dict[str, Any]:
        """The others: what rank 0 tells, for as long as that takes. Raises LaunchError when the store is gone."""
        name = uuid.uuid4().hex
        self._call(lambda: self._store.set(f"picotrain/name/{self.place.rank}", name))
        self._until(lambda: bool(self._read(f"picotrain/answer/{name}")), None, str)
        value = json.loads(self._read(f"picotrain/answer/{name}"))
        self._group = value.pop("group")
        self._call(lambda: self._store.set(f"picotrain/{self._group}/heard/{self.place.rank}", "1"))
        return value

    def all_here(self) -> None:
        """Wait until every rank has come as far. Raises LaunchError when one has not after START_S, PeerFailed when one has failed.

        Torch's own ways to wait are in native code, where no signal ends them.
        """
        self._call(lambda: self._store.add(f"picotrain/{self._group}/here", 1))

        def come() -> bool:
            if self._read(f"picotrain/{self._group}/failed"):
                raise PeerFailed(f"rank {self._read(f'picotrain/{self._group}/failed')} could not start; it says why")
            return int(self._read(f"picotrain/{self._group}/here")) >= self.place.world_size

        self._until(come, START_S, lambda: f"only some of {self.place.world_size} ranks have come within {START_S / 60:g} min")

    def fail(self) -> None:
        """Tell those who wait in `all_here` that this rank will not come."""
        self._call(lambda: self._store.set(f"picotrain/{self._group}/failed", str(self.place.rank)))

    def remember(self, key: str, value: str) -> None:
        """Keep a value for starts that follow in the same torchrun."""
        self._call(lambda: self._store.set(f"picotrain/{key}", value))

    def remembered(self, key: str) -> str:
        """What `remember` kept; "" for nothing."""
        return self._read(f"picotrain/{key}")

    def _read(self, key: str) -> str:
        """A key's value, "" where there is none; never waits."""
        return self._call(lambda: self._store.get(key).decode() if self._store.check([key]) else "")

    def _until(self, done: Callable[[], bool], within_s: float | None, late: Callable[[], str]) -> None:
        started = time.monotonic()
        while not self._call(done):
            if within_s is not None and time.monotonic() - started > within_s:
                raise LaunchError(late())
            time.sleep(POLL_S)

    def _call(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except RuntimeError as error:  # torch's DistError among them
            raise LostStore(f"rank {self.place.rank} has lost the others: torchrun's store is gone ({first_line(error)})") from error


class LostStore(PeerFailed):
    """The agent that kept the store has ended: what happened was said there."""
