"""The monitor: values fetched late, lines in metrics.jsonl, the console, trackers that cannot cost the run."""

from __future__ import annotations

import importlib.machinery
import io
import itertools
import math
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict
from torch.utils._python_dispatch import TorchDispatchMode

from picotrain.config.schema import Config
from picotrain.config.validate import validate, with_values
from picotrain.errors import ConfigError, Diverged
from picotrain.metrics import read_metrics
from picotrain.monitor import Console, Monitor, Pace, Smoother, build_trackers, mfu, slow
from picotrain.monitor.console import fit, train_fields
from picotrain.monitor.events import EventTimer
from picotrain.trackers.tensorboard import TensorBoard

PLAN = {
    "name": "d2-tiny", "parameters": {"embedding": 1_000, "matrices": 2_000, "head": 1_000, "total": 4_000}, "flops_per_token": 1_000,
    "device": "cpu", "hardware_name": "a CPU", "precision": "fp32", "peak_flops": 1e6, "seq_len": 32, "total_batch_size": 256,
    "device_batch_size": 8, "grad_accum_steps": 1, "dp_size": 1, "world_size": 2, "num_steps": 100, "epochs": 0.5, "lanes": 8,
    "attention": "sdpa", "window_attention": "banded",
}  # fmt: skip


class FakePlan(BaseModel):
    model_config = ConfigDict(extra="allow")


class Clock:
    """A clock that stands still unless told."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Scalar:
    """A value on a device that takes `wait_s` to be there; it knows whether it was asked for."""

    def __init__(self, value: float, clock: Clock | None = None, wait_s: float = 0.0):
        self.value, self.clock, self.wait_s, self.fetched = value, clock, wait_s, False

    def item(self) -> float:
        self.fetched = True
        if self.clock:
            self.clock.now_s += self.wait_s
        return self.value

    __float__ = item


class FakeGpu:
    """A device that computes behind the host's back, on a clock of its own making."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.free_s = 0.0  # when it will have done all that is queued

    def compute(self, seconds: float) -> None:
        self.free_s = max(self.free_s, self.clock.now_s) + seconds

    def wait(self) -> None:
        self.clock.now_s = max(self.clock.now_s, self.free_s)

    def scalar(self, value: float) -> torch.Tensor:
        return torch.tensor(float(value))

    def timer(self) -> EventTimer:
        return EventTimer(lambda: FakeEvent(self), pin_memory=False)


class FakeEvent:
    """As torch.cuda.Event: stamped by the device, asked for only when it has come."""

    def __init__(self, gpu: FakeGpu):
        self.gpu, self.at_s = gpu, -1.0

    def record(self) -> None:
        self.at_s = self.gpu.free_s = max(self.gpu.free_s, self.gpu.clock.now_s)

    def synchronize(self) -> None:
        self.gpu.clock.now_s = max(self.gpu.clock.now_s, self.at_s)

    def elapsed_time(self, end: FakeEvent) -> float:
        assert 0 <= self.at_s <= end.at_s <= self.gpu.clock.now_s
        return (end.at_s - self.at_s) * 1000


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def config(**logger: Any) -> Config:
    return validate(
        {
            "model": {"depth": 2, "head_dim": 64},
            "data": {"kind": "pystdlib", "name": "tiny"},
            "optimizer": {"matrix_lr": 0.02, "embed_lr": 0.3, "head_lr": 0.004},
            "schedule": {"kind": "constant"},
            "logger": {"log_every": 10} | logger,
        }
    )


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Monitor]:
    def build(plan: dict[str, Any] | None = None, logger: dict[str, Any] | None = None, **options: Any) -> Monitor:
        options = {"stream": io.StringIO(), "now_s": Clock()} | options
        return Monitor(tmp_path, config(**(logger or {})), FakePlan(**(PLAN | (plan or {}))), **options)

    return build


def step(monitor: Monitor, s: int, loss: Any = 2.0, started_s: Any = 100.0, **more: Any) -> None:
    values = {"grad_norm": 1.0, "lr": 0.01, "lr_factor": 0.5, "data_wait_ms": 0.5, "epoch": 0.1, "pq": 1, "rg": 2} | more
    monitor.train_step(step=s, began=started_s, loss=loss, **values)


def lines(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == kind]


# -- meters


def test_the_smoothed_loss_is_the_corrected_moving_average() -> None:
    smoother = Smoother(beta=0.9)
    assert smoother.value is None
    assert smoother.update(10.0) == pytest.approx(10.0)  # not 1.0: the start at zero is corrected for
    assert smoother.update(5.0) == pytest.approx((0.9 * 10 + 5) / 1.9)


def test_a_restored_smoother_goes_on_to_the_bit() -> None:
    straight, first, second = Smoother(), Smoother(), Smoother()
    values = [math.sin(i) for i in range(20)]
    expected = [straight.update(x) for x in values]
    got = [first.update(x) for x in values[:7]]
    second.load_state_dict(first.state_dict())
    assert got + [second.update(x) for x in values[7:]] == expected


def test_the_eta_is_the_median_pace_without_the_first_step() -> None:
    pace = Pace()
    pace.update(60.0)  # compiles
    assert pace.eta_s(10) is None
    for dt_s in (1.0, 9.0, 2.0):
        pace.update(dt_s)
    assert pace.eta_s(10) == 20.0


def test_mfu_is_flops_per_second_over_the_peak_of_all_devices() -> None:
    assert mfu(1_000, 256, 0.5, 1e6, 2) == pytest.approx(0.256)
    assert mfu(1_000, 256, 0.5, None, 2) is None


# -- what is recorded, and when it is fetched


def test_a_train_line_holds_every_field(make: Callable[..., Monitor], tmp_path: Path) -> None:
    monitor = make()
    monitor.start(0)
    monitor._now_s.now_s = 100.5
    step(monitor, 0, loss=Scalar(2.0), grad_norm=Scalar(0.25), skipped=1)
    assert lines(tmp_path, "train") == [
        {
            "step": 0, "kind": "train", "loss": 2.0, "smooth_loss": pytest.approx(2.0), "lr": 0.01, "lr_factor": 0.5, "grad_norm": 0.25,
            "data_wait_ms": 0.5, "epoch": 0.1, "pq": 1, "rg": 2, "skipped": 1, "tokens": 256, "tok_per_sec": 512.0, "mfu": 0.256,
            "dt_ms": 500.0, "total_training_time_s": 0.5, "rank": 0, "world_size": 2,
        }
    ]  # fmt: skip


def test_on_a_device_a_loss_is_fetched_one_step_late(make: Callable[..., Monitor], tmp_path: Path) -> None:
    gpu = FakeGpu()
    monitor = make({"device": "cuda"}, timer=gpu.timer())
    monitor.start(0)
    for s in range(3):
        step(monitor, s, gpu.scalar(s), monitor.timer.mark())
        assert [line["step"] for line in lines(tmp_path, "train")] == list(range(s))
    monitor.flush()
    assert [line["loss"] for line in lines(tmp_path, "train")] == [0.0, 1.0, 2.0]


def test_anything_else_that_is_recorded_comes_after_the_pending_step(make: Callable[..., Monitor], tmp_path: Path) -> None:
    gpu = FakeGpu()
    monitor = make({"device": "cuda"}, timer=gpu.timer())
    monitor.start(0)
    step(monitor, 0, started_s=monitor.timer.mark())
    monitor.val(1, val_bpb=1.5, val_loss=4.0, tokens=99)
    assert [line["kind"] for line in read_metrics(tmp_path / "metrics.jsonl")] == ["event", "train", "val"]


def test_the_times_of_late_fetched_steps_add_up_to_the_time_spent(make: Callable[..., Monitor], tmp_path: Path) -> None:
    """The host needs 0.1 s to launch a step, the device 1 s to compute it; an evaluation of 50 s counts for nothing."""
    gpu = FakeGpu()
    monitor = make({"device": "cuda"}, now_s=gpu.clock, timer=gpu.timer())
    monitor.start(0)
    for s in range(6):
        if s == 3:
            monitor.flush()
            gpu.compute(50.0)
            gpu.wait()
        began = monitor.timer.mark()
        gpu.clock.now_s += 0.1
        gpu.compute(1.0)
        step(monitor, s, gpu.scalar(2.0), began)
    monitor.flush()
    assert [line["dt_ms"] for line in lines(tmp_path, "train")] == pytest.approx([1100, 1000, 1000, 1100, 1000, 1000])
    assert monitor.total_training_time_s == pytest.approx(6.2)


def test_a_flush_before_every_evaluation_changes_no_time_and_no_step_is_waited_for_but_the_one_before(
    make: Callable[..., Monitor], tmp_path: Path
) -> None:
    """The host launches a step in a millisecond, the device takes 1 s for it, and 3 s for an evaluation that is queued just so."""
    gpu = FakeGpu()
    monitor = make({"device": "cuda"}, now_s=gpu.clock, timer=gpu.timer())
    monitor.start(0)
    done_s = []
    for s in range(12):
        if s % 4 == 0:
            gpu.compute(3.0)
            monitor.val(s, val_bpb=1.5, val_loss=4.0, tokens=99)
        began = monitor.timer.mark()
        gpu.clock.now_s += 0.001
        gpu.compute(1.0)
        done_s.append(gpu.free_s)
        step(monitor, s, gpu.scalar(2.0), began, skipped=gpu.scalar(0.0), source_tokens={"web": gpu.scalar(256).long()})
        if s:
            assert gpu.clock.now_s <= done_s[s - 1] + 0.01  # what is queued after it goes on meanwhile
    monitor.flush()
    found = lines(tmp_path, "train")
    assert [line["dt_ms"] for line in found] == pytest.approx([1000] * 12, abs=2)
    assert [line["tok_per_sec"] for line in found] == pytest.approx([256] * 12, rel=0.01)
    assert sum(line["dt_ms"] for line in found) / 1000 == pytest.approx(12, abs=0.02)
    assert {(line["loss"], line["skipped"], line["source_tokens"]["web"]) for line in found} == {(2.0, 0, 256)}


def test_what_a_device_waits_for_its_rows_is_time_of_the_step_and_what_it_computes_meanwhile_is_not_counted_twice(
    make: Callable[..., Monitor], tmp_path: Path
) -> None:
    gpu = FakeGpu()
    monitor = make({"device": "cuda"}, now_s=gpu.clock, timer=gpu.timer())
    monitor.start(0)
    for s in range(4):
        before = monitor.timer.mark()
        gpu.clock.now_s += 1.5  # of which the device computes the step before for 1 s
        waited = before, monitor.timer.mark()
        began = monitor.timer.mark()
        gpu.compute(1.0)
        step(monitor, s, gpu.scalar(2.0), began, waited=waited)
    monitor.flush()
    assert [line["dt_ms"] for line in lines(tmp_path, "train")] == pytest.approx([2500, 1500, 1500, 1500])


def test_a_step_s_values_reach_the_host_in_one_copy(make: Callable[..., Monitor], tmp_path: Path) -> None:
    """On a device every value that is asked for by itself would stop the host until all that is queued is done."""
    asked: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    gpu = FakeGpu()
    monitor = make({"device": "cuda"}, now_s=gpu.clock, timer=gpu.timer())
    monitor.start(0)
    tokens = 2**24 + 1  # fp32 has no such number
    with Watch():
        for s in range(2):
            more = {"grad_norm": gpu.scalar(0.5), "skipped": gpu.scalar(s), "source_tokens": {"a": torch.tensor(tokens)}}
            step(monitor, s, gpu.scalar(1.5), monitor.timer.mark(), **more)
        monitor.flush()
    assert "_local_scalar_dense" not in asked and asked.count("copy_") == 2
    found = [(line["loss"], line["grad_norm"], line["skipped"], line["source_tokens"]["a"]) for line in lines(tmp_path, "train")]
    assert found == [(1.5, 0.5, 0, tokens), (1.5, 0.5, 1, tokens)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("is_main", [True, False])
def test_a_loss_that_is_not_finite_ends_the_run_on_every_rank(
    make: Callable[..., Monitor], tmp_path: Path, bad: float, is_main: bool
) -> None:
    gpu = FakeGpu()
    monitor = make({"device": "cuda"}, is_main=is_main, timer=gpu.timer())
    monitor.config = with_values(monitor.config, {"train.max_skipped": 0})
    monitor.start(0)
    step(monitor, 0, 2.0, gpu.timer().mark())
    step(monitor, 1, gpu.scalar(bad), gpu.timer().mark(), skipped=gpu.scalar(1.0))
    with pytest.raises(Diverged, match=rf"the loss is {bad} and the gradient norm 1.0 at step 1: .*optimizer\.matrix_lr"):
        step(monitor, 2, 2.0, gpu.timer().mark())
    monitor.close()
    if is_main:
        assert [line["loss"] for line in lines(tmp_path, "train")] == [2.0, None]
        assert lines(tmp_path, "train")[1]["smooth_loss"] == pytest.approx(2.0)
        assert lines(tmp_path, "event")[-1]["name"] == "diverged"


def test_only_the_main_rank_writes_and_prints(make: Callable[..., Monitor], tmp_path: Path) -> None:
    stream = io.StringIO()
    monitor = make(is_main=False, rank=1, stream=stream)
    monitor.start(0)
    step(monitor, 0)
    monitor.val(1, 1.0, 2.0, 3)
    monitor.sample(1, [{"prompt": "a", "text": "b"}])
    monitor.checkpoint(1, tmp_path, 0.1)
    monitor.progress("bits per byte")(1, 2)
    monitor.warn("x")
    assert monitor.metrics_bytes() == 0
    monitor.close()
    assert stream.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_a_resume_cuts_the_lines_back_and_goes_on_with_loss_and_time(make: Callable[..., Monitor], tmp_path: Path) -> None:
    def run(monitor: Monitor, first: int, last: int) -> None:
        for s in range(first, last):
            monitor._now_s.now_s += 1.0
            step(monitor, s, loss=5.0 - s / 10, started_s=monitor._now_s.now_s - 1.0)

    straight = make()
    straight.start(0)
    run(straight, 0, 20)
    straight.close()
    expected = lines(tmp_path, "train")
    (tmp_path / "metrics.jsonl").unlink()

    before = make()
    before.start(0)
    run(before, 0, 10)
    saved = before.metrics_bytes(), before.smoother_state(), before.total_training_time_s
    run(before, 10, 13)  # and is killed
    after = make()
    after.start(10, *saved)
    run(after, 10, 20)
    after.close()
    assert lines(tmp_path, "train") == expected
    assert [event["name"] for event in lines(tmp_path, "event")] == ["started", "resumed"]
    kept = list(read_metrics(tmp_path / "metrics.cut.jsonl"))
    assert [line["step"] for line in kept] == [10, 11, 12]
    assert "metrics.cut.jsonl" in lines(tmp_path, "event")[1]["message"]


def test_a_start_without_a_checkpoint_puts_the_lines_of_an_earlier_attempt_aside(make: Callable[..., Monitor], tmp_path: Path) -> None:
    first = make()
    first.start(0)
    step(first, 0)
    second = make()
    second.start(0)
    step(second, 0)
    assert len(lines(tmp_path, "train")) == 1
    assert (tmp_path / "metrics.cut.jsonl").exists()


def test_a_checkpoint_line_names_the_folder_within_the_run_and_its_size(make: Callable[..., Monitor], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step_00000010"
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(b"12345")
    (folder / "b").write_bytes(b"123")
    monitor = make()
    monitor.start(0)
    monitor.checkpoint(10, folder, 0.25)
    assert lines(tmp_path, "checkpoint") == [
        {"step": 10, "kind": "checkpoint", "path": "checkpoints/step_00000010", "bytes": 8, "seconds": 0.25, "stall_s": 0.25}
    ]


# -- console


def test_a_pipe_gets_plain_flushed_lines_with_every_field(make: Callable[..., Monitor], tmp_path: Path) -> None:
    stream = io.StringIO()
    monitor = make(stream=stream)
    monitor.start(0)
    for s in range(100):
        monitor._now_s.now_s = 100.25
        step(monitor, s, loss=3.0, started_s=100.0 if s == 0 else 100.125, epoch=0.13, pq=3, rg=12)
    monitor.progress("bits per byte")(1, 2)
    monitor.close()
    text = stream.getvalue()
    assert "\x1b" not in text and "━" not in text and "bits per byte" not in text
    train = [line for line in text.splitlines() if "tok/s" in line]
    assert [line.split("/")[0].strip() for line in train] == [*"123", "10", "20", "30", "40", "50", "60", "70", "80", "90", "100"]
    assert train[0] == (
        "  1/100  loss 3.0000  lr 1.0e-02  grad 1.000  dt 250ms  1,024 tok/s  mfu 51.2%  ep 0.13  rank 0  pq  3 rg 12   0:00  eta ?"
    )


def test_the_banner_says_what_is_trained_on_what(make: Callable[..., Monitor], tmp_path: Path) -> None:
    stream = io.StringIO()
    make(stream=stream).start(0)
    banner = stream.getvalue()
    for fact in ("d2-tiny", "4,000 parameters", "256 tokens a step = 8 rows x 32 tokens", "100 steps = 25.6k tokens = 0.50 epochs",
                 "2 x a CPU (cpu), fp32, peak 1.00 MFLOP/s each, attention by sdpa, in windows by banded",
                 "tiny, 8 lanes", str(tmp_path)):  # fmt: skip
        assert fact in banner


def test_a_log_line_of_a_long_run_on_a_terminal_fits_into_its_width() -> None:
    record = {
        "step": 12_345, "smooth_loss": 2.3456, "lr": 1.5e-2, "grad_norm": 0.4123, "dt_ms": 312.0, "tok_per_sec": 1.68e6, "mfu": 0.521,
        "epoch": 0.13, "rank": 0, "pq": 113, "rg": 12, "total_training_time_s": 3751.0,
    }  # fmt: skip
    fields = train_fields(record, 21_400, 3500.0, 41_200_000_000)
    shown = {width: "  ".join(text.plain for text in fit(fields, width)) for width in (60, 80, 100, 120)}
    for width, line in shown.items():
        assert len(line) <= width
        assert line.startswith("12346/21400  loss 2.3456") and line.endswith("eta 58:20")
    assert "lr 1.5e-02" in shown[80] and "grad" not in shown[80]
    assert "mfu 52.1%" in shown[100] and "grad 0.412" in shown[100]
    assert "rank" not in shown[120] and "mem 41.2 GB" in shown[120]  # the rank is always 0
    assert len(fit(fields, 160)) == len(fields)


def test_a_short_run_on_a_cpu_leaves_out_what_says_nothing_there() -> None:
    record = {
        "step": 999, "smooth_loss": 12.345, "lr": 0.03, "grad_norm": 123.4, "dt_ms": 3210.0, "tok_per_sec": 4745.0, "mfu": None,
        "epoch": 0.13, "rank": 0, "pq": 3, "rg": 12, "total_training_time_s": 3751.0,
    }  # fmt: skip
    fields = train_fields(record, 2000, 3500.0, 533_000_000)
    line = "  ".join(text.plain for text in fit(fields, 120))
    assert "mfu" not in line and "n/a" not in line
    assert all(part in line for part in ("lr 3.0e-02", "grad 123.4", "mem  533 MB", "ep 0.13", "58:20"))


@pytest.mark.parametrize("terminal", [True, False])
def test_model_text_is_neither_markup_nor_terminal_escape(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal() if terminal else io.StringIO()
    Console(10, stream, width=120).sample(5, [{"prompt": "A [b", "text": "[bold]x[/bold] [red]y \x1b[2J\n  end"}])
    shown = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert "    [A [b][bold]x[/bold] [red]y ␛[2J" in shown
    assert re.search(r"^      end\s*$", shown, re.MULTILINE)
    assert "\x1b[2J" not in shown


def test_a_validation_says_whether_it_is_the_best_so_far() -> None:
    stream = io.StringIO()
    console = Console(100, stream)
    console.val(0, 3.0, 8.0, 1000, None)
    console.val(50, 1.5, 4.0, 1000, 3.0)
    console.val(100, 1.6, 4.1, 1000, 1.5)
    console.val(100, None, None, 1000, 1.5)
    first, better, worse, broken = stream.getvalue().splitlines()
    assert "best" not in first and better.endswith("* best so far, -1.5000") and worse.endswith("+0.1000 on the best, 1.5000")
    assert "val_bpb n/a" in broken


@pytest.mark.parametrize("columns", [60, 80])
def test_a_validation_is_one_line_on_a_narrow_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    Console(10_000, stream, columns).val(5_000, 1.5, 4.0, 1000, 3.0)
    (line,) = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
    assert "val_bpb 1.5000" in line and line.endswith("* best so far, -1.5000") and len(line) <= columns


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end(make: Callable[..., Monitor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    monitor = make(stream=stream)
    monitor.start(0)
    monitor._now_s.now_s = 100.5
    step(monitor, 0, loss=3.0)
    monitor.progress("bits per byte")(3, 40)
    monitor.close()
    text = stream.getvalue()
    assert "━" in text and "loss 3.0000" in text and "bits per byte 3/40" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0  # the cursor is given back


def test_a_dumb_terminal_is_treated_like_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    Console(10, stream).event(1, "stopped", "by a signal")
    assert stream.getvalue() == " 1/10  stopped  by a signal\n"


def test_a_stream_that_cannot_hold_a_character_shows_a_question_mark() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(10, stream).sample(5, [{"prompt": "naïve", "text": " 日本"}])
    assert b"[na?ve] ??" in raw.getvalue()
    stream.detach()


def test_a_closed_pipe_does_not_stop_the_run(make: Callable[..., Monitor], tmp_path: Path) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monitor = make(stream=Closed())
    monitor.start(0)
    step(monitor, 0)
    monitor.close()
    assert len(lines(tmp_path, "train")) == 1


# -- trackers


class FakeTracker:
    """Remembers what it gets; fails from its second record on when told to."""

    fail = False

    def __init__(self, run_dir: Path, config: Any):
        self.records: list[dict[str, Any]] = []
        self.calls, self.closed = 0, False
        FakeTracker.last = self

    def log(self, record: dict[str, Any]) -> None:
        self.calls += 1
        if self.fail and self.calls > 1:
            raise ConnectionError("no [network]")
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch) -> type[FakeTracker]:
    package = types.ModuleType("tensorboard")
    package.__spec__ = importlib.machinery.ModuleSpec("tensorboard", None)
    monkeypatch.setitem(sys.modules, "tensorboard", package)
    monkeypatch.setattr(TensorBoard, "__new__", lambda cls, *args: FakeTracker(*args))
    monkeypatch.setattr(FakeTracker, "fail", False)
    return FakeTracker


def test_a_tracker_gets_what_metrics_jsonl_gets(make: Callable[..., Monitor], tmp_path: Path, tracker: type[FakeTracker]) -> None:
    monitor = make(logger={"trackers": ["tensorboard"]})
    monitor.start(0)
    step(monitor, 0)
    monitor.val(1, 1.5, float("nan"), 10)
    monitor.close()
    assert tracker.last.records == list(read_metrics(tmp_path / "metrics.jsonl"))
    assert tracker.last.closed


def test_a_tracker_that_fails_is_switched_off_with_one_line(
    make: Callable[..., Monitor], tmp_path: Path, tracker: type[FakeTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "fail", True)
    stream = io.StringIO()
    monitor = make(logger={"trackers": ["tensorboard"]}, stream=stream)
    monitor.start(0)
    for s in range(3):
        step(monitor, s)
    monitor.close()
    assert len(lines(tmp_path, "train")) == 3
    assert tracker.last.calls == 2
    assert stream.getvalue().count("WARNING: FakeTracker failed and is switched off: ConnectionError: no [network]") == 1


def test_a_missing_package_or_an_unknown_name_is_said_with_what_would_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("picotrain.monitor.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"2 problems:(?s:.)*pip install 'picotrain\[wandb\]'(?s:.)*no tracker is called 'mlflow'"):
        build_trackers(["wandb", "mlflow"], tmp_path, {})


def test_a_tracker_that_does_not_start_is_a_users_error(
    tmp_path: Path, tracker: type[FakeTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run_dir: Path, config: Any) -> None:
        raise PermissionError("not logged in")

    monkeypatch.setattr(TensorBoard, "__new__", lambda cls, *args: refuse(*args))
    with pytest.raises(ConfigError, match="tensorboard does not start: not logged in"):
        build_trackers(["tensorboard"], tmp_path, {})


# -- layers


def test_monitor_and_report_import_neither_torch_nor_matplotlib() -> None:
    code = "import sys, picotrain.monitor, picotrain.report; print([m for m in ('torch', 'matplotlib', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_updates_that_are_left_out_are_counted_and_too_many_in_a_row_end_the_run(make: Callable[..., Monitor], tmp_path: Path) -> None:
    monitor = make()
    monitor.config = with_values(monitor.config, {"train.max_skipped": 2})
    monitor.start(0)
    for number, skipped in enumerate((True, True, False, True, True)):
        step(monitor, number, 2.0, grad_norm=math.nan if skipped else 1.0, skipped=skipped)
    with pytest.raises(Diverged, match="the loss is 2.0 and the gradient norm nan at step 5: training has diverged, 3 updates in a row"):
        step(monitor, 5, 2.0, grad_norm=math.nan, skipped=True)
    monitor.close()
    assert [line["skipped"] for line in lines(tmp_path, "train")] == [1, 2, 2, 3, 4, 5]
    assert [line["name"] for line in lines(tmp_path, "event")][1:] == ["skipped_step"] * 5 + ["diverged"]


# -- slow steps and silence


def test_a_log_says_something_every_half_minute_however_rare_its_lines_are(make: Callable[..., Monitor]) -> None:
    stream, clock = io.StringIO(), Clock()
    monitor = make(stream=stream, now_s=clock, logger={"log_every": 1000})
    monitor.start(0)
    for s in range(60):
        clock.now_s += 7
        step(monitor, s, started_s=clock.now_s - 7)
    shown = [int(line.split("/")[0]) for line in stream.getvalue().splitlines() if "tok/s" in line]
    assert shown[:3] == [1, 2, 3] and {later - before for before, later in itertools.pairwise(shown[2:])} == {5}
    progress = monitor.progress("bits per byte")
    for batch in range(10):
        clock.now_s += 10
        progress(batch + 1, 10)
    told = [line for line in stream.getvalue().splitlines() if line.startswith("bits per byte")]
    monitor.close()
    assert 2 <= len(told) <= 4


class Work:
    """Steps of a process whose CPU time, page faults and load are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, on_cpu: bool = True):
        self.used = slow._Used(0.0, 0.0, 0)
        monkeypatch.setattr(slow._Used, "now", lambda: self.used)
        monkeypatch.setattr(slow.hardware, "cores", lambda: 2)
        self.load(monkeypatch, 2.0)
        self.steps = slow.SlowSteps(on_cpu)

    def load(self, monkeypatch: pytest.MonkeyPatch, load: float) -> None:
        monkeypatch.setattr(slow.hardware, "load", lambda: load)

    def step(
        self, dt_s: float, count: int = 1, cores: float = 1.9, wait_s: float = 0.0, faults: int = 0, saving: bool = False
    ) -> list[str]:
        said = []
        for _ in range(count):
            self.used = slow._Used(self.used.wall_s + dt_s, self.used.cpu_s + cores * dt_s, self.used.faults + faults)
            said.append(self.steps.update(dt_s, wait_s, saving))
        return [text for text in said if text]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"cores": 0.9}, "other processes take the cores (load 2.0 on 2 cores)"),
        ({"wait_s": 3.0}, "text comes too slowly"),
        ({"saving": True}, "checkpoint"),
        ({"faults": 5000}, "memory is short"),
        ({}, "the cores are slower"),
    ],
)
def test_a_step_of_three_times_the_usual_is_said_once_with_the_likely_reason(
    values: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work(monkeypatch)
    assert work.step(1.0, 40) == work.step(2.9) == []
    (said,) = work.step(4.0, 30, **values)
    assert reason in said and "4.00s instead of 1.00s" in said
    assert work.step(1.0, 200) == work.step(4.0, 30, **values) == []  # too soon again
    assert work.step(1.0, 299) == work.step(1.0, 2) == []
    assert len(work.step(4.0, 30, **values)) == 1


def test_short_steps_are_worth_a_word_when_many_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    assert work.step(0.05, 100) == work.step(0.3) == work.step(0.05, 20) == []
    work.load(monkeypatch, 9.0)
    assert ["other processes" in text for text in work.step(0.3, 100)] == [True]
    assert "nvidia-smi" in (lambda gpu: gpu.step(1.0, 10) + gpu.step(9.0))(Work(monkeypatch, on_cpu=False))[0]


def test_slow_steps_are_an_event_and_a_line(make: Callable[..., Monitor], tmp_path: Path) -> None:
    stream, clock = io.StringIO(), Clock()
    monitor = make(stream=stream, now_s=clock, plan={"device": "cpu"})
    monitor.start(0)
    for s in range(20):
        took_s = 10.0 if s >= 15 else 1.0
        clock.now_s += took_s
        step(monitor, s, started_s=clock.now_s - took_s, data_wait_ms=8000.0 if s >= 15 else 1.0)
    monitor.close()
    (event,) = (line for line in lines(tmp_path, "event") if line["name"] == "slow_steps")
    assert event["step"] == 15 and event["message"] in stream.getvalue()
    assert [line["step"] for line in lines(tmp_path, "train")] == list(range(20))


@pytest.mark.parametrize(("precision", "clip"), [("fp32", 1.0), ("bf16", None)])
def test_what_a_diverged_run_is_told_to_try_is_not_what_it_does_already(
    make: Callable[..., Monitor], precision: str, clip: float | None
) -> None:
    monitor = make(plan={"precision": precision})
    monitor.config = with_values(monitor.config, {"train.max_skipped": 0, "train.grad_clip": clip})
    monitor.start(0)
    with pytest.raises(Diverged) as diverged:
        step(monitor, 0, 2.0, grad_norm=math.nan, skipped=True)
    monitor.close()
    told = str(diverged.value)
    assert ("train.precision=fp32" in told) == (precision != "fp32")
    assert ("lower train.grad_clip than 1" in told) == (clip is not None) and ("train.grad_clip=1" in told) == (clip is None)
