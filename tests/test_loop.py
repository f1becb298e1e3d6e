"""The loop as a user meets it: what is written when, and that a run that was stopped goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import lines, losses, picotrain, start

from picotrain import api, checkpoint, hardware, loop, ranks, worker
from picotrain import run as runs
from picotrain.checkpoint.folder import describe
from picotrain.cli import commands
from picotrain.errors import ConfigError, RunError
from picotrain.model import LanguageModel
from picotrain.models.gpt import module
from picotrain.monitor import events
from picotrain.run import open_run, read_material, read_plan
from picotrain.signals import StopSignal


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_tensors(checkpoint.find(run_dir / "checkpoints", "last"), "model")


def wait_for(path: Path, seconds: float = 60) -> None:
    wait_until(path.exists, seconds, f"{path} did not appear")


def wait_until(happened: Callable[[], object], seconds: float = 60, otherwise: str = "it did not happen") -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)


def assert_same_run(a: Path, b: Path) -> None:
    """To the bit: losses, validation and weights."""
    assert losses(a) == losses(b)
    assert [(r["step"], r["val_bpb"]) for r in lines(a, "val")] == [(r["step"], r["val_bpb"]) for r in lines(b, "val")]
    ours, theirs = weights(a), weights(b)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny) -> Path:
    """One undisturbed run of 12 steps, with samples and a permanent checkpoint at step 8."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    done = picotrain("train", *tiny(run_dir, "train.sample_every=6", "train.save_every=8"))
    assert done.returncode == 0, done.stderr
    return run_dir


def test_every_step_is_logged_once_and_the_loss_falls(finished: Path):
    values = losses(finished)
    assert len(values) == 12
    assert sum(values[-3:]) < 0.9 * sum(values[:3])


def test_a_train_line_has_what_the_design_promises(finished: Path):
    line = lines(finished, "train")[5]
    promised = "step kind loss smooth_loss lr grad_norm tokens tok_per_sec mfu dt_ms data_wait_ms epoch rank world_size pq rg"
    assert set(promised.split()) <= line.keys()
    assert line["mfu"] is None  # no peak is known for a CPU
    assert line["tokens"] == 256  # of this step


def test_a_device_that_computes_behind_the_hosts_back_gives_the_same_lines(finished: Path, tmp_path: Path, tiny, monkeypatch):
    """Every value by one late copy, times by events, with flushes for evaluations, samples and saves in between."""

    class Event:
        def record(self) -> None:
            self.at_s = time.perf_counter()

        def synchronize(self) -> None:
            assert self.at_s

        def elapsed_time(self, end: Any) -> float:
            return (end.at_s - self.at_s) * 1000

    monkeypatch.setattr(events, "build", lambda device: events.EventTimer(Event, pin_memory=False))
    config = commands.resolved(tiny(tmp_path / "run", "train.sample_every=6", "train.save_every=8"), None, None)
    assert open_run(config, [], lambda message: None)
    assert worker.run(tmp_path / "run") == 0
    assert losses(tmp_path / "run") == losses(finished)
    ours, theirs = ([(r["step"], r["grad_norm"], r["skipped"]) for r in lines(run, "train")] for run in (tmp_path / "run", finished))
    assert ours == theirs
    assert all(0 < line["dt_ms"] < 60_000 for line in lines(tmp_path / "run", "train"))


def test_a_rank_of_an_evaluation_puts_the_weights_on_its_own_gpu_and_on_no_other(finished: Path, monkeypatch):
    """Two GPUs, of which there are none: where the model is sent and what is made the current device is only written down."""
    sent: list[str] = []
    gpu = dataclasses.replace(hardware.cpu(), device="cuda", name="a GPU", count=2)
    monkeypatch.setattr(hardware, "detect", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: sent.append(f"cuda:{torch.device('cuda', device).index}"))
    monkeypatch.setattr(module.GPT, "to", lambda self, device, *rest: sent.append(str(device)) or self)
    monkeypatch.setattr(ranks, "here", lambda: ranks.Ranks(rank=1, world_size=2, local_rank=1, local_world_size=2, launched=True))
    made_on_a_gpu = SimpleNamespace(
        **{**read_material(finished)._asdict(), "plan": read_plan(finished).model_copy(update={"device": "cuda"})}
    )
    monkeypatch.setattr(runs, "read_material", lambda run: made_on_a_gpu)
    api.load_model(finished, "last")
    assert set(sent) == {"cuda:1"}


def test_validation_comes_at_the_first_step_by_cadence_and_at_the_last(finished: Path):
    assert [record["step"] for record in lines(finished, "val")] == [0, 6, 12]
    bpb = [record["val_bpb"] for record in lines(finished, "val")]
    assert bpb[-1] < bpb[0]


def test_samples_come_by_cadence_and_at_the_last_step_but_not_at_the_first(finished: Path):
    assert [record["step"] for record in lines(finished, "sample")] == [6, 12]


def test_checkpoints_come_by_cadence_and_at_the_end_with_what_was_measured_there(finished: Path):
    root = finished / "checkpoints"
    assert [path.name for path in checkpoint.complete(root)] == ["step_00000008", "step_00000012"]
    assert (root / "latest").read_text().strip() == "step_00000012"
    assert checkpoint.read_metrics(root / "step_00000012")["val_bpb"] == lines(finished, "val")[-1]["val_bpb"]
    assert (root / "best").read_text().strip() == "step_00000012"
    assert checkpoint.read_state(root / "step_00000008")["dataloader_state_dict"]["row"] == 8 * 8


def test_a_run_directory_tells_how_it_came_about(finished: Path):
    for name in (
        "config.yaml",
        "plan.json",
        "data.json",
        "tokenizer.json",
        "environment.json",
        "overrides.txt",
        "report.md",
        "summary.json",
    ):
        assert (finished / name).stat().st_size > 0, name
    assert (finished / "attempts/0001/config.yaml").read_text() == (finished / "config.yaml").read_text()


def test_training_a_finished_run_again_says_so_and_changes_nothing(finished: Path, tiny):
    before = (finished / "metrics.jsonl").read_bytes()
    again = picotrain("resume", str(finished))
    assert again.returncode == 0
    assert "finished" in again.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_saved_config_reproduces_the_losses(finished: Path, tmp_path: Path):
    done = picotrain("train", "--config", str(finished / "config.yaml"), f"run.dir={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    assert_same_run(finished, tmp_path / "again")


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished: Path, tmp_path: Path, tiny):
    other = picotrain("train", *tiny(tmp_path / "other", "run.seed=2"))
    assert other.returncode == 0, other.stderr
    assert losses(tmp_path / "other") != losses(finished)


def test_forty_steps_straight_equal_twenty_a_kill_and_twenty_more(tmp_path: Path, tiny):
    # Batches large enough that the kill comes before the end, on any machine.
    more = ("train.max_steps=40", "train.save_every=20", "train.eval_every=10", "train.total_batch_size=4096")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert picotrain("train", *tiny(straight, *more)).returncode == 0
    process = start("train", *tiny(broken, *more))
    wait_for(broken / "checkpoints/step_00000020")
    process.kill()
    process.communicate()
    assert not (broken / "summary.json").exists()
    resumed = picotrain("resume", str(broken))
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(straight, broken)
    assert any(record["name"] == "resumed" for record in lines(broken, "event"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_ends_as_resumable_and_the_rest_is_as_if_undisturbed(tmp_path: Path, tiny, signum: signal.Signals):
    more = ("train.max_steps=30", "train.eval_every=10", "train.total_batch_size=4096")
    run_dir = tmp_path / "run"
    process = start("train", *tiny(run_dir, *more))
    deadline = time.monotonic() + 60
    while not (run_dir / "metrics.jsonl").exists() or len(lines(run_dir, "train")) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    stopped_at = int(checkpoint.find(run_dir / "checkpoints", "last").name[5:])
    assert 5 <= stopped_at < 30
    if signum == signal.SIGTERM:
        assert picotrain("resume", str(run_dir)).returncode == 0
        names = [event["name"] for event in lines(run_dir, "event")]
        assert names == ["started", "stopped", "stopped", "resumed", "finished"]  # a clean stop cuts nothing
        assert not list(run_dir.glob("metrics.cut*"))
        assert picotrain("train", *tiny(tmp_path / "straight", *more)).returncode == 0
        assert_same_run(tmp_path / "straight", run_dir)


@pytest.mark.skipif(not hardware.has_compiler(), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiling_is_no_step_and_no_training_time_and_a_resume_is_exact(tmp_path: Path, tiny):
    compiled = ("hardware.compile=true", "model.value_embeds=true", "model.residual_scalars=true", "train.eval_every=0")
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    assert picotrain("train", *tiny(straight, *compiled, "train.max_steps=6")).returncode == 0
    assert picotrain("train", *tiny(parted, *compiled, "train.max_steps=6", "train.save_every=3")).returncode == 0
    (event,) = [line for line in lines(straight, "event") if line["name"] == "compiled"]
    seconds = float(event["message"].split()[1])
    train = lines(straight, "train")
    assert train[-1]["total_training_time_s"] < seconds and train[0]["dt_ms"] < 1000 * seconds / 2
    for name in ("step_00000006", "latest"):
        path = parted / "checkpoints" / name
        shutil.rmtree(path) if path.is_dir() else path.write_text("step_00000003\n")
    (parted / "summary.json").unlink()
    assert picotrain("resume", str(parted)).returncode == 0
    assert losses(parted) == losses(straight)


def test_garbage_is_looked_for_from_the_first_turn_of_the_loop_on_and_after_a_start_that_failed(tmp_path: Path, monkeypatch):
    seen: list[bool] = []

    def beat() -> None:
        seen.append(gc.isenabled())
        raise StopIteration

    run = SimpleNamespace(plan=None, config=SimpleNamespace(train=SimpleNamespace(save_every=1)), state=None)
    run.watchdog = SimpleNamespace(beat=beat)
    monkeypatch.setattr(loop, "build", lambda *_: run)
    monkeypatch.setattr(loop, "Saves", lambda *_: None)
    monkeypatch.setattr(loop, "evaluations", lambda *_: [])
    monkeypatch.setattr(loop, "warm_up", lambda *_: seen.append(gc.isenabled()))
    nothing: Any = None
    with StopSignal() as stop, worker._without_collector(), pytest.raises(StopIteration):
        loop.train(tmp_path, nothing, stop)
    assert seen == [False, True]
    with pytest.raises(ConfigError):
        worker.run(tmp_path)  # holds no run
    assert gc.isenabled()


def test_accumulation_and_micro_batches_change_only_the_rounding(tmp_path: Path, tiny):
    for rows in (8, 2):
        assert picotrain("train", *tiny(tmp_path / str(rows), f"train.device_batch_size={rows}", "train.max_steps=6")).returncode == 0
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "8"), rel=1e-4)


def test_a_diverged_run_says_so_and_never_saves_the_broken_weights(tmp_path: Path, tiny):
    run_dir = tmp_path / "run"
    done = picotrain(
        "train",
        *tiny(
            run_dir,
            "train.grad_clip=null",
            "optimizer.matrix_lr=1e20",
            "optimizer.embed_lr=1e20",
            "train.save_every=1",
            "train.max_steps=40",
        ),
    )
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    skipped = [line["skipped"] for line in lines(run_dir, "train")]
    assert skipped[-1] == 11 and skipped[-11:] == list(range(1, 12))  # train.max_skipped=10 in a row are borne
    assert [event["name"] for event in lines(run_dir, "event")][-1] == "diverged"
    for path in checkpoint.complete(run_dir / "checkpoints"):
        assert all(tensor.isfinite().all() for tensor in checkpoint.load_tensors(path, "model").values())


def test_a_rolling_checkpoint_where_the_run_ends_or_a_permanent_one_is_due_becomes_permanent(finished: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    (run_dir / "summary.json").unlink()
    roots = [run_dir / "checkpoints" / name for name in ("step_00000008", "step_00000012")]
    for path in roots:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "rolling": True}))
    shutil.rmtree(roots[1])
    assert picotrain("resume", str(run_dir)).returncode == 0  # from step 8, where one is due
    assert [checkpoint.is_rolling(path) for path in roots] == [False, False]


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_touches_none(finished: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    (run_dir / "summary.json").unlink()
    for path in checkpoint.complete(run_dir / "checkpoints"):
        (path / "state.json").write_text("{")
    before = {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()}
    done = picotrain("resume", str(run_dir))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for word in ("step_00000008 is damaged: state.json", "step_00000012 is damaged: state.json", "run.dir", "run.resume=never"):
        assert word in done.stderr
    assert {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()} == before
    assert len(losses(run_dir)) == 12


def test_a_state_of_another_step_or_of_other_rows_is_refused(finished: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    (run_dir / "summary.json").unlink()
    path = run_dir / "checkpoints" / "step_00000012"
    state = json.loads((path / "state.json").read_text())
    state["dataloader_state_dict"]["row"] += 8
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = describe(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    done = picotrain("resume", str(run_dir), "train.max_steps=14")
    assert done.returncode == 2 and "row 104, where 12 steps of 8 rows were trained" in done.stderr


class Bigrams(LanguageModel):
    """Which token follows which."""

    def __init__(self, vocab_size: int, seq_len: int):
        super().__init__()
        self.vocab_size, self.seq_len = vocab_size, seq_len
        self.embed = torch.nn.Embedding(vocab_size, vocab_size)
        torch.nn.init.zeros_(self.embed.weight)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor | None = None, reduction: Any = "mean") -> torch.Tensor:
        logits = self.embed(ids)
        if targets is None:
            return logits
        found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        return found if reduction == "mean" else found.view_as(targets)


def test_a_callers_own_model_is_trained_from_the_weights_that_it_has(tmp_path: Path, tiny):
    run = tmp_path / "run"
    material = open_run(commands.resolved(tiny(run, "train.max_steps=20"), None, None), [], print)
    assert material
    own = Bigrams(material.plan.vocab_size, material.plan.seq_len)
    assert worker.run(run, material, model=own) == 0
    assert losses(run)[0] == pytest.approx(math.log(own.vocab_size)) and losses(run)[-1] < losses(run)[0]
    assert torch.equal(weights(run)["embed.weight"], own.embed.weight)
    with pytest.raises(RunError, match="seq_len is 16"):
        worker.run(run, material, model=Bigrams(own.vocab_size, 16))
