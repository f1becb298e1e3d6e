"""The workers of one node under torch's elastic agent, with our rules for signals, exit codes and noise.

Torch's agent ends workers at once on a signal, calls every exit code but 0 a failure, and gives the other ranks 30 s to
react to one. Here a signal is passed on and the workers get launch.grace_s to save; exit code 75 means "stopped, saved";
and once a rank has failed the others are killed, since they can only wait for it in a collective. Then the group is started
again from the newest checkpoint, launch.max_restarts times, unless a user's mistake or a stop ended it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SubprocessContext
from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from picotrain import hardware, invocation
from picotrain.config.schema import LaunchConfig
from picotrain.errors import ArchiveBehind, Diverged, Hung, LaunchError, OutOfMemory, PicotrainError, Stopped
from picotrain.launch.nodes import wait_for_node_0
from picotrain.parallel import STACKS_SIGNAL
from picotrain.ranks import LAUNCHER_PID
from picotrain.signals import PATIENCE_S, STOP_SIGNALS, StopSignal, ending, noticed
from picotrain.terminal import say

POLL_S = 0.1  # how often the agent looks at its workers
JOIN_TIMEOUT_S = 600  # how long nodes wait for each other: schedulers start them minutes apart at worst
STACKS_S = 0.3  # what a rank gets to print its stacks in
KILL_WAIT_S = 10  # how long a killed worker may take to go; one stuck in a driver call is given up
DONE = (0, Stopped.exit_code, ArchiveBehind.exit_code)  # of workers whose run is saved
SPOKEN = (PicotrainError.exit_code, Diverged.exit_code, OutOfMemory.exit_code)  # of workers that have told the user what is wrong


def run_workers(command: Sequence[str], nproc: int, launch: LaunchConfig, run_id: str) -> int:
    """Run `command` as nproc ranks of this node; the exit code as in `picotrain.launch.launch`."""
    environment = {
        LAUNCHER_PID: str(os.getpid()),  # workers end when this process is gone
        invocation.COMMAND: invocation.command(),
        "OMP_NUM_THREADS": str(max(1, hardware.cores() // nproc)),  # until the worker sets its own number
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",  # leave ours alone; torch insists on one
    }
    with _environment(environment), _quiet():
        try:
            for number in count(1):
                with ending("waiting for node 0" if launch.node_rank else "starting the workers"):
                    if launch.node_rank:
                        wait_for_node_0(launch.rdzv_endpoint or "", seen=number > 1)
                    spec = _spec(command, nproc, launch, run_id)
                agent = Agent(spec, launch)
                try:
                    return agent.train()
                except WorkersDied as died:
                    if number > launch.max_restarts:
                        raise
                    # All anew, the meeting place too: started again by torch's own agent, workers now and then wait for
                    # each other for ever in gloo (torch 2.13).
                    say(f"picotrain: {died}\nstarting the workers again, {number} of {launch.max_restarts} times")
            raise AssertionError("not reached")
        except RendezvousError as error:
            where = launch.rdzv_endpoint or "this machine"
            raise LaunchError(f"this node could not meet the others at {where}, or lost them: {error.__cause__ or error}") from error


class WorkersDied(LaunchError):
    """Workers ended without having said why; a new start may well go on."""


class Agent(LocalElasticAgent):
    """Torch's agent of one node's workers."""

    def __init__(self, spec: WorkerSpec, launch: LaunchConfig):
        super().__init__(spec, logs_specs=_PassThrough())
        self._node_rank, self._grace_s = launch.node_rank, launch.grace_s
        self._deadline: float | None = None  # when workers that were asked to stop are killed
        self._late = False  # they were
        self._stopped = False  # a worker has ended with 75
        self._behind = False  # one has ended with 5: the archive lacks the end
        self._ended = threading.Event()  # nothing that could wait is left to do
        self._failed: dict[int, tuple[int, int]] = {}  # global rank -> pid, exit code; not those that were killed for it

    def train(self) -> int:
        """Start the workers, see them to their end; the exit code."""
        handler, quit_handler = self.get_worker_group().spec.rdzv_handler, signal.getsignal(signal.SIGQUIT)
        with StopSignal(on_first=self._forward, on_second=self._end_at_once) as stop, noticed(self._insist):
            try:
                result = self.run()
            except SystemExit as ended:
                return int(ended.code or 0)
            except SignalException as ended:  # SIGQUIT
                return 128 + ended.sigval
            finally:
                self._kill()
                handler.shutdown()
                self._ended.set()
                if signal.getsignal(signal.SIGQUIT) is not quit_handler:
                    signal.signal(signal.SIGQUIT, quit_handler)
        if result is None:
            raise LaunchError("the other nodes have started without this one; launch.nnodes or launch.node_rank must be wrong")
        return self._exit_code(stop.signum)

    def _exit_code(self, signum: int | None) -> int:
        if self._late:
            within = f"launch.grace_s={self._grace_s:g}"
            raise LaunchError(f"the workers did not stop within {within} and were killed; a resume goes on from the last save")
        # A worker that dies of the signal that was passed on had not begun, or had ended: nothing is lost.
        failed = {rank: end for rank, end in self._failed.items() if signum is None or end[1] != -signum}
        if not failed and self._behind:
            return ArchiveBehind.exit_code
        if not failed:
            return Stopped.exit_code if self._stopped or self._failed else 0
        spoken = [code for _, code in failed.values() if code in SPOKEN]
        if spoken:
            return spoken[0]
        obituaries = "\n".join(_obituary(rank, pid, code) for rank, (pid, code) in sorted(failed.items()))
        raise (WorkersDied if signum is None else LaunchError)(obituaries)

    def _processes(self) -> dict[int, subprocess.Popen[Any]]:
        """This node's workers by local rank, once they are started."""
        if not isinstance(self._pcontext, SubprocessContext):
            return {}
        return {rank: handler.proc for rank, handler in self._pcontext.subprocess_handlers.items()}

    def _forward(self, signum: int) -> None:
        if not self._processes():
            raise SystemExit(Stopped.exit_code)  # nothing is running that could be saved
        self._deadline = time.monotonic() + self._grace_s
        for process in self._processes().values():
            process.send_signal(signum)

    def _insist(self, signum: int) -> None:
        """End where there are no workers yet and the main thread does not notice a signal: torch waits for other nodes in native code."""
        if signum in STOP_SIGNALS and not self._processes() and not self._ended.wait(PATIENCE_S) and not self._processes():
            os._exit(Stopped.exit_code)

    def _end_at_once(self, signum: int) -> None:
        self._kill()
        raise SystemExit(128 + signum)

    def _kill(self) -> None:
        """Kill whatever is left of the workers and of what they have started: each leads a process group of its own."""
        for process in self._processes().values():
            with suppress(ProcessLookupError, PermissionError):  # gone; macOS says so with the latter
                os.killpg(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + KILL_WAIT_S
        for process in self._processes().values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))

    def _ask_for_stacks(self) -> None:
        """Let the ranks that are left say where they are: a hang is understood from all of them."""
        say("picotrain: where the other ranks are:")
        for process in self._processes().values():
            if process.poll() is None:
                process.send_signal(STACKS_SIGNAL)
                time.sleep(STACKS_S)  # one after the other, so that they can be told apart

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """One look at the workers: running, all done (finished or stopped), or failed, and then the rest is killed."""
        processes = self._processes()
        codes = {rank: process.poll() for rank, process in processes.items()}
        failed = {rank: code for rank, code in codes.items() if code is not None and code not in DONE}
        self._stopped = Stopped.exit_code in codes.values()
        self._behind = ArchiveBehind.exit_code in codes.values()
        if failed:
            if not self._failed and not self._late:
                self._failed = {worker_group.workers[rank].global_rank: (processes[rank].pid, code or 0) for rank, code in failed.items()}
            if Hung.exit_code in failed.values():
                self._ask_for_stacks()
            self._kill()
            return RunResult(state=WorkerState.FAILED)
        if None not in codes.values():
            # Torch then waits for the other nodes, so that the store of node 0 outlives them.
            return RunResult(state=WorkerState.SUCCEEDED, return_values={worker.global_rank: None for worker in worker_group.workers})
        if self._stopped and self._deadline is None:  # by another node, or by a signal of its own
            self._deadline = time.monotonic() + self._grace_s
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._late = True
            self._kill()
        return RunResult(state=WorkerState.HEALTHY)

    def _assign_worker_ranks(self, store: Any, group_rank: int, group_world_size: int, spec: WorkerSpec):
        """Ranks in the order of launch.node_rank; the rendezvous alone would order nodes by name."""
        return super()._assign_worker_ranks(store, self._node_rank, group_world_size, spec)  # pyright: ignore  (@prof)


class _PassThrough(LogsSpecs):
    """Workers write to our stdout and stderr; no log files."""

    @property
    def root_log_dir(self) -> str:
        return os.devnull

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        for env in envs.values():
            env["TORCHELASTIC_ERROR_FILE"] = ""
        ours = dict.fromkeys(envs, "")
        return LogsDest(stdouts=ours, stderrs=ours, error_files=dict.fromkeys(envs, os.devnull))


def _spec(command: Sequence[str], nproc: int, launch: LaunchConfig, run_id: str) -> WorkerSpec:
    """The workers of this node and how they meet those of the others: c10d, at node 0."""
    alone = launch.nnodes == 1
    rendezvous = RendezvousParameters(
        backend="c10d",
        endpoint=launch.rdzv_endpoint or "localhost:0",
        run_id=run_id,
        min_nodes=launch.nnodes,
        max_nodes=launch.nnodes,
        local_addr="localhost" if alone else None,  # a laptop's own name may not resolve
        is_host=str(launch.node_rank == 0),
        join_timeout=JOIN_TIMEOUT_S,
    )
    return WorkerSpec(
        role="worker",
        local_world_size=nproc,
        entrypoint=command[0],
        args=tuple(command[1:]),
        rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=0,
        monitor_interval=POLL_S,
    )


def _obituary(rank: int, pid: int, code: int) -> str:
    if code >= 0:
        return f"rank {rank} (pid {pid}) failed with exit code {code}; what it said is above"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = "; out of memory is the usual reason" if name == "SIGKILL" else ""
    return f"rank {rank} (pid {pid}) was ended by {name}{hint}"


@contextmanager
def _environment(variables: dict[str, str]) -> Generator[None]:
    """Environment variables for the workers, which torch lets inherit all of ours."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _quiet() -> Generator[None]:
    """Keep torch's agent from logging what is said here in one line."""
    logger, nothing = logging.getLogger("torch.distributed.elastic"), logging.NullHandler()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(nothing)
    try:
        yield
    finally:
        logger.propagate = propagate
        logger.removeHandler(nothing)
