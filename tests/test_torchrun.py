"""Runs under torchrun, and commands that only seem to be: real ranks (gloo), and what a shell has left in the environment."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import lines, losses, picotrain

from picotrain import ranks
from picotrain.errors import PicotrainError
from picotrain.parallel import Parallel

VARIABLES = (*ranks.NEEDED, *ranks.BESIDE)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, port: int, world_size: int = 2) -> dict[str, str]:
    """What torchrun gives a rank. Its agent's store is left out: rank 0 keeps one then, and exit codes are seen without torchrun."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}


@pytest.fixture
def start_ranks() -> Iterator[Callable[..., list[subprocess.Popen[str]]]]:
    """Start `picotrain ARGUMENTS` as ranks of two, and end whatever a failing test leaves."""
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str, only: tuple[int, ...] = (0, 1), **environment: str) -> list[subprocess.Popen[str]]:
        port, command = free_port(), [sys.executable, "-m", "picotrain", *arguments]
        for rank in only:
            env = os.environ | environment | rank_environment(rank, port)
            started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def sitecustomize(folder: Path, code: str) -> str:
    """The PYTHONPATH under which every Python process first runs `code`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


# -- torchrun

DIES_ONCE = """
import os
if os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    from picotrain.models.gpt import module as model
    forward, count = model.GPT.forward, 0
    def dying(self, *args, **more):
        global count
        count += self.training
        if count == 9:
            os.kill(os.getpid(), 9)
        return forward(self, *args, **more)
    model.GPT.forward = dying
"""


def test_torchrun_trains_what_the_command_trains_and_its_restarts_go_on_with_the_same_run(tmp_path, tiny):
    alone, run = tmp_path / "alone", tmp_path / "run"
    assert picotrain("train", *tiny(alone)).returncode == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max_restarts=1", "-m", "picotrain", "train"]
    overrides = tiny(run, "train.save_every=4", "run.resume=never")
    env = os.environ | {"PYTHONPATH": sitecustomize(tmp_path / "patch", DIES_ONCE)}
    done = subprocess.run([*command, *overrides], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "plan.json").read_text())["world_size"] == 2
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)
    assert [line["name"] for line in lines(run, "event")].count("resumed") == 1
    assert done.stdout.count("finished at step 12 of 12") == 1  # rank 0 speaks
    assert done.stderr.count("waits for rank 0") == 2  # a line a start


def test_a_mistake_under_torchrun_is_said_once_and_all_ranks_end_with_its_code(tmp_path, tiny, start_ranks):
    run = tmp_path / "runs" / "run"
    processes = start_ranks("train", *tiny(run, "hardware.nproc_per_node=4", "train.seqlen=3"))
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert outputs[0][0] + outputs[1][0] == ""
    assert "torchrun has started 2" in outputs[0][1] and "train.seq_len" in outputs[0][1]
    assert outputs[1][1].count("\n") == 1 and "problem" not in outputs[1][1]  # that it waits
    assert not run.parent.exists()


def test_a_mistake_that_the_command_line_alone_shows_is_said_once(start_ranks):
    processes = start_ranks("train", "--no-such-option")
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "--no-such-option" in outputs[0][1] and outputs[1] == ("", "")


def test_what_ranks_do_not_share_is_done_by_rank_0_alone(start_ranks):
    processes = start_ranks("plan", "model=d2", "hardware=cpu", "data=pystdlib", "--json")
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert json.loads(outputs[0][0])["world_size"] == 2  # what train would do here
    assert outputs[1] == ("", "")


# The main thread waits in native code, for a mutex that it holds already: no Python handler runs in it any more.
STUCK = """
import os
if os.environ.get("RANK", "0") == "0":
    import ctypes, pathlib
    from picotrain import run
    def stuck(config, overrides, say):
        mutex = ctypes.create_string_buffer(256)
        pathlib.Path(os.environ["READY"]).touch()
        while True:
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    run.open_run = stuck
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a mutex of zeros is glibc's")
@pytest.mark.parametrize("alone", [True, False])
def test_one_signal_ends_a_preparation_and_the_ranks_that_wait_for_it(tmp_path, tiny, start_ranks, alone):
    run, ready = tmp_path / "runs" / "run", tmp_path / "ready"
    environment = {"PYTHONPATH": sitecustomize(tmp_path / "patch", STUCK), "READY": str(ready)}
    if alone:
        command = [sys.executable, "-m", "picotrain", "train", *tiny(run)]
        processes = [subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)]
    else:
        processes = start_ranks("train", *tiny(run), **environment)
    wait_for(ready)
    assert run.exists()
    started = time.monotonic()
    for process in processes:
        process.send_signal(signal.SIGINT)
    assert [process.wait(20) for process in processes] == [75] * len(processes)
    assert time.monotonic() - started < 10  # about one on an idle machine
    assert "the same command goes on" in processes[0].communicate()[1]
    assert not run.parent.exists()


def wait_for(path: Path, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_one_signal_ends_a_rank_whose_others_never_come(tmp_path, tiny, start_ranks):
    (process,) = start_ranks("train", *tiny(tmp_path / "run"), only=(1,))
    assert process.stderr is not None and "waits" in process.stderr.readline()
    time.sleep(1)  # into torch's connecting to a store that is not there
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75


# -- what is left over


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_to(**values: str) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


LEFT_OVER = [
    {"RANK": "3"},
    {"WORLD_SIZE": "2"},
    {"RANK": "x", "WORLD_SIZE": "", "LOCAL_RANK": "-1"},
    {"MASTER_ADDR": "node-1", "MASTER_PORT": "none"},
    {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"},
]


@pytest.mark.parametrize("values", LEFT_OVER)
def test_variables_without_a_torchrun_are_ignored_in_one_line(environment, capsys, values):
    environment(**values)
    assert Parallel.setup("cpu").world_size == 1
    assert ranks.settle() == ranks.Ranks()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(name in said for name in values)
    assert not any(name in os.environ for name in VARIABLES)  # nor does anything see them that is started here
    assert ranks.settle() == ranks.Ranks() and capsys.readouterr().err == ""


def test_variables_of_a_torchrun_that_is_gone_are_ignored(environment, capsys):
    environment(**rank_environment(1, free_port()), TORCHELASTIC_USE_AGENT_STORE="True")
    assert ranks.settle() == ranks.Ranks()
    assert "TORCHELASTIC_RUN_ID" in capsys.readouterr().err


def test_variables_of_a_torchrun_that_is_there_count(environment, capsys):
    with socket.create_server(("127.0.0.1", 0)) as agent:
        environment(**rank_environment(1, agent.getsockname()[1]), TORCHELASTIC_USE_AGENT_STORE="True")
        assert ranks.settle() == ranks.Ranks(1, 2, 1, 2, launched=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "wrong", [{"RANK": "2"}, {"RANK": "one"}, {"WORLD_SIZE": "0"}, {"LOCAL_WORLD_SIZE": "3"}, {"MASTER_ADDR": ""}, {"MASTER_PORT": "99999"}]
)
def test_variables_of_torchrun_that_cannot_be_true_are_a_users_mistake(environment, wrong):
    environment(**rank_environment(1, 1234) | wrong)
    with pytest.raises(PicotrainError, match=rf"{next(iter(wrong))}=.*unset TORCHELASTIC_RUN_ID") as caught:
        ranks.settle()
    assert caught.value.exit_code == 2


def test_left_over_variables_change_no_run_nor_reach_its_workers(tmp_path, tiny, environment):
    environment(RANK="1", WORLD_SIZE="3", LOCAL_RANK="x", MASTER_ADDR="nowhere.invalid", GROUP_RANK="7")
    run = tmp_path / "run"
    done = picotrain("train", *tiny(run, "hardware.nproc_per_node=2", "train.max_steps=3"))
    assert done.returncode == 0, done.stderr
    assert len(losses(run)) == 3 and done.stderr.count("no torchrun has started this process") == 1
    worker = [sys.executable, "-m", "picotrain.worker", str(run)]
    done = subprocess.run(worker, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.count("no torchrun has started this process") == 1
