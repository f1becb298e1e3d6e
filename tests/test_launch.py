"""The launcher with real processes: locks, signals, exit codes, and no worker left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from picotrain import worker
from picotrain.config.schema import LaunchConfig
from picotrain.errors import DataError, LaunchError, PicotrainError, RunError
from picotrain.launch import RunLock, Start, launch

SRC = Path(__file__).parents[1] / "src"

# A worker that says it is there, and what to do when a signal comes: each test appends its own `work`.
WORKER = """
import os, signal, sys, time
from pathlib import Path
run, rank = Path(sys.argv[1]), int(os.environ["RANK"])
def note(name, text=""):
    (run / f"{name}_{rank}.part").write_text(str(text))
    (run / f"{name}_{rank}.part").rename(run / f"{name}_{rank}")
"""
READY = 'note("pid", os.getpid())\n'

# The real worker and real ranks, around a loop that each test writes as `train`.
REAL_WORKER = """
import sys, time, types
import picotrain, picotrain.worker
from picotrain.config.schema import HardwareConfig
from picotrain.errors import DataError
from picotrain.strategies.ddp import DDPConfig
section = types.SimpleNamespace(hardware=HardwareConfig(device="cpu", threads=2), parallel=DDPConfig())
picotrain.worker.require_run = lambda path: None
picotrain.worker.load = lambda path: section
Outcome = lambda **facts: types.SimpleNamespace(**dict(dict(behind=None), **facts))
def train(run, ranks, stop, *rest):
{body}
sys.modules["picotrain.loop"] = picotrain.loop = types.SimpleNamespace(train=train)
sys.exit(picotrain.worker.main(sys.argv[1:]))
"""


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# Each launcher is a process of its own, so that it can be signalled and killed; torch is imported once for all of them.
LAUNCHERS = multiprocessing.get_context("forkserver")  # conftest says what it has imported


def a_start(run: Path, nproc: int, section: LaunchConfig) -> Start:
    """A run that is there already."""
    config: Any = SimpleNamespace(run=SimpleNamespace(dir=str(run)), hardware=SimpleNamespace(nproc_per_node=nproc), launch=section)

    @contextmanager
    def opened(meeting: Any) -> Iterator[worker.Opened]:
        with RunLock(run):
            yield worker.Opened(run)

    return Start(config, opened)


def run_launcher(folder: Path, nproc: int, section: LaunchConfig) -> None:
    """launch() as the command line calls it, with its output in files."""
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{name}_{section.node_rank}", os.O_WRONLY | os.O_CREAT), number)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(SRC), os.environ.get("PYTHONPATH", "")])
    try:
        code = launch(lambda: a_start(folder / "run", nproc, section), module="fake_worker")
    except PicotrainError as error:
        os.write(1, f"told: {error}\n".encode())
        code = error.exit_code
    sys.exit(code)


class Launched:
    """A launcher process on a run directory with a worker module of the test's own."""

    def __init__(self, folder: Path, module: str, nproc: int, section: LaunchConfig):
        self.folder, self.run, self.nproc, self.node_rank = folder, folder / "run", nproc, section.node_rank
        self.run.mkdir(exist_ok=True)
        (folder / "fake_worker.py").write_text(module)
        self.process = LAUNCHERS.Process(target=run_launcher, args=(folder, nproc, section))
        self.process.start()
        self.pid = self.process.pid or 0

    def pids(self) -> list[int]:
        """The workers', once all are ready."""
        files = [self.run / f"pid_{rank}" for rank in range(self.nproc)]
        assert eventually(lambda: all(file.exists() for file in files))
        return [int(file.read_text()) for file in files]

    def end(self, timeout_s: float = 30.0) -> tuple[int | None, str, str]:
        """Exit code, stdout, stderr; no worker may be left by then."""
        self.process.join(timeout_s)
        pids = [int(file.read_text()) for file in self.run.glob("pid_?")]
        assert not any(is_alive(pid) for pid in pids)
        out, err = ((self.folder / f"{name}_{self.node_rank}").read_text() for name in ("out", "err"))
        return self.process.exitcode, out, err


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Start launchers, and end whatever a failing test leaves."""
    started: list[Launched] = []

    def begin(module: str, nproc: int = 2, **section: Any) -> Launched:
        started.append(Launched(tmp_path, module, nproc, LaunchConfig(**section)))
        return started[-1]

    yield begin
    for launched in started:
        launched.process.kill()
        launched.process.join()
        for file in launched.run.glob("pid_?"):
            if is_alive(pid := int(file.read_text())):
                os.kill(pid, signal.SIGKILL)


def test_one_process_runs_in_the_callers_own_under_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_process(run: Path, *rest: Any) -> int:
        holder = json.loads((run / ".lock").read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
        return 75

    monkeypatch.setattr(worker, "run", in_process)
    assert launch(lambda: a_start(tmp_path, 1, LaunchConfig())) == 75
    with RunLock(tmp_path), pytest.raises(RunError, match=f"pid {os.getpid()}"):  # nor twice in one process
        launch(lambda: a_start(tmp_path, 1, LaunchConfig()))


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process, once it has printed a line."""
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    return process


LOCKER = """
import sys, time
from pathlib import Path
from picotrain.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""

SHARER = """
import sys, time
from pathlib import Path
from picotrain.lock import RunLock
with RunLock(Path(sys.argv[1])).share():
    print("shared", flush=True)
    time.sleep(1.5)
    Path(sys.argv[1], "orphan_ended").touch()
"""


def test_a_second_start_is_refused_with_pid_and_host_until_the_first_is_gone(tmp_path: Path) -> None:
    first = python(LOCKER, tmp_path)
    try:
        with pytest.raises(RunError, match=rf"pid {first.pid} on {socket.gethostname()}"), RunLock(tmp_path):
            pass
    finally:
        first.kill()
        first.communicate()
    with RunLock(tmp_path):
        pass


def test_a_start_waits_for_the_workers_of_one_that_was_killed(tmp_path: Path) -> None:
    first = python(LOCKER, tmp_path)
    orphan = python(SHARER, tmp_path)
    first.kill()
    first.communicate()
    assert not (tmp_path / "orphan_ended").exists()
    with RunLock(tmp_path):
        assert (tmp_path / "orphan_ended").exists()
    orphan.communicate()


def test_workers_that_finish_give_0_and_leave_the_directory_free(start: Callable[..., Launched]) -> None:
    work = READY + 'note("env", os.environ["OMP_NUM_THREADS"] + os.environ["WORLD_SIZE"])\nsys.stdout.write(f"by {rank}\\n")'
    launched = start(WORKER + work)
    code, out, err = launched.end()
    assert (code, sorted(out.split()), err) == (0, ["0", "1", "by", "by"], "")  # and torch says nothing
    assert (launched.run / "env_1").read_text()[-1] == "2"
    with RunLock(launched.run):
        pass


SAVING = """
def stop(signum, frame):
    time.sleep(rank)  # ranks need not end together
    note("saved", signum)
    sys.exit(75)
for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(signum, stop)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_the_workers_which_save_and_the_exit_code_says_resumable(
    start: Callable[..., Launched], signum: signal.Signals
) -> None:
    launched = start(WORKER + SAVING + READY + "time.sleep(60)")
    launched.pids()
    os.kill(launched.pid, signum)
    assert launched.end() == (75, "", "")
    assert [(launched.run / f"saved_{rank}").read_text() for rank in range(2)] == [str(int(signum))] * 2


def test_workers_that_do_not_stop_are_killed_after_the_grace(start: Callable[..., Launched]) -> None:
    ignoring = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + "time.sleep(60)"
    launched = start(WORKER + ignoring, grace_s=1)
    launched.pids()
    os.kill(launched.pid, signal.SIGTERM)
    code, out, _ = launched.end(timeout_s=10)
    assert code == LaunchError.exit_code and "launch.grace_s=1" in out


def test_a_second_signal_ends_everything_at_once(start: Callable[..., Launched]) -> None:
    ignoring = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + READY + "time.sleep(60)"
    launched = start(WORKER + ignoring)
    launched.pids()
    os.kill(launched.pid, signal.SIGINT)
    time.sleep(0.5)
    os.kill(launched.pid, signal.SIGINT)
    assert launched.end(timeout_s=5)[0] == 128 + signal.SIGINT


def test_a_launcher_that_is_killed_leaves_no_worker_behind(start: Callable[..., Launched]) -> None:
    child = "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\nnote('child', child.pid)\n"
    launched = start(WORKER + "from picotrain.worker import watch_parent\nwatch_parent()\n" + child + READY + "time.sleep(60)")
    pids = launched.pids() + [int((launched.run / f"child_{rank}").read_text()) for rank in range(2)]
    launched.process.kill()
    assert eventually(lambda: not any(is_alive(pid) for pid in pids), timeout_s=3)


def test_a_rank_that_crashes_takes_the_others_down_and_is_named_once(start: Callable[..., Launched]) -> None:
    launched = start(WORKER + READY + "while not (run / 'pid_0').exists() or rank == 0: time.sleep(0.05)\nraise ValueError('boom')")
    code, out, err = launched.end(timeout_s=20)
    assert code == LaunchError.exit_code
    assert out.startswith("told: rank 1 (pid ") and out.count("\n") == 1
    assert err.count("ValueError: boom") == 1 and "ChildFailedError" not in err


def test_a_rank_that_is_killed_is_named_with_its_signal(start: Callable[..., Launched]) -> None:
    launched = start(WORKER + READY + "time.sleep(60)")
    os.kill(launched.pids()[0], signal.SIGKILL)
    code, out, _ = launched.end(timeout_s=20)
    assert code == LaunchError.exit_code and "rank 0" in out and "SIGKILL" in out and "rank 1" not in out


def test_ranks_on_two_nodes_follow_node_rank(start: Callable[..., Launched]) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    module = WORKER + READY + 'note("node", os.environ["OMP_NUM_THREADS"] and os.getppid())\n'
    nodes = [start(module, nproc=1, nnodes=2, node_rank=rank, rdzv_endpoint=endpoint) for rank in (1, 0)]
    assert [node.end()[0] for node in nodes] == [0, 0]
    assert [(nodes[0].run / f"node_{rank}").read_text() for rank in (1, 0)] == [str(node.pid) for node in nodes]


def test_an_error_that_every_rank_meets_is_told_once_with_its_own_code(start: Callable[..., Launched]) -> None:
    launched = start(REAL_WORKER.format(body="    raise DataError('no such shard')"))
    code, out, err = launched.end()
    assert (code, out, err) == (DataError.exit_code, "", "picotrain: no such shard\n")


def test_a_bug_on_one_rank_keeps_its_traceback_and_the_others_stay_silent(start: Callable[..., Launched]) -> None:
    body = "    print('by', ranks.rank, flush=True)\n    if ranks.rank == 1: raise ZeroDivisionError\n    ranks.barrier()"
    code, out, err = start(REAL_WORKER.format(body=body)).end()
    assert code == LaunchError.exit_code
    assert out.startswith("by 0\ntold: rank 1 (pid ")
    assert err.count("Traceback") == 1 and "ZeroDivisionError" in err


def test_a_stop_seen_by_one_rank_is_agreed_on_by_all(start: Callable[..., Launched]) -> None:
    body = """
    import os, torch
    (run / f"threads_{ranks.rank}").write_text(f"{torch.get_num_threads()} {torch.get_num_interop_threads()}")
    (run / f"pid_{ranks.rank}").write_text(str(os.getpid()))
    while not ranks.agree(stop.requested):
        time.sleep(0.05)
    return Outcome(status="stopped")"""
    launched = start(REAL_WORKER.format(body=body))
    assert eventually(lambda: all((launched.run / f"pid_{rank}").exists() for rank in range(2)))
    os.kill(int((launched.run / "pid_1").read_text()), signal.SIGUSR1)  # one worker, not the launcher
    assert launched.end() == (75, "", "")
    assert (launched.run / "threads_0").read_text() == "2 1"  # as configured, whatever the launcher's environment said


def test_a_worker_without_a_run_says_so_and_creates_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "picotrain.worker", str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == PicotrainError.exit_code and "Traceback" not in done.stderr
    assert str(tmp_path / "nothing") in done.stderr
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("node_rank", [0, 1])
def test_one_signal_ends_a_node_that_waits_for_another(start: Callable[..., Launched], node_rank: int) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    launched = start(WORKER + READY, nproc=1, nnodes=2, node_rank=node_rank, rdzv_endpoint=endpoint)
    time.sleep(2)  # into the waiting: torch's in native code, or ours for node 0
    os.kill(launched.pid, signal.SIGINT)
    code, out, err = launched.end(timeout_s=10)
    assert code == 75 and "Traceback" not in err
    assert out == ("" if node_rank == 0 else "told: stopped while waiting for node 0; the same command goes on from here\n")


# -- nodes that wait for node 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_node_0(port: int, go_on: Any) -> None:
    """Node 0: prepares until it is told to go on, is away for a moment, and listens as torch does."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    from picotrain.launch import nodes

    with nodes.preparing(LaunchConfig(nnodes=2, node_rank=0, rdzv_endpoint=f"localhost:{port}")):
        go_on.wait()
    time.sleep(0.3)
    store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    time.sleep(60)
    del store


@pytest.fixture
def node_0(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, int, Any]]:
    """A process that prepares as node 0, its port, and what lets it go on; whoever waits for it looks often."""
    from picotrain.launch import nodes

    for name, value in (("POLL_S", 0.05), ("SAY_S", 0.2), ("LOST_S", 2.0)):
        monkeypatch.setattr(nodes, name, value)
    port, go_on = free_port(), LAUNCHERS.Event()
    process = LAUNCHERS.Process(target=run_node_0, args=(port, go_on))
    process.start()
    yield process, port, go_on
    process.kill()
    process.join()


def waiting_for(port: int) -> tuple[threading.Thread, list[Any]]:
    """Another node, which waits in a thread, and what came of it: "met", or the error that ended it."""
    from picotrain.launch import agent

    came: list[Any] = []

    def wait() -> None:
        try:
            agent.wait_for_node_0(f"localhost:{port}")
            came.append("met")
        except LaunchError as error:
            came.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread, came


def holds(port: int) -> bool:
    """Whether another node holds its connection to node 0's store, beside that store's own: each has two ends."""
    time.sleep(0.3)  # it asks once over a third
    table = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
    return sum(f":{port:04X} " in line and line.split()[3] == "01" for line in table.splitlines()) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_other_nodes_wait_for_node_0_whatever_it_does_and_say_so_until_it_listens(node_0, capsys):
    process, port, go_on = node_0
    thread, came = waiting_for(port)
    assert eventually(lambda: holds(port)) and holds(port)
    os.kill(process.pid, signal.SIGSTOP)  # slow, for longer than a node 0 that is gone may be
    time.sleep(2.5)
    assert thread.is_alive()
    os.kill(process.pid, signal.SIGCONT)
    go_on.set()
    thread.join(20)
    assert came == ["met"]
    assert capsys.readouterr().err.count(f"waiting for node 0 at localhost:{port}, which prepares the run") >= 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_other_nodes_end_when_node_0_has_gone(node_0):
    process, port, _ = node_0
    thread, came = waiting_for(port)
    assert eventually(lambda: holds(port)) and holds(port)
    process.kill()
    thread.join(20)
    assert isinstance(came[0], LaunchError) and "was there and has been gone" in str(came[0]) and str(port) in str(came[0])


def test_node_0_whose_port_is_taken_says_so_before_it_prepares():
    from picotrain.launch import nodes

    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        section = LaunchConfig(nnodes=2, node_rank=0, rdzv_endpoint=f"localhost:{port}")
        with pytest.raises(LaunchError, match=f"localhost:{port}"), nodes.preparing(section):
            pytest.fail("it went on")


@pytest.mark.parametrize(("host", "limit"), [("localhost", "NODE_0_S"), ("no-such-node.invalid", "NAME_S")])
def test_a_node_that_never_finds_node_0_ends_with_the_key_to_look_at(tmp_path, monkeypatch, host, limit):
    from picotrain.launch import agent, nodes

    monkeypatch.setattr(nodes, "POLL_S", 0.05)
    monkeypatch.setattr(nodes, limit, 0.1)
    section = LaunchConfig(nnodes=2, node_rank=1, rdzv_endpoint=f"{host}:{free_port()}")
    with pytest.raises(LaunchError, match=rf"launch.rdzv_endpoint={host}"):
        agent.run_workers([sys.executable, "-c", "pass"], 1, section, "run")
