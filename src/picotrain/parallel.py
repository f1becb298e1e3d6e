"""Ranks, process groups and DDP: the only module that knows of them."""

from __future__ import annotations

import faulthandler
import gc
import inspect
import json
import os
import re
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from picotrain import first_calls, hardware, ranks
from picotrain.errors import Hung, LaunchError
from picotrain.meeting import Meeting, PeerFailed
from picotrain.ranks import Ranks
from picotrain.signals import StopSignal
from picotrain.text import first_line

first_calls.settle()

# How long a rank waits for the others in a collective. Longer than anything one rank does alone while the others wait
# (compiling, writing a checkpoint to a slow disk), short enough that a hang is noticed within the hour.
PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)

RECORDER = "TORCH_FR_BUFFER_SIZE", "500"  # torch keeps so many of the latest collectives, for the watchdog to write down

PASS_ON_S = 1.0

STACKS_SIGNAL = signal.SIGUSR2  # a worker answers it with the stacks of its threads

# torch 2.13 renamed it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# Gradients live in the buckets that are sent, which saves a copy of them. Buffers are constants (RoPE), so they are not sent
# at every forward; torch 2.13 renamed that option. No static_graph: a first micro-batch under no_sync fails an assertion.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_DDP_OPTIONS: dict[str, Any] = {"gradient_as_bucket_view": True, "forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


class Watchdog:
    """Ends a process that makes no progress while it is entered: `limit_s` after the last `beat` (None: never) torch's record of the latest
    collectives goes to `record_path`, the stacks of all threads go to standard error, and it ends with Hung's exit code. The launcher then
    asks the other ranks for their stacks (`STACKS_SIGNAL`) and ends them. Where the interpreter itself is stuck, Python's own timer,
    which is in C, prints the stacks and ends the process STUCK_S later."""

    STUCK_S = 10.0

    def __init__(self, limit_s: float | None, record_path: Path | None = None):
        self._limit_s, self._record_path = limit_s, record_path
        self._armed_s = self._beat_s = float("-inf")
        self._closed = threading.Event()

    def __enter__(self) -> Watchdog:
        self.beat()
        if self._limit_s is not None:
            threading.Thread(target=self._watch, args=(self._limit_s,), name="picotrain-watchdog", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def beat(self) -> None:
        """Say that there is progress. Arming the timer takes a quarter of a millisecond, so it is done now and then only."""
        self._beat_s = time.monotonic()
        if self._limit_s is not None and sys.__stderr__ is not None and self._beat_s - self._armed_s > self._limit_s / 20:
            self._armed_s = self._beat_s
            faulthandler.dump_traceback_later(self._limit_s + self.STUCK_S, exit=True, file=sys.__stderr__)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self, limit_s: float) -> None:
        while (left_s := self._beat_s + limit_s - time.monotonic()) > 0:
            if self._closed.wait(left_s):
                return
        err = sys.__stderr__ or sys.stderr
        rank = ranks.here().rank
        err.write(f"picotrain: rank {rank} has made no progress for launch.hang_s={limit_s:g} s; its threads are at\n")
        err.flush()
        faulthandler.dump_traceback(file=err)
        if self._record_path and (record := _latest_collectives()):
            with suppress(OSError):
                self._record_path.parent.mkdir(exist_ok=True)
                self._record_path.write_bytes(record)
                print(f"its latest collectives: {self._record_path}", file=err)
        err.flush()
        os._exit(Hung.exit_code)


def _latest_collectives() -> bytes | None:
    """Torch's flight recorder as JSON: the latest collectives of this rank and how far they are; None where it has recorded none."""
    from torch._C import _distributed_c10d  # the ways to ask as JSON are private; the public ones pickle

    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):  # NCCL's, gloo's
        if dump := getattr(_distributed_c10d, name, None):
            record = dump()
            if json.loads(record).get("entries"):
                return record if isinstance(record, bytes) else record.encode()
    return None


@dataclass(frozen=True)
class Parallel:
    """Replicated data parallelism (DDP): every rank holds the whole model and sees its share of each step's rows.

    One process has no process group at all: then every method is the identity, and the loop reads the same.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: Any = None  # a gloo process group: what is agreed on over it never waits for a device
    store: Any = None  # of this start's ranks, over a connection of its own

    @classmethod
    def single(cls, device: str = "cpu") -> Parallel:
        """One process."""
        return cls(rank=0, world_size=1, local_rank=0, device=torch.device(device))

    @classmethod
    def setup(cls, device: str, here: Ranks | None = None, meeting: Meeting | None = None) -> Parallel:
        """Join the ranks that torchrun's environment variables name; without them, be the only one.

        `device` is cpu (gloo), cuda (NCCL, one GPU per local rank) or mps (one process). `here`: another place than the environment's.
        `meeting`: where the ranks have met already. Raises LaunchError, PeerFailed when it is another rank that cannot start.
        """
        here = here or ranks.here()
        rank, world_size, local_rank = here.rank, here.world_size, here.local_rank
        if world_size == 1:
            return cls(rank, world_size, local_rank, _device(device, local_rank, world_size))
        meeting = meeting or _meet(here)
        try:
            place = _device(device, local_rank, world_size)
        except BaseException:
            meeting.fail()
            raise
        meeting.all_here()
        on_gpu = place.type == "cuda"
        os.environ.setdefault(*RECORDER)
        store, timeout = meeting.store, PROCESS_GROUP_TIMEOUT
        store.set_timeout(timeout)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=place if on_gpu else None,
        )
        control = dist.new_group(backend="gloo", timeout=timeout) if on_gpu else dist.group.WORLD
        return cls(rank, world_size, local_rank, place, control, store.clone())  # pyright: ignore[reportAttributeAccessIssue]  (the stub lacks it)

    def teardown(self) -> None:
        """Leave together, so that no rank loses a peer it still talks to. Not after an error: that could hang."""
        if self.world_size > 1:
            self.barrier()
            dist.destroy_process_group()

    @property
    def dp_rank(self) -> int:
        return self.rank

    @property
    def dp_size(self) -> int:
        return self.world_size

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    @contextmanager
    def passing_on(self, stop: StopSignal) -> Generator[None]:
        """While entered, a stop that one rank is asked for is known to all within PASS_ON_S, wherever they are: the others get SIGUSR1.

        A node may be taken away alone. Ranks that are in an evaluation or compile meet seldom, and would hear of it too late.
        """
        if self.store is None:
            yield
            return
        left = threading.Event()

        def watch() -> None:
            with suppress(RuntimeError):  # the store is gone, and with it the others
                while True:
                    over = left.wait(PASS_ON_S / 2)
                    if stop.sent.is_set():
                        return self.store.set("stop", "1")
                    if over:
                        return None
                    if self.store.check(["stop"]):
                        return os.kill(os.getpid(), signal.SIGUSR1)

        thread = threading.Thread(target=watch, name="picotrain-stop", daemon=True)
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join(PASS_ON_S)  # a store that does not answer is left

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to train through. Its weights become rank 0's; its gradients are means over the ranks."""
        if self.world_size == 1:
            return model
        devices = [self.local_rank] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, **_DDP_OPTIONS)

    def sync_gradients(self, wrapped: nn.Module, on: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch: off accumulates locally, on sends what has accumulated."""
        if on or not isinstance(wrapped, DistributedDataParallel):
            return nullcontext()
        return wrapped.no_sync()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
        """Scale all gradients so that their total norm is at most max_norm (null: leave them); the norm before, 0-d.

        No host sync: the scale is applied always and is 1 when nothing has to be clipped.
        """
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        foreach = None if self.device.type == "mps" else True
        if max_norm is None:
            return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=foreach)
        return nn.utils.clip_grad_norm_(parameters, max_norm, foreach=foreach)

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; see `on_any_rank`."""
        return self.on_any_rank(flag)[0]

    def on_any_rank(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set on any rank: the same answers everywhere, without a device sync."""
        if self.world_size == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return votes.bool().tolist()

    def mean(self, value: Tensor) -> Tensor:
        """The mean over ranks, on the device; on CUDA it is queued and the host does not wait."""
        return self._sum(value.detach().clone()) / self.world_size

    def sum_fp64(self, value: Tensor) -> Tensor:
        """The sum over ranks in fp64; on the device, except that mps, which has no fp64, gets it on the CPU."""
        place = torch.device("cpu") if self.device.type == "mps" else self.device
        return self._sum(value.detach().to(place).to(torch.float64, copy=True))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's JSON value, in rank order, on every rank. JSON, because torch's own way would unpickle."""
        text = json.dumps(value).encode()
        if self.world_size == 1:
            return [json.loads(text)]
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = len(text)
        dist.all_reduce(sizes, group=self.control)
        mine = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine, group=self.control)
        return [json.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes.tolist(), strict=True)]

    def gather_tensor(self, value: Tensor) -> Tensor:
        """Every rank's tensor, all of one shape and dtype, in rank order: (world_size, *shape). On CUDA the host does not wait."""
        if self.world_size == 1:
            return value[None]
        parts = value.new_empty((self.world_size, *value.shape))
        # As bytes: what is moved is not computed with, and not every backend knows every dtype.
        _all_gather(parts.flatten().view(torch.uint8), value.flatten().view(torch.uint8))
        return parts

    def barrier(self) -> None:
        """Wait until every rank is here; without a device sync."""
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def _sum(self, value: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(value)
        return value


def build(device: str, meeting: Meeting | None = None) -> Parallel:
    """Join the run's ranks, where they have met if they have. Raises LaunchError, also where the device has no memory left for that:
    smaller micro-batches would not help, there are none yet."""
    try:
        return Parallel.setup(device, meeting=meeting)
    except Exception as error:
        if not (said := out_of_memory(error)):
            raise
        rank = f"rank {here.rank}: " if (here := ranks.here()).launched else ""
        raise LaunchError(
            f"{rank}out of memory before the first step, while the ranks met: something else has the memory of the device\n"
            f"  {said[:200]}\n"
            "`nvidia-smi` lists what uses a GPU; what a process had that was just killed is free after some seconds"
        ) from error


def _meet(here: Ranks) -> Meeting:
    meeting = Meeting(here)
    if here.rank == 0:
        meeting.tell({})
    else:
        meeting.hear()
    return meeting


# How memory that has run out is told where it is no torch.OutOfMemoryError: by torch's allocators for the CPU and MPS, by the CUDA
# runtime and driver, by libraries (cuBLAS, cuDNN, cuSPARSE, ...: a handle or a workspace of their own), by NCCL, and by C++.
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator: can't allocate memory|\b(CUDA|HIP|MPS|XPU)\b[^\n]{0,40}\bout of memory|cuda runtime error \(2\)"
    r"|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|hipErrorOutOfMemory|(cu|hip|roc|mi)\w*_(STATUS_)?ALLOC_FAILED"
    r"|Failed to (CUDA (host )?)?(c|m)?alloc|nccl\w+Error[\s\S]*?\bout of memory|std::bad_alloc",
    re.IGNORECASE,
)


def out_of_memory(error: BaseException) -> str:
    """What an error, or what it was raised from, says of a device or host that had no memory left, in a line; "" of any other."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        found = _NO_MEMORY.search(text) if isinstance(cause, RuntimeError) else None
        if found:  # NCCL begins with where in torch's source it was called
            return text[text.rfind("\n", 0, found.end()) + 1 :].splitlines()[0].strip()
        if isinstance(cause, torch.OutOfMemoryError | MemoryError):
            return first_line(cause)
        cause = cause.__cause__
    return ""


def unusable_gpus(name: str, capability: float) -> tuple[str, str]:
    """Why this torch cannot use the GPUs that the driver lists, and what would be right; ("", "") where it can.

    name, capability: what the driver says of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said below
        usable = torch.cuda.is_available()
        codes = torch.cuda.get_arch_list() if usable and torch.version.hip is None else []
    wanted = round(capability * 10)
    known = [int(found[1]) for code in codes if (found := re.fullmatch(r"(?:sm|compute)_(\d+)[af]?", code))]
    # Code runs on later GPUs of the same generation, and where it is kept as PTX ("compute") on all later ones.
    runs = any(code <= wanted and code // 10 == wanted // 10 for code in known)
    runs = runs or any(code.startswith("compute") and int(code[8:].rstrip("af")) <= wanted for code in codes)
    if usable and (runs or not known or not wanted):
        return "", ""
    version, cuda = hardware.driver()
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    driver = f"the driver is {version or 'of an unknown version'}" + (f", for CUDA up to {cuda}" if cuda else "")
    message = f"torch {torch.__version__}, {built}, {'has no code for' if usable else 'cannot use'} {name}; {driver}"
    builds = hardware.torch_builds(cuda, capability)
    if torch.version.cuda and not usable and f"cu{torch.version.cuda.replace('.', '')}" in builds:
        return f"{message}: {_reason()}", "that torch fits this driver: see what nvidia-smi says, and CUDA_VISIBLE_DEVICES; or hardware=cpu"
    if not builds:
        return message, "a driver of version 525 or later, or hardware=cpu"
    index = f"{hardware.TORCH_WHEELS}/{builds[0]}"
    return message, f"pip install --force-reinstall torch --index-url {index}, in a checkout PICOTRAIN_INDEX_URL={index} scripts/setup.sh"


def _reason() -> str:
    """What torch says when it is to use a GPU."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return "it finds none"


def memory_in_use(device: torch.device) -> str:
    """The most memory that this process has allocated, and what the device has, in words; "" where torch does not count."""
    if device.type != "cuda":
        return ""
    peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    return f", and {peak / 2**30:.1f} GiB of the device's {total / 2**30:.1f} GiB were allocated at the peak"


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that torch has allocated on a GPU, or, on a CPU, that this process has been resident with; without a sync. None
    where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["peak"]
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return None


def free_memory() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def lost_a_peer(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone: its own error is the one to read."""
    return isinstance(error, dist.DistError | PeerFailed) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def place(device: str) -> torch.device:
    """The device of this kind that is this rank's; for CUDA it is the current one from then on. Raises LaunchError without one."""
    here = ranks.here()
    return _device(device, here.local_rank, here.world_size)


def _device(device: str, local_rank: int, world_size: int) -> torch.device:
    """This rank's device, checked and, for CUDA, made the current one."""
    if device == "mps" and world_size > 1:
        raise LaunchError(f"hardware.device=mps trains in one process, not in {world_size}; hardware.nproc_per_node=1 would be right")
    if device != "cuda":
        return torch.device(device)
    count = torch.cuda.device_count()
    if local_rank >= count:
        fits = f"hardware.nproc_per_node={count}" if count else "hardware.device=cpu"
        raise LaunchError(f"local rank {local_rank} wants a GPU of its own, torch finds {count} here; {fits} would be right")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
