"""The profiler: a few steps recorded by torch.profiler, and what they say written into the run directory.

    profile/step_00000003/rank_0/trace.json.gz     every operator, kernel and allocation: for ui.perfetto.dev
                                 kernels.md        where the time goes
                                 memory.md         who holds the memory at its peak
                                 memory.json.gz    CUDA: the allocator's snapshot, its last events with their Python stacks

Every rank writes its own: one that waits for another is seen in both only. Whatever fails costs the profile, never the run.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerAction, ProfilerActivity

from picotrain.monitor.monitor import Monitor
from picotrain.monitor.tables import NO_OPERATOR, Allocation, Timed, Window, headline, kernels_markdown, memory_markdown
from picotrain.terminal import say

FOLDER = "profile"
STEP = "ProfilerStep"  # what torch calls its marks around steps, as trace tools expect
WARM_UP_STEPS = 3  # of a start: the first compiles, the second rebuilds DDP's buckets, the third warms up the profiler itself
MAX_MEMORY_EVENTS = 100_000  # of the CUDA allocator that a snapshot keeps, the latest ones


def build(monitor: Monitor, device: torch.device, step: int) -> Profiler:
    """The profiler of a run that starts at `step`."""
    return Profiler(monitor, device, _window(monitor, step) if monitor.config.profiler.enabled else range(0))


def _window(monitor: Monitor, step: int) -> range:
    """The steps to record by a run that starts at `step`; none where there is nothing to record, which is said."""
    section = monitor.config.profiler
    num_steps = monitor.plan["num_steps"]
    first = section.first_step
    if first is None:
        there = sorted((monitor.run_dir / FOLDER).glob("step_*/rank_0"))
        if there:
            shown = there[-1].parent.relative_to(monitor.run_dir)
            monitor.warn(f"profiler: {shown} is there already; profiler.first_step=... looks at another step")
            return range(0)
        first = max(step, min(step + WARM_UP_STEPS, num_steps - section.steps))
    elif first < step:
        monitor.warn(f"profiler: step {first:,} is over, this start begins at {step:,}; a later profiler.first_step would be right")
        return range(0)
    return range(first, min(first + section.steps, num_steps))


class Profiler:
    """Records the steps of `window`. `begin` and `end` stand around every step; outside the window they do nothing.

    The step before the window warms torch's profiler up. An evaluation ends the window, so that only steps are in it.
    """

    def __init__(self, monitor: Monitor, device: torch.device, window: range):
        self._monitor, self._device, self._window = monitor, device, window
        self._profile: torch.profiler.profile | None = None  # while it is on
        self._step = -1  # the last that began

    @property
    def on(self) -> bool:
        """Whether torch's profiler is on, which slows a step."""
        return self._profile is not None

    def begin(self, step: int) -> None:
        """Before `step`: switch on where its time has come."""
        if step not in range(self._window.start - 1, self._window.stop):
            return
        with self._at_no_cost(step):
            self._step = step
            if step == self._window.start and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
                torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python", max_entries=MAX_MEMORY_EVENTS)
            if self._profile is None:
                self._profile = self._build(step)
                self._profile.start()
            else:
                self._profile.step()

    def end(self, step: int) -> None:
        """After `step`; after the window's last one write what was recorded. Raises Diverged like `Monitor.flush`."""
        if self.on and step + 1 == self._window.stop:
            self.finish(step + 1)

    def finish(self, step: int) -> None:
        """Write what was recorded, if at least one step was; `step` are done. Raises Diverged like `Monitor.flush`."""
        steps = step - self._window.start
        if self._profile is None or steps <= 0:
            return
        self._monitor.flush()  # waits for the device
        with self._at_no_cost(step):
            profile, memory = self._profile, torch.cuda.memory._snapshot(self._device) if self._device.type == "cuda" else None
            first, notes = self._window.start, _notes(self._monitor, cut_short=self._step == step)
            self._stop()
            wall_ms = sum(row.cpu_time_total for row in profile.key_averages() if row.key.startswith(STEP)) / 1000
            text = self._write(profile, memory, Window(_title(self._monitor), first, steps, wall_ms, notes))
            self._monitor.event(step, "profiled", text)

    def close(self) -> None:
        """Switch off; what was not written is dropped. May be called twice."""
        with suppress(Exception):
            self._stop()

    def _build(self, step: int) -> torch.profiler.profile:
        """Torch's profiler, which marks steps by their numbers from `step` on, and records those of the window."""
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch 2.13 writes a line each to standard error when it starts and stops
        profile = torch.profiler.profile(activities=activities, schedule=self._action, record_shapes=True, profile_memory=True)
        profile.step_num = step
        return profile

    def _action(self, _: int) -> ProfilerAction:
        return ProfilerAction.RECORD if self._step in self._window else ProfilerAction.WARMUP

    def _stop(self) -> None:
        profile, self._profile, self._window = self._profile, None, range(0)
        if profile is None:
            return
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(None)
        profile.stop()

    def _write(self, profile: Any, memory: Any, window: Window) -> str:
        """All files, whole or not at all; what they are, in words."""
        run_dir, rank = self._monitor.run_dir, self._monitor.rank
        folder = run_dir / FOLDER / f"step_{window.first:08d}" / f"rank_{rank}"
        arriving = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(arriving, ignore_errors=True)
        arriving.mkdir(parents=True)
        try:
            host, device = _timed(profile, self._device)
            allocations = list(_allocations(profile, self._device))
            (arriving / "kernels.md").write_text(kernels_markdown(window, host, device), encoding="utf-8")
            (arriving / "memory.md").write_text(memory_markdown(window, allocations, str(self._device)), encoding="utf-8")
            if memory is not None:
                (arriving / "memory.json.gz").write_bytes(gzip.compress(json.dumps(memory, default=str).encode(), 4))
            _write_trace(profile, arriving / "trace.json")
            shutil.rmtree(folder, ignore_errors=True)
            arriving.rename(folder)
        finally:
            shutil.rmtree(arriving, ignore_errors=True)
        each = f"{window.wall_ms / window.steps:,.0f} ms each"
        return f"{window}, {each}: {headline(device or host, window)}; {(folder / 'kernels.md').relative_to(run_dir)}"

    @contextmanager
    def _at_no_cost(self, step: int) -> Generator[None]:
        """What fails switches the profiler off and is recorded; the run goes on."""
        try:
            yield
        except Exception as error:  # torch's profiler and a full disk may raise anything
            self.close()
            text = f"{type(error).__name__}: {error}; training goes on without the profiler"
            self._monitor.event(step, "profile_failed", text)
            if self._monitor.rank:  # whose monitor is silent
                say(f"picotrain: rank {self._monitor.rank}: the profiler failed: {text}")


def _title(monitor: Monitor) -> str:
    plan = monitor.plan
    return plan["name"] + (f", rank {monitor.rank} of {plan['world_size']}" if plan["world_size"] > 1 else "")


def _notes(monitor: Monitor, cut_short: bool) -> list[str]:
    plan = monitor.plan
    compiled = "compiled" if plan["compile"] else "not compiled"
    notes = [f"{plan['hardware_name']} ({plan['device']}), {plan['precision']}, {compiled}, torch {torch.__version__}"]
    return [*notes, "a part of another step, broken off, is in it"] if cut_short else notes


def _timed(profile: Any, device: torch.device) -> tuple[list[Timed], list[Timed] | None]:
    """Operators of the host and kernels of the device (None on a CPU)."""
    for event in profile.events():
        if event.name.startswith("## Call CompiledFxGraph"):
            event.name = _compiled_name(event)
    host, kernels = [], []
    for row in profile.key_averages(group_by_input_shape=True):
        shapes = " ".join(str(shape).replace(" ", "") for shape in row.input_shapes or () if shape)
        if row.device_type.name != "CPU":
            if not row.is_user_annotation:
                kernels.append(Timed(row.key, "", row.count, row.self_device_time_total / 1000))
        elif row.key.startswith(STEP):  # what of a step is in no operator
            host.append(Timed(NO_OPERATOR, "", 0, row.self_cpu_time_total / 1000))
        else:
            host.append(Timed(row.key, shapes, row.count, row.self_cpu_time_total / 1000))
    return host, kernels if device.type == "cuda" else None


def _compiled_name(event: Any) -> str:
    """What a reader can make of "## Call CompiledFxGraph fdl3zywf3... ##": where it is called, and the beginning of its hash."""
    inside = event.cpu_parent
    while inside is not None and inside.name.startswith("Torch-Compiled Region"):
        inside = inside.cpu_parent
    return f"compiled code {event.name.split()[3][:6]} in {inside.name if inside is not None else '?'}"


def _allocations(profile: Any, device: torch.device) -> Iterator[Allocation]:
    """Every allocation on the device's kind, each with the outermost operator it happened in."""
    from torch._C._profiler import RecordScope, _EventType  # torch's own memory tools read this tree; its names may change

    todo = [(event, NO_OPERATOR) for event in profile.profiler.kineto_results.experimental_event_tree()]
    while todo:
        event, by = todo.pop()
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            if fields.device.type == device.type:
                yield Allocation(event.start_time_ns, fields.ptr, fields.alloc_size, fields.total_allocated, by)
            continue
        if by == NO_OPERATOR and kind == _EventType.TorchOp and fields.scope != RecordScope.USER_SCOPE:
            by = event.name.removeprefix("autograd::engine::evaluate_function: ")
        todo += [(child, by) for child in event.children]


def _write_trace(profile: Any, path: Path) -> None:
    """trace.json.gz. Torch does not say when it could not write all of it."""
    profile.export_chrome_trace(str(path))
    trace = path.read_bytes()
    if not trace.rstrip().endswith(b"}"):
        raise OSError(f"{path.name} could not be written whole")
    path.with_suffix(".json.gz").write_bytes(gzip.compress(trace, 4))
    path.unlink()
