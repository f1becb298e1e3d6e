"""No process makes a first call of a vector function in parallel: losses would differ from start to start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grimp
import pytest
import torch
from torch.overrides import TorchFunctionMode

from picotrain import first_calls

HEADER = Path(torch.__file__).parent / "include/ATen/cpu/vml.h"
SENT_TO_MKL = re.compile(r"^IMPLEMENT_VML_MKL\((\w+),", re.MULTILINE)

# These hold, move or name tensors and compute nothing.
COMPUTE_NOTHING = {
    "bench.timing", "checkpoint.saver", "checkpoint.store", "meeting", "monitor.events", "monitor.profiler",
    "state", "trackers.tensorboard",
}  # fmt: skip


class Recorder(TorchFunctionMode):
    """Remembers every call: the function's name, how many elements it was given, and their type."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, torch.dtype]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            self.calls.append((func.__name__, args[0].numel(), args[0].dtype))
        return func(*args, **(kwargs or {}))


def test_every_function_that_torch_gives_to_mkl_is_called():
    found = set(SENT_TO_MKL.findall(HEADER.read_text()))
    assert "exp" in found
    assert found <= set(first_calls.FUNCTIONS)


def test_they_are_called_on_one_element_of_each_type_and_draw_no_random_number():
    before = torch.get_rng_state()
    with Recorder() as recorder:
        first_calls.settle.__wrapped__()
    assert torch.equal(torch.get_rng_state(), before)
    wanted = {(name, 1, dtype) for dtype in (torch.float32, torch.float64) for name in (*first_calls.FUNCTIONS, "exponential_")}
    assert wanted <= set(recorder.calls)


def test_every_module_that_computes_makes_them_when_it_is_imported():
    graph = grimp.build_graph("picotrain", include_external_packages=True)

    def settled(module: str) -> bool:
        parts = module.split(".")
        packages = [".".join(parts[: end + 1]) for end in range(1, len(parts))]
        return any(graph.chain_exists(name, "picotrain.first_calls") for name in packages)

    users = graph.find_modules_that_directly_import("torch") - {"picotrain.first_calls"}
    assert len(users) > 30
    assert {name.removeprefix("picotrain.") for name in users if not settled(name)} <= COMPUTE_NOTHING


def test_an_import_alone_makes_them():
    """Each module in a process of its own, forked when torch was loaded."""
    modules = ["model", "optim", "parallel", "data.stream"]
    code = f"""
import importlib, os, torch
for name in {modules}:
    if not os.fork():
        importlib.import_module("picotrain." + name)
        from picotrain.first_calls import settle
        os._exit(settle.cache_info().currsize)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["1"] * len(modules)


# Many processes share two cores, each makes the first call of each function with two threads and compares it with the second. They
# are forked from one that has loaded torch and called nothing, so that hundreds take no longer than a few starts.
STORM = """
import json, os, sys
import numpy as np
import torch
number, settled = int(sys.argv[1]), sys.argv[2] == "settled"
inputs = [torch.from_numpy(np.linspace(0.01, 0.99, 1 << 16).astype(name)) for name in ("f4", "f8")]

def differing():
    torch.set_num_threads(2)
    from picotrain import first_calls
    if settled:
        first_calls.settle()
    calls = [(name, x, getattr(torch, name)) for x in inputs for name in first_calls.FUNCTIONS]
    return [f"{name} {x.dtype}" for name, x, function in calls if not torch.equal(function(x), function(x))]

wrong = []
for _ in range(0, number, 4):
    reader, writer = os.pipe()
    children = []
    for _ in range(4):
        if child := os.fork():
            children.append(child)
            continue
        try:
            os.write(writer, (json.dumps(differing()) + "\\n").encode())
        finally:
            os._exit(0)
    os.close(writer)
    for child in children:
        os.waitpid(child, 0)
    with os.fdopen(reader) as lines:
        found = [json.loads(line) for line in lines]
    assert len(found) == 4, "a child has died"
    wrong += [names for names in found if names]
print(json.dumps(wrong))
"""


def storm(number: int, settled: bool = True) -> list[list[str]]:
    """The functions whose first call was wrong, of each process in which one was."""
    command = [sys.executable, "-c", STORM, str(number), "settled" if settled else "cold"]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_first_calls_in_a_storm_of_processes_are_right():
    assert storm(12) == []


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_first_calls_in_a_long_storm_of_processes_are_right():
    assert storm(2000) == []


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_hundred_starts_have_one_first_loss(tiny, tmp_path: Path):
    """Real starts, four at a time on all cores: new processes, two threads, loader threads beside them."""
    code = "import faulthandler, sys; faulthandler.dump_traceback_later(200);"  # says where one hangs
    code += "from picotrain import minimal, worker; from picotrain.config import compose; c = compose(sys.argv[1:]);"
    code += "worker.set_up_process(c.hardware); print(*map(float.hex, minimal.losses(c)))"
    overrides = tiny(tmp_path / "run", "train.max_steps=2", "hardware.threads=2", "train.seq_len=128", "train.total_batch_size=1024")

    def start(_: int) -> str:
        done = subprocess.run([sys.executable, "-c", code, *overrides], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    first = start(0)
    assert len(first.split()) == 2
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(start, range(200))) == {first}
