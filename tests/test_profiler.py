"""The profiler: what a run writes about a few of its steps, and that it costs the other steps and the run nothing."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from picotrain.checkpoint.archive.remote import is_mirrored
from picotrain.config.identity import classify_change
from picotrain.monitor import profiler
from picotrain.monitor.tables import NO_OPERATOR, Allocation, Timed, Window, kernels_markdown, memory_markdown
from picotrain.report import facts
from tests.conftest import lines, losses, picotrain, start

ON = "profiler.enabled=true"
ALL_FILES = ["kernels.md", "memory.md", "trace.json.gz"]


def profiled(run_dir: Path) -> list[str]:
    """The folders of a run that hold a profile."""
    return sorted(str(path.relative_to(run_dir / "profile")) for path in (run_dir / "profile").glob("*/*"))


def trace_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]


def steps_in(folder: Path) -> list[int]:
    """The steps of a trace, by the annotation that trace tools look for."""
    names = [event["name"] for event in trace_of(folder) if event.get("cat") == "user_annotation"]
    return [int(name.partition("#")[2]) for name in names if name.startswith("ProfilerStep#")]


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in lines(run_dir, "event") if event["name"] == name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny) -> tuple[Path, Path]:
    """The same run of 12 steps twice, the second with a profile of steps 3 to 5; validation is due at step 6."""
    plain, looked_into = (tmp_path_factory.mktemp("runs") / name for name in ("plain", "profiled"))
    for run_dir, more in ((plain, ()), (looked_into, (ON,))):
        done = picotrain("train", *tiny(run_dir, *more))
        assert done.returncode == 0, done.stderr
        assert "profile" not in done.stdout if run_dir == plain else "profile/step_00000003/rank_0/kernels.md" in done.stdout
    return plain, looked_into


def test_a_profile_is_written_whole_and_the_trace_has_its_steps_and_the_models_operators(runs: tuple[Path, Path]):
    folder = runs[1] / "profile/step_00000003/rank_0"
    assert sorted(path.name for path in folder.iterdir()) == ALL_FILES
    assert [path.name for path in folder.parent.iterdir()] == ["rank_0"]  # nothing temporary
    assert steps_in(folder) == [3, 4, 5]
    operators = Counter(event["name"] for event in trace_of(folder) if event.get("cat") == "cpu_op")
    # 2 layers of 6 matrices and the head, forward and twice backward, in each step.
    assert operators["aten::mm"] == 3 * 3 * (2 * 6 + 1)
    assert operators["aten::_fused_adamw_"] >= 3


def test_the_table_of_operators_counts_by_the_step_and_its_shares_make_up_the_whole(runs: tuple[Path, Path]):
    text = (runs[1] / "profile/step_00000003/rank_0/kernels.md").read_text()
    assert re.match(r"# d2-files-\w{8}: steps 3 to 5\n", text)
    table = text.partition("## Operators by their own time on the host")[2].partition("## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")][2:]
    calls = {row[0]: row[3] for row in rows}
    assert calls["`aten::mm`"] == "39"
    assert sum(float(row[1].removesuffix("%")) for row in rows) == pytest.approx(100, abs=2)
    assert {len(line) for line in table.splitlines() if line.startswith("|")} == {len(table.split("\n")[2])}  # reads well as it is


def test_only_profiled_steps_are_flagged_and_they_count_in_no_throughput(runs: tuple[Path, Path]):
    plain, looked_into = runs
    assert not any("profiled" in line for line in lines(plain, "train"))
    assert not (plain / "profile").exists()
    train = lines(looked_into, "train")
    assert [line["step"] for line in train if line.get("profiled")] == [2, 3, 4, 5]  # step 2 warms the profiler up
    found = facts.summarise(facts.read_run(looked_into))
    counted = sorted(line["dt_ms"] for line in train[1:] if not line.get("profiled"))
    assert found["median_dt_ms"] == pytest.approx((counted[3] + counted[2]) / 2 if len(counted) == 6 else counted[len(counted) // 2])


def test_profiling_changes_no_loss(runs: tuple[Path, Path]):
    assert losses(runs[0]) == losses(runs[1])


def test_metrics_and_report_say_where_the_profile_is(runs: tuple[Path, Path]):
    (event,) = events(runs[1], "profiled")
    assert event["step"] == 6
    assert event["message"].startswith("steps 3 to 5, ")
    assert event["message"].endswith("profile/step_00000003/rank_0/kernels.md")
    assert re.search(r"ms each: \S+ \d+ %, ", event["message"])
    assert "profile/step_00000003/rank_0/kernels.md" in (runs[1] / "report.md").read_text()
    assert facts.summarise(facts.read_run(runs[1]))["status"] == "finished"


def test_a_resumed_run_is_profiled_again_only_where_a_step_is_named(tmp_path: Path, tiny):
    run_dir = tmp_path / "run"
    short = ("train.eval_every=0", ON)
    assert picotrain("train", *tiny(run_dir, *short, "train.max_steps=3")).returncode == 0
    assert profiled(run_dir) == ["step_00000000/rank_0"]  # shorter than a warm-up and a window: what there is
    again = picotrain("resume", str(run_dir), "train.max_steps=8")
    assert again.returncode == 0, again.stderr
    assert "profile/step_00000000 is there already; profiler.first_step=..." in again.stdout
    assert profiled(run_dir) == ["step_00000000/rank_0"]
    named = picotrain("resume", str(run_dir), "train.max_steps=14", "profiler.first_step=9", "profiler.steps=2")
    assert named.returncode == 0, named.stderr
    assert profiled(run_dir) == ["step_00000000/rank_0", "step_00000009/rank_0"]
    assert steps_in(run_dir / "profile/step_00000009/rank_0") == [9, 10]
    over = picotrain("resume", str(run_dir), "train.max_steps=16")
    assert "profiler: step 9 is over, this start begins at 14" in over.stdout
    assert len(losses(run_dir)) == 16


def test_an_evaluation_ends_the_window(tmp_path: Path, tiny):
    run_dir = tmp_path / "run"
    assert picotrain("train", *tiny(run_dir, ON, "profiler.first_step=4", "profiler.steps=5", "train.eval_every=6")).returncode == 0
    assert steps_in(run_dir / "profile/step_00000004/rank_0") == [4, 5]
    assert [line["step"] for line in lines(run_dir, "train") if line.get("profiled")] == [3, 4, 5]


def test_a_stop_in_the_window_saves_and_writes_what_is_there(tmp_path: Path, tiny):
    run_dir = tmp_path / "run"
    words = ("train.max_steps=400", "train.eval_every=0", "profiler.first_step=2", "profiler.steps=1000")
    process = start("train", *tiny(run_dir, ON, *words))
    deadline = time.monotonic() + 60
    while not (run_dir / "metrics.jsonl").exists() or len(lines(run_dir, "train")) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    stopped_at = len(losses(run_dir))
    assert steps_in(run_dir / "profile/step_00000002/rank_0") == list(range(2, stopped_at))
    assert (run_dir / f"checkpoints/step_{stopped_at:08d}/manifest.json").exists()
    assert facts.summarise(facts.read_run(run_dir))["status"] == "stopped"


def test_a_profile_that_cannot_be_written_costs_the_run_nothing(tmp_path: Path, tiny):
    run_dir = tmp_path / "run"
    assert picotrain("train", *tiny(run_dir, "train.max_steps=2", "train.eval_every=0")).returncode == 0
    (run_dir / "profile").write_text("in the way")
    done = picotrain("resume", str(run_dir), ON, "train.max_steps=10")
    assert done.returncode == 0, done.stderr
    (event,) = events(run_dir, "profile_failed")
    assert "training goes on without the profiler" in event["message"]
    assert len(losses(run_dir)) == 10
    assert [line["step"] for line in lines(run_dir, "train") if line.get("profiled")] == [4, 5, 6, 7]  # and off after that


def test_every_rank_writes_its_own(tmp_path: Path, tiny):
    run_dir = tmp_path / "run"
    words = ("hardware.nproc_per_node=2", "train.device_batch_size=4", "train.max_steps=7", "train.eval_every=0")
    done = picotrain("train", *tiny(run_dir, ON, *words))
    assert done.returncode == 0, done.stderr
    assert profiled(run_dir) == ["step_00000003/rank_0", "step_00000003/rank_1"]
    for rank in range(2):
        folder = run_dir / f"profile/step_00000003/rank_{rank}"
        assert steps_in(folder) == [3, 4, 5]
        assert f", rank {rank} of 2: steps 3 to 5\n" in (folder / "kernels.md").read_text()
        assert "c10d::allreduce_" in {event["name"] for event in trace_of(folder)}
    assert len(events(run_dir, "profiled")) == 1


@pytest.mark.slow
def test_compiled_code_has_names_that_say_where_it_is_called(tmp_path: Path, tiny):
    run_dir = tmp_path / "run"
    done = picotrain("train", *tiny(run_dir, ON, "hardware.compile=true"))
    assert done.returncode == 0, done.stderr
    text = (run_dir / "profile/step_00000003/rank_0/kernels.md").read_text()
    for where in ("CompiledFunction", "CompiledFunctionBackward", "HeadLoss"):
        assert re.search(rf"compiled code \w{{6}} in {where}`", text), where
    assert "CompiledFxGraph" not in text


def test_a_first_step_that_does_not_come_is_refused_before_the_run(tmp_path: Path, tiny):
    done = picotrain("train", *tiny(tmp_path / "run", ON, "profiler.first_step=12"))
    assert done.returncode == 2
    assert "profiler.first_step: step 12 does not come: the run has 12 steps (at most 11)" in done.stderr


def test_profiler_keys_are_free_to_change_and_a_profile_goes_into_the_archive():
    assert classify_change("profiler.enabled") == classify_change("profiler.steps") == "free"
    assert is_mirrored("profile/step_00000003/rank_0/kernels.md")
    assert not is_mirrored("profile/step_00000003/.rank_0.tmp/kernels.md")


# -- the profiler by itself


class FakeMonitor(SimpleNamespace):
    """What a profiler wants of a monitor."""

    def __init__(self, run_dir: Path, num_steps: int = 100, rank: int = 0, **section: Any):
        plan = {"name": "tiny", "num_steps": num_steps, "world_size": 1, "hardware_name": "a CPU", "device": "cpu", "precision": "fp32"}
        config = SimpleNamespace(profiler=SimpleNamespace(**({"enabled": True, "first_step": None, "steps": 3} | section)))
        super().__init__(run_dir=run_dir, plan=plan | {"compile": False}, config=config, rank=rank, events=[], warnings=[])

    def flush(self) -> None: ...

    def event(self, step: int, name: str, message: str) -> None:
        self.events.append((step, name, message))

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def drive(found: profiler.Profiler, steps: Sequence[int], work: Callable[[], Any]) -> None:
    """What the loop does around its steps."""
    for step in steps:
        found.begin(step)
        work()
        found.end(step)


@pytest.mark.parametrize(
    ("start_step", "num_steps", "section", "window"),
    [
        (0, 100, {}, range(3, 6)),
        (40, 100, {}, range(43, 46)),  # a resume compiles and warms up anew
        (97, 100, {}, range(97, 100)),
        (99, 100, {}, range(99, 100)),
        (100, 100, {}, range(100, 100)),
        (0, 100, {"first_step": 0, "steps": 1}, range(0, 1)),  # the one that compiles
        (10, 100, {"first_step": 10}, range(10, 13)),
        (11, 100, {"first_step": 10}, range(0)),
        (0, 100, {"first_step": 98}, range(98, 100)),
        (0, 100, {"enabled": False}, range(0)),
    ],
)
def test_the_window_follows_from_the_start_and_the_keys(
    tmp_path: Path, start_step: int, num_steps: int, section: dict[str, Any], window: range
):
    monitor = FakeMonitor(tmp_path, num_steps, **section)
    assert profiler.build(monitor, torch.device("cpu"), start_step)._window == window  # type: ignore[arg-type]
    assert bool(monitor.warnings) == (start_step == 11)


def test_outside_its_window_the_profiler_is_off_and_never_touches_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    start = torch.profiler.profile.start
    monkeypatch.setattr(torch.profiler.profile, "start", lambda self: seen.append(self) or start(self))
    found = profiler.build(FakeMonitor(tmp_path, first_step=5, steps=2), torch.device("cpu"), 0)  # type: ignore[arg-type]
    on = []
    drive(found, range(12), lambda: on.append(found.on))
    assert [step for step, was in enumerate(on) if was] == [4, 5, 6]
    assert len(seen) == 1
    assert not found.on


def test_a_profiler_that_torch_refuses_is_off_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.profiler.profile, "start_trace", lambda self: 1 / 0)
    monitor = FakeMonitor(tmp_path, rank=3)
    found = profiler.build(monitor, torch.device("cpu"), 0)  # type: ignore[arg-type]
    drive(found, range(8), lambda: torch.ones(2) + 1)
    ((step, name, message),) = monitor.events
    assert (step, name) == (3, "profile_failed")
    assert message.startswith("ZeroDivisionError: ")
    assert "picotrain: rank 3: the profiler failed: ZeroDivisionError" in capfd.readouterr().err  # its monitor is silent
    assert not found.on
    monkeypatch.undo()
    after = profiler.build(FakeMonitor(tmp_path), torch.device("cpu"), 0)  # type: ignore[arg-type]
    drive(after, range(8), lambda: torch.ones(2) + 1)  # torch's profiler was left usable
    assert (tmp_path / "profile/step_00000003/rank_0/kernels.md").exists()


def test_what_breaks_off_a_run_leaves_no_profile_and_torchs_profiler_usable(tmp_path: Path):
    for until in (2, 4):  # while it warms up, and while it records
        found = profiler.build(FakeMonitor(tmp_path), torch.device("cpu"), 0)  # type: ignore[arg-type]
        drive(found, range(until), lambda: torch.ones(2) + 1)
        found.begin(until)
        assert found.on
        found.close()
        found.close()
        assert not found.on
    assert not (tmp_path / "profile").exists()


def test_a_trace_that_torch_could_not_write_whole_fails(tmp_path: Path):
    cut = SimpleNamespace(export_chrome_trace=lambda path: Path(path).write_text('{"traceEvents": [{"na'))
    with pytest.raises(OSError, match="trace.json could not be written whole"):
        profiler._write_trace(cut, tmp_path / "trace.json")


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_cuda_the_allocators_snapshot_is_json_and_its_history_is_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    history = []
    snapshot = {"segments": [{"address": 2**46, "segment_pool_id": (0, 0), "blocks": []}], "device_traces": [[{"action": "alloc"}]]}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled, **options: history.append((enabled, options)))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda device: snapshot)
    monitor = FakeMonitor(tmp_path)
    drive(profiler.build(monitor, torch.device("cuda"), 0), range(8), lambda: torch.ones(2) + 1)  # type: ignore[arg-type]
    assert [name for _, name, _ in monitor.events] == ["profiled"], monitor.events
    folder = tmp_path / "profile/step_00000003/rank_0"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*ALL_FILES, "memory.json.gz"])
    written = json.loads(gzip.decompress((folder / "memory.json.gz").read_bytes()))
    assert written["segments"][0] == {"address": 2**46, "segment_pool_id": [0, 0], "blocks": []}
    assert [enabled for enabled, _ in history] == ["all", None]
    assert history[0][1]["max_entries"] == profiler.MAX_MEMORY_EVENTS
    assert "None was recorded." in (folder / "kernels.md").read_text()  # no kernel: there is no GPU here


# -- tables


WINDOW = Window("tiny", first=10, steps=2, wall_ms=200.0, notes=["a GPU"])


def test_kernels_come_first_by_their_time_with_the_share_of_the_wall_time():
    host = [Timed("aten::mm", "[8,8] [8,8]", 10, 30.0), Timed("aten::mm", "[4,4] [4,4]", 6, 10.0), Timed(NO_OPERATOR, "", 0, 160.0)]
    device = [Timed("elementwise<float, |x|>", "", 4, 20.0), Timed("gemm", "", 16, 150.0)]
    text = kernels_markdown(WINDOW, host, device)
    assert "2 steps, 100.0 ms each, the profiler's own cost included; a GPU." in text
    assert "Together 85.0 % of the wall time" in text
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines() if line.startswith("|")]
    assert rows[2:4] == [["`gemm`", "75.0 %", "75.00", "8", "9,375.0"], ["`elementwise<float, /x/>`", "10.0 %", "10.00", "2", "5,000.0"]]
    assert rows[6:8] == [[NO_OPERATOR, "80.0 %", "80.00"], ["`aten::mm`", "20.0 %", "20.00", "8", "2,500.0"]]
    assert rows[10:] == [
        ["`aten::mm`", "`[8,8] [8,8]`", "15.0 %", "15.00", "5", "3,000.0"],
        ["`aten::mm`", "`[4,4] [4,4]`", "5.0 %", "5.00", "3", "1,666.7"],
    ]


def test_a_long_table_ends_in_one_line_for_the_rest():
    host = [Timed(f"op{i}", "", 2, 200.0 / 40) for i in range(40)]
    text = kernels_markdown(WINDOW, host, None).partition("## The same")[0]
    assert "## Kernels" not in text
    assert re.search(r"\| 15 others +\| +37\.5 % \| +37\.50 \| +15 \| +2,500\.0 \|", text)


def test_memory_is_told_by_who_holds_it_at_the_peak():
    def take(time_ns: int, address: int, n_bytes: int, total: int, by: str) -> Allocation:
        return Allocation(time_ns, address, n_bytes, total, by)

    allocations = [
        take(5, 3, 4_000, 17_000, "peak"),
        take(1, 1, 2_000, 12_000, "kept"),
        take(2, 2, 3_000, 15_000, "freed"),
        take(3, 2, -3_000, 12_000, NO_OPERATOR),
        take(4, 2, 1_000, 13_000, "kept"),  # at an address that was free again
        take(6, 3, -4_000, 13_000, "other"),
        take(7, 4, 2_000, 15_000, "late"),
    ]
    text = memory_markdown(WINDOW, allocations, "cuda:0")
    assert "At the peak 17.0 kB were allocated on cuda:0: 10.0 kB before these steps, 7.00 kB in them." in text
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines() if line.startswith("|")][2:]
    assert rows == [
        ["`peak`", "4.00 kB", "1", "2.00 kB"],
        ["`kept`", "3.00 kB", "2", "1.50 kB"],
        ["`freed`", "0 B", "0", "1.50 kB"],
        ["`late`", "0 B", "0", "1.00 kB"],
        ["2 others", "0 B", "0", "0 B"],
    ]


def test_without_an_allocation_the_memory_table_says_so():
    assert "Nothing was allocated on cpu." in memory_markdown(WINDOW, [], "cpu")


def test_a_failed_profile_does_not_hide_how_a_run_ended(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("run: {}\n")
    named = ("started", "bad_data", "profile_failed")
    text = "".join(json.dumps({"step": 3, "kind": "event", "name": name}) + os.linesep for name in named)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert facts.summarise(facts.read_run(tmp_path))["status"] == "bad_data"
