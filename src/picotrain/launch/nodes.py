"""Several nodes before they meet: node 0 prepares the run, perhaps for hours, and the others wait for it as long as it lives.

Node 0 keeps a store of torch's open at launch.rdzv_endpoint while it prepares. Each of the others holds a connection to it, over which
nothing is said: the kernels keep it (TCP keepalive), also while node 0's processes are slow, stopped or busy, and end it when its process
or machine is gone. No clock and no shared disk comes into that. Then node 0 closes its store, and torch opens its own in its place.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import timedelta

from picotrain.config.schema import LaunchConfig
from picotrain.errors import LaunchError
from picotrain.terminal import say
from picotrain.text import first_line

PREPARING = "picotrain/preparing"  # a key that only node 0's own store has
NODE_0_S = 3600.0  # how long the others wait for a node 0 that they have never seen: people start nodes by hand, schedulers minutes apart
LOST_S = 300.0  # and for one that is gone: it closes its store, imports and listens again, or is started again
NAME_S = 600.0  # and for its name to be known at all: schedulers announce it when they start it
POLL_S, CONNECT_S, SAY_S = 1.0, 10.0, 30.0  # how often they look, for how long a look takes at most, and a line between
ASK_S = timedelta(seconds=30)  # for an answer of node 0; then it is asked again
# A machine that says nothing for 60 + 8 x 30 s is gone.
KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 8))


@contextmanager
def preparing(launch: LaunchConfig) -> Generator[None]:
    """On node 0 of several: let the others see that it lives. Raises LaunchError where launch.rdzv_endpoint cannot be listened at."""
    if launch.nnodes == 1 or launch.node_rank > 0:
        yield
        return
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    host, port = _place(launch.rdzv_endpoint or "")
    try:
        store = TCPStore(host, port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        why = first_line(error)
        raise LaunchError(
            f"node 0 cannot listen at launch.rdzv_endpoint={launch.rdzv_endpoint} ({why}): a port that is free, and an address of this "
            "machine that it reaches itself, would be right"
        ) from error
    store.set(PREPARING, "1")
    try:
        yield
    finally:
        del store  # which closes it


def wait_for_node_0(endpoint: str, seen: bool = False) -> None:
    """Return once torch listens at node 0's host:port, which is when it has prepared the run: download, tokenizer and all.

    Torch itself gives up after one or two minutes. `seen`: node 0 has been there before. Raises LaunchError after LOST_S without a node 0
    that was there, NODE_0_S without one that never was, NAME_S for a name that nobody knows.
    """
    place = _place(endpoint)
    began_s = away_s = time.monotonic()  # away_s: since when it is not to be reached
    said_s = float("-inf")
    while True:
        why = ""
        try:
            with socket.create_connection(place, timeout=CONNECT_S) as connection:
                seen, away_s = True, time.monotonic()
                _keep_alive(connection)
                if (ready := _is_ready(place)) is True:
                    return
                while ready is False and _is_open(connection):
                    said_s = _say_waiting(endpoint, began_s, said_s, "")
                    time.sleep(POLL_S)
                away_s = time.monotonic()
        except OSError as error:
            why = error.strerror or str(error)
            limit_s = NAME_S if isinstance(error, socket.gaierror) and not seen else LOST_S if seen else NODE_0_S
            if time.monotonic() - away_s > limit_s:
                raise LaunchError(_lost(endpoint, limit_s, why, seen)) from error
        said_s = _say_waiting(endpoint, began_s, said_s, why)
        time.sleep(POLL_S)


def _place(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


def _is_ready(place: tuple[str, int]) -> bool | None:
    """Whether the store that listens is torch's for the run, and not that of a node 0 which still prepares; None: no answer."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    with suppress(RuntimeError):  # it went, or is slow
        return not TCPStore(*place, is_master=False, wait_for_workers=False, timeout=ASK_S).check([PREPARING])
    return None


def _keep_alive(connection: socket.socket) -> None:
    connection.setblocking(False)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE:
        if (option := getattr(socket, name, None)) is not None:  # macOS has not all of them
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _is_open(connection: socket.socket) -> bool:
    """Whether the other end lives, as far as the kernel knows; nothing ever comes over this connection."""
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False


def _say_waiting(endpoint: str, began_s: float, said_s: float, why: str) -> float:
    """A line now and then; when the last one was said."""
    now_s = time.monotonic()
    if now_s - said_s <= SAY_S:
        return said_s
    minutes = (now_s - began_s) / 60
    say(f"picotrain: waiting for node 0 at {endpoint}, which prepares the run; {minutes:.1f} min so far{f' ({why})' if why else ''}")
    return now_s


def _lost(endpoint: str, limit_s: float, why: str, seen: bool) -> str:
    minutes = f"{limit_s / 60:g} min"
    if seen:
        return (
            f"node 0 at launch.rdzv_endpoint={endpoint} was there and has been gone for {minutes} ({why}): it has ended, and says there why"
        )
    return (
        f"node 0 was not to be reached at launch.rdzv_endpoint={endpoint} within {minutes} ({why}): is it "
        "started, and is this its address, with a port that no firewall closes?"
    )
