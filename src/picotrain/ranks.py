"""Which of several processes this is, as the environment variables of torchrun, or of our own launcher, say. Without torch.

They count only where one of the two has started this process. Everywhere else they are left over from a cluster's job script or an
older shell, and would make a process wait for ranks that nobody has started.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from picotrain import terminal
from picotrain.errors import PicotrainError
from picotrain.terminal import say

RUN_ID = "TORCHELASTIC_RUN_ID"  # set by torchrun, and by our launcher, which is torch's agent
LAUNCHER_PID = "PICOTRAIN_LAUNCHER_PID"  # set by picotrain.launch
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # "True": the agent of node 0 listens at MASTER_ADDR:MASTER_PORT
RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"
MASTER_ADDR, MASTER_PORT = "MASTER_ADDR", "MASTER_PORT"
NEEDED = (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT)
# What else comes with them; nothing is to read it once they are known to be left over.
BESIDE = (
    RUN_ID, AGENT_STORE, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_ERROR_FILE",
    "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE",
)  # fmt: skip
CONNECT_S = 5.0  # how long the agent's store gets to answer whether it is there


class BadRanks(PicotrainError):
    """Variables of torchrun that cannot be true."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that were started together. Alone: rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launched: bool = False  # by torchrun or by our launcher
    ours: bool = False  # by our launcher

    @property
    def under_torchrun(self) -> bool:
        """Whether torchrun, and not our launcher, has started this process."""
        return self.launched and not self.ours


def here() -> Ranks:
    """This process's place. Raises BadRanks where torchrun's variables are there and cannot be true."""
    if RUN_ID not in os.environ:
        return Ranks()
    problems = [f"{name}={os.environ[name]!r}" if name in os.environ else f"no {name}" for name in NEEDED if not _sound(name)]
    if not problems:
        rank, world_size, local_rank, local_world_size = (int(os.environ[name]) for name in NEEDED[:4])
        for name, value, bound, limit in (
            (RANK, rank, WORLD_SIZE, world_size),
            (LOCAL_RANK, local_rank, LOCAL_WORLD_SIZE, local_world_size),
        ):
            if value >= limit:
                problems.append(f"{name}={value} of {bound}={limit}")
        if local_world_size > world_size:
            problems.append(f"{LOCAL_WORLD_SIZE}={local_world_size} of {WORLD_SIZE}={world_size}")
        if not problems:
            return Ranks(rank, world_size, local_rank, local_world_size, launched=True, ours=_is_ours())
    raise BadRanks(
        f"{RUN_ID} says that torchrun has started this process, but its other variables cannot be true: {', '.join(problems)}; "
        f"start it with torchrun, or unset {RUN_ID}"
    )


def settle() -> Ranks:
    """`here`, to be called once when a process begins: variables that are left over are said, in one line, and dropped.

    What this process starts, and what it imports, then does not meet them either. Raises BadRanks.
    """
    if LAUNCHER_PID in os.environ and RUN_ID not in os.environ:
        del os.environ[LAUNCHER_PID]
    found = [name for name in (*NEEDED, RUN_ID) if name in os.environ]
    if RUN_ID in os.environ and not _is_gone(here()):
        return here()
    for name in (*NEEDED, *BESIDE):
        os.environ.pop(name, None)
    if found:
        are = (
            "is set, but no torchrun has started this process: it is"
            if len(found) == 1
            else "are set, but no torchrun has started this process: they are"
        )
        say(f"picotrain: {', '.join(found)} {are} ignored")
    return Ranks()


def _is_ours() -> bool:
    """Whether our launcher has started this process. One whose launcher has just died is told by `worker.watch_parent`."""
    return os.environ.get(LAUNCHER_PID, "").isdecimal()


def _sound(name: str) -> bool:
    value = os.environ.get(name, "")
    if name == MASTER_ADDR:
        return bool(value.strip()) and not set(value) & set(" /\t\n")
    if not (value.isascii() and value.isdecimal() and len(value) < 10):
        return False
    return {WORLD_SIZE: 1, LOCAL_WORLD_SIZE: 1, MASTER_PORT: 1}.get(name, 0) <= int(value) <= (65535 if name == MASTER_PORT else 1 << 30)


def _is_gone(place: Ranks) -> bool:
    """Whether the torchrun that the variables tell of is no more: then its store refuses a connection.

    Raises BadRanks where it seems to have ended a moment ago: this process must not begin to train alone.
    """
    if place.ours or os.environ.get(AGENT_STORE) != "True":
        return False
    host, port = os.environ[MASTER_ADDR], int(os.environ[MASTER_PORT])
    try:
        socket.create_connection((host, port), CONNECT_S).close()
    except socket.gaierror as error:
        raise BadRanks(
            f"{MASTER_ADDR}={host!r} is no host that can be found ({error.strerror}); start with torchrun, or unset {RUN_ID}"
        ) from error
    except ConnectionRefusedError:
        if os.getsid(0) == os.getpid() and os.getppid() == 1:  # as an agent starts its workers, and an orphan
            raise BadRanks(f"the torchrun that started this process is gone; if there was none, unset {RUN_ID}") from None
        return True
    except OSError:  # slow, or not to be reached from here: to wait for it is the process group's business
        return False
    return False


def leave(code: int, at_once: bool = False) -> int:
    """The exit code; one of several ranks, or one that is to end `at_once`, ends right here. Leaving the interpreter may wait for threads
    and for peers, which wait for this rank's end, and now and then one of torch's threads aborts in it ("terminate called without an
    active exception", seen with gloo, torch 2.13): what is finished would look failed.
    """
    if at_once or here().world_size > 1:
        terminal.flush()
        os._exit(code)
    return code
