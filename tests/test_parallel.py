"""Parallel over two real gloo ranks, and the stop signal."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from picotrain import parallel
from picotrain.errors import LaunchError
from picotrain.parallel import Parallel
from picotrain.ranks import Ranks
from picotrain.signals import REPEAT_S, StopSignal

# Run by each of two ranks: what it finds is printed as JSON and judged by the tests below.
RANK_SCRIPT = """
import json, os, sys
import torch
from torch import nn
from picotrain import parallel as p
sys.path.insert(0, os.environ["TEST_DIR"])
from test_parallel import net, rows

torch.set_num_threads(1)
ranks = p.build("cpu")
r, found = ranks.rank, {}
found["place"] = [ranks.dp_rank, ranks.dp_size, ranks.is_main]
found["agree"] = [ranks.agree(False), ranks.agree(r == 1), ranks.agree(True)]
found["gather"] = ranks.gather({"rank": r, "long": "x" * (1 + 1000 * r), "text": "h\\u00e9"})
value = torch.tensor(float(r))
found["mean"], found["value"] = ranks.mean(value).item(), value.item()
total = ranks.sum_fp64(torch.tensor([2.0**53, 1.0]))
found["sum"], found["sum_dtype"] = total.tolist(), str(total.dtype)
ranks.barrier()

torch.manual_seed(r)  # wrap has to make the weights rank 0's
model = net()
wrapped = ranks.wrap(model)
found["weights"] = [parameter.flatten().tolist() for parameter in model.parameters()]
found["names"] = list(model.state_dict())
x, y = rows()
micro_batches = [[0, 2], [4, 6]] if r == 0 else [[1, 3], [5, 7]]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
found["grads"] = []
for step in range(2):
    for micro, take in enumerate(micro_batches):
        with ranks.sync_gradients(wrapped, on=micro == 1):
            (nn.functional.mse_loss(wrapped(x[take]), y[take]) / 2).backward()
        found["grads"].append(torch.cat([q.grad.flatten() for q in model.parameters()]).tolist())
    found["norm"] = ranks.clip(model.parameters(), 0.5).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
found["trained"] = [parameter.flatten().tolist() for parameter in model.parameters()]

# The real model, its graphs counted and not compiled: each is run as it is.
import warnings
from functools import partial
from picotrain.models.gpt import GPTConfig
from picotrain.models.gpt.module import GPT
warnings.simplefilter("default")  # the compiler has some of its own
graphs = []
def count(graph, inputs):
    graphs.append(graph)
    return graph.forward
torch.compile = partial(torch.compile, backend=count)
def compile_in_place(self, **how):
    self._compiled_call_impl = torch.compile(self._call_impl, **how)
nn.Module.compile = compile_in_place
model = GPT(GPTConfig(depth=2, head_dim=64, width=384), 128, 16)  # a block holds more than DDP's first bucket
model.init_weights(0)
model.compile_blocks()
ids = torch.randint(128, (2, 16))
ranks.wrap(model)(ids, ids).backward()
found["graphs"] = len(graphs)
ranks.teardown()
print(json.dumps(found), flush=True)
os._exit(0)  # as a rank does, see picotrain.ranks
"""


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(8, 3, generator=generator).double(), torch.randn(8, 2, generator=generator).double()


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """What each of two ranks found."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TEST_DIR": str(Path(__file__).parent),
    }
    command = [sys.executable, "-W", "error", "-c", RANK_SCRIPT]
    processes = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(output) for output in outputs]


def test_each_rank_knows_its_place(ranks: list[dict[str, Any]]) -> None:
    assert [found["place"] for found in ranks] == [[0, 2, True], [1, 2, False]]


def test_a_flag_set_on_any_rank_is_seen_by_all(ranks: list[dict[str, Any]]) -> None:
    assert all(found["agree"] == [False, True, True] for found in ranks)


def test_gather_gives_every_ranks_value_to_every_rank_whatever_its_length(ranks: list[dict[str, Any]]) -> None:
    expected = [{"rank": r, "long": "x" * (1 + 1000 * r), "text": "hé"} for r in range(2)]
    assert all(found["gather"] == expected for found in ranks)


def test_mean_is_over_ranks_and_leaves_its_argument_alone(ranks: list[dict[str, Any]]) -> None:
    assert [(found["mean"], found["value"]) for found in ranks] == [(0.5, 0.0), (0.5, 1.0)]


def test_sums_over_ranks_are_exact_beyond_what_fp32_holds(ranks: list[dict[str, Any]]) -> None:
    assert all(found["sum"] == [2.0**54, 2.0] and found["sum_dtype"] == "torch.float64" for found in ranks)


def test_wrapping_gives_every_rank_the_weights_of_rank_0_under_their_plain_names(ranks: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    model = net()
    assert ranks[0]["weights"] == ranks[1]["weights"] == [p.flatten().tolist() for p in model.parameters()]
    assert ranks[0]["names"] == list(model.state_dict())


def test_ddp_does_not_cut_the_compiled_blocks_into_pieces(ranks: list[dict[str, Any]]) -> None:
    assert [found["graphs"] for found in ranks] == [2, 2]  # all blocks share one, the loss has the other


def test_gradients_differ_between_ranks_until_the_last_micro_batch_and_are_equal_after_it(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks[0]["grads"], ranks[1]["grads"]
    for step in range(2):
        assert first[2 * step] != second[2 * step]  # nothing was sent
        assert first[2 * step + 1] == second[2 * step + 1]


def test_two_ranks_with_accumulation_train_like_one_process_on_all_rows(ranks: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    model, single = net(), Parallel.single()
    assert single.wrap(model) is model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = rows()
    for _ in range(2):
        with single.sync_gradients(model, on=False):
            nn.functional.mse_loss(model(x), y).backward()
        norm = single.clip(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert norm.item() == pytest.approx(ranks[0]["norm"], rel=1e-12)
    for trained, expected in zip(ranks[1]["trained"], model.parameters(), strict=True):
        assert trained == pytest.approx(expected.flatten().tolist(), rel=1e-12)


def test_clip_scales_to_the_norm_and_without_one_only_measures() -> None:
    weight, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([3.0, 4.0])
    single = Parallel.single()
    assert single.clip([weight, unused], None).item() == 5.0
    assert weight.grad.tolist() == [3.0, 4.0]
    norm = single.clip(iter([weight, unused]), 1.0)
    assert norm.shape == () and norm.item() == 5.0
    assert weight.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_one_process_needs_no_process_group() -> None:
    single = parallel.build("cpu")
    assert not torch.distributed.is_initialized()
    assert (single.dp_rank, single.dp_size, single.is_main) == (0, 1, True)
    assert single.agree(True) and not single.agree(False)
    assert single.gather({"a": (1, 2)}) == [{"a": [1, 2]}]  # through JSON, as with more ranks
    single.barrier()
    single.teardown()


def test_devices_that_are_not_there_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(LaunchError, match="hardware.device=cpu"):
        Parallel.setup("cuda")
    meeting: Any = Mock()
    with pytest.raises(LaunchError, match="hardware.nproc_per_node=1"):
        Parallel.setup("mps", Ranks(0, 2, 0, 2), meeting)
    meeting.fail.assert_called_once()  # the others do not wait for this rank


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_sets_the_flag_and_the_handlers_before_come_back(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with StopSignal() as stop:
        assert not stop.requested
        signal.raise_signal(signum)
        assert stop.requested and stop.signum == signum
    assert signal.getsignal(signum) is before


def test_a_repeat_right_after_the_first_signal_is_the_same_request_and_a_later_one_ends() -> None:
    ended: list[int] = []
    with StopSignal(on_second=ended.append):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert ended == []
        time.sleep(REPEAT_S + 0.05)
        signal.raise_signal(signal.SIGUSR1)
        assert ended == []
        signal.raise_signal(signal.SIGINT)
        assert ended == [signal.SIGINT]


def test_what_a_closing_terminal_sends_is_no_second_signal_and_makes_none() -> None:
    ended: list[int] = []
    with StopSignal(on_second=ended.append) as stop:
        for signum in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(signum)
            time.sleep(REPEAT_S + 0.05)
        assert stop.requested and ended == []
        signal.raise_signal(signal.SIGTERM)
        assert ended == [signal.SIGTERM]


def test_the_second_signal_ends_the_process_with_the_signals_code() -> None:
    script = """
import os, signal, time
from picotrain.signals import REPEAT_S, StopSignal
with StopSignal():
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(REPEAT_S + 0.05)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    finally:
        print("not at once")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")


def test_outside_the_main_thread_no_handler_is_installed() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def inside() -> None:
        with StopSignal() as stop:
            seen.extend([signal.getsignal(signal.SIGTERM), stop.requested])

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before, False]


# -- memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"),
        torch.AcceleratorError("CUDA error: out of memory") if hasattr(torch, "AcceleratorError") else MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA driver error: out of memory"),
        dist.DistBackendError("NCCL error: unhandled cuda error\nLast error:\nFailed to CUDA calloc async 4194304 bytes"),
        dist.DistBackendError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
        dist.DistBackendError(
            "NCCL error: unhandled system error\nncclSystemError: System call (e.g. socket, malloc) failed\nout of memory"
        ),
        dist.DistBackendError(
            "NCCL error: unhandled system error\nncclSystemError: System call failed\nLast error:\nFailed to malloc 16 bytes"
        ),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("HIP error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB, other allocations: 1.00 GB, max allowed: 18.13 GB)."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        RuntimeError("std::bad_alloc"),
    ],
    ids=lambda error: str(error).splitlines()[-1][:30] if str(error) else "MemoryError",
)
def test_memory_that_ran_out_is_known_however_it_is_told_and_wrapped(error: BaseException) -> None:
    said = parallel.out_of_memory(error)
    assert (said in str(error).splitlines() and ("NCCL" not in str(error) or "NCCL" not in said)) or said == "MemoryError"
    wrapped = RuntimeError("backend='inductor' raised:")
    wrapped.__cause__ = error
    assert parallel.out_of_memory(wrapped)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
        dist.DistBackendError(
            "NCCL error\nncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error."
        ),
        ValueError("the text says: CUDA error: out of memory"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_other_errors_are_not_taken_for_memory_that_ran_out(error: BaseException) -> None:
    assert not parallel.out_of_memory(error)
