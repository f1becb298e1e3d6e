"""The step time that a plan tells: from figures that are about it, near what is measured, and never in the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import picotrain

from picotrain import hardware, plan
from picotrain.config import Config, compose
from picotrain.plan import Plan, pace
from picotrain.plan.pace import Figure

REPO = Path(__file__).resolve().parent.parent
RECORDED = pace.read_figures(REPO / "benchmarks" / "results" / "2026-11-25-step-figures.jsonl")[0]
CPU = hardware.Machine("cpu", "A CPU", 1, 2**34, 0.0, True, 2)
TINY = ["model.depth=1", "model.head_dim=64", "train.seq_len=16", "tokenizer.vocab_size=300", "train.device_batch_size=2"]


@pytest.fixture(autouse=True)
def one_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tests' own CPU with two threads, and no figures shipped with the package."""
    monkeypatch.setattr(hardware, "cpu", lambda: CPU)
    monkeypatch.setattr(hardware, "cpu_identity", lambda: "A CPU (1 2 3)")
    monkeypatch.setattr(hardware, "cores", lambda: 2)
    monkeypatch.setattr(pace, "SHIPPED", tmp_path / "shipped" / "figures.jsonl")


def decided(cache: Path, *overrides: str) -> Config:
    fixed = ["hardware=cpu", "data=pystdlib", "train.max_steps=100", "train.precision=bf16", "hardware.compile=true"]
    return plan.decide(compose([*fixed, f"run.cache_dir={cache}", *overrides]))


def planned(cache: Path, *overrides: str) -> Plan:
    return plan.make(decided(cache, *overrides), "x")


def line(cache: Path, *overrides: str, **values: Any) -> str:
    """A figure of that plan's step."""
    config = decided(cache, *overrides)
    p = plan.make(config, "x")
    shape = {"seq_len": p.seq_len, "batch": p.device_batch_size, "grad_accum": p.grad_accum_steps, "vocab": p.vocab_size}
    times = {"step_ms": 1000.0, "optimizer_ms": 100.0, "matmul_gflops": 1000.0}
    return json.dumps({"benchmark": "step"} | pace.setting(p, config) | shape | times | values)


@pytest.mark.parametrize("left_out", RECORDED, ids=lambda figure: f"width {figure.width:.0f}, vocabulary {figure.vocab:.0f}")
def test_a_figure_is_predicted_from_those_of_other_widths_within_15_percent(left_out: Figure):
    others = [figure for figure in RECORDED if figure.width != left_out.width]
    assert len(others) >= 4
    assert pace.predict_ms(left_out, others) == pytest.approx(left_out.step_ms, rel=0.15)
    assert pace.predict_ms(left_out, [*others, left_out]) == pytest.approx(left_out.step_ms, rel=0.001)


def test_the_shipped_figures_are_figures():
    found, bad = pace.read_figures(Path(pace.__file__).with_name("figures.jsonl"))
    assert found and not bad


def test_a_plan_tells_what_was_measured_of_its_very_step(tmp_path: Path):
    pace.remember(line(tmp_path), tmp_path)
    p = planned(tmp_path)
    assert (p.predicted_step_ms, p.predicted_by) == (pytest.approx(1000), "measured")
    assert p.predicted_hours == pytest.approx(100 / 3600) and p.predicted_cost is None
    assert p.predicted_from == f"1 figure measured on this machine, at width {p.width}"
    assert planned(tmp_path, "hardware.price_per_hour=36").predicted_cost == pytest.approx(1)


def test_the_optimizer_comes_once_a_step_however_many_micro_batches_there_are(tmp_path: Path):
    batch = planned(tmp_path).total_batch_size
    pace.remember(line(tmp_path), tmp_path)
    assert planned(tmp_path, f"train.total_batch_size={2 * batch}").predicted_step_ms == pytest.approx(1900)


def test_a_narrower_model_is_further_from_the_matmul_ceiling(tmp_path: Path):
    """At half the width a FLOP takes the ceiling's time and twice the rest of the measured one's."""
    figure = Figure.model_validate_json(line(tmp_path, matmul_gflops=10.0 * 1e3))
    ceiling = 1 / (figure.matmul_gflops * 1e9)
    assert figure.carried(figure.width / 2) - ceiling == pytest.approx(2 * (figure.seconds_per_flop - ceiling))


def test_figures_of_other_settings_are_not_mixed_in(tmp_path: Path):
    pace.remember(line(tmp_path), tmp_path)
    for other in (
        "hardware.threads=1", "train.precision=fp32", "hardware.compile=false", "optimizer=muon", "model.smear=true", "hardware.name=B CPU",
    ):  # fmt: skip
        assert planned(tmp_path, other).predicted_step_ms is None, other
    assert planned(tmp_path).predicted_step_ms


def test_a_plan_far_from_all_figures_is_not_told(tmp_path: Path):
    pace.remember(line(tmp_path), tmp_path)  # d4, T=512
    assert planned(tmp_path, "model=d8").predicted_from.endswith("at width 256, carried to 512")
    for far in ("model=d12", "train.seq_len=2048", "train.device_batch_size=1", "tokenizer.vocab_size=1024"):
        assert planned(tmp_path, far).predicted_step_ms is None, far


def test_unknown_hardware_gives_null_and_gpus_with_a_known_peak_an_assumption(tmp_path: Path):
    unknown = planned(tmp_path)
    assert unknown.predicted_step_ms is unknown.predicted_by is unknown.predicted_hours is None
    assert "step --device cpu --depth 4 --seq-len 512 --batch" in pace.hint(unknown, decided(tmp_path))
    known = planned(tmp_path, "hardware=8xh100")
    assert known.predicted_by == "assumed" and any("assume an MFU of 40%" in note for note in known.notes)
    flops = known.total_batch_size * known.flops_per_token
    assert known.predicted_step_ms == pytest.approx(1000 * flops / (8 * 989.4e12 * 0.4), abs=0.1)
    pace.remember(line(tmp_path, "hardware=1xh100", "train.device_batch_size=16"), tmp_path)
    eight = planned(tmp_path, "hardware=8xh100", "train.device_batch_size=16")
    assert eight.predicted_by == "measured" and any("is assumed" in note for note in eight.notes)


def test_lines_that_are_no_figures_are_passed_over_and_said(tmp_path: Path):
    good = line(tmp_path)
    bad = ["{", "[]", "7", '{"benchmark": "step"}', good.replace("1000.0", "-1.0"), good.replace("1000.0", "NaN"), "\x00", good[:50]]
    other = ['{"benchmark": "matmul"}', ""]
    (tmp_path / "figures.jsonl").write_text("\n".join([*bad[:-1], *other, bad[-1]]))  # cut off in the middle of a line
    pace.remember(good, tmp_path)
    p = planned(tmp_path)
    assert p.predicted_step_ms == pytest.approx(1000)
    assert any("8 lines of" in note and "passed over" in note for note in p.notes)
    (tmp_path / "figures.jsonl").write_bytes(b"\xff\xfe" * 100)
    assert planned(tmp_path).predicted_step_ms is None
    (tmp_path / "figures.jsonl").unlink()
    (tmp_path / "figures.jsonl").mkdir()
    assert planned(tmp_path).predicted_step_ms is None


def test_this_machines_newest_figure_wins_and_says_how_fast_it_is_beside_the_shipped_ones(tmp_path: Path):
    pace.SHIPPED.parent.mkdir()
    pace.SHIPPED.write_text(line(tmp_path) + "\n" + line(tmp_path, "model=d6") + "\n")
    shipped = {model: planned(tmp_path, f"model={model}").predicted_step_ms for model in ("d4", "d6")}
    assert shipped["d4"] == pytest.approx(1000) and "shipped" in planned(tmp_path).predicted_from
    for step_ms in (5000.0, 2000.0):  # optimizer included
        pace.remember(line(tmp_path, step_ms=step_ms, optimizer_ms=200.0, matmul_gflops=500.0), tmp_path)
    assert planned(tmp_path).predicted_step_ms == pytest.approx(2000)
    assert planned(tmp_path, "model=d6").predicted_step_ms == pytest.approx(2 * (shipped["d6"] or 0), rel=0.001)


def test_a_time_changes_nothing_else_of_a_plan(tmp_path: Path):
    before = planned(tmp_path)
    pace.remember(line(tmp_path), tmp_path)
    after = planned(tmp_path)
    assert {key for key, value in after if getattr(before, key) != value} == {
        "predicted_step_ms", "predicted_by", "predicted_from", "predicted_hours",
    }  # fmt: skip


def test_cpus_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    core = {"vendor_id": "AuthenticAMD", "cpu family": "26", "model": "2", "model name": "AMD EPYC", "siblings": "4", "cpu cores": "2"}
    seen = set()
    for change in ({}, {"cpu family": "25"}, {"flags": "avx2 avx512_bf16"}, {"siblings": "2"}):
        monkeypatch.undo()
        monkeypatch.setattr(hardware, "_cpu_facts", lambda change=change: core | change)
        seen.add(hardware.cpu_identity.__wrapped__())
    assert len(seen) == 4 and "AMD EPYC (AuthenticAMD 26 2, 2 threads a core)" in seen
    monkeypatch.setattr(hardware, "_cpu_facts", dict)
    monkeypatch.setattr(hardware, "_run", lambda command: "Apple M3 Pro\n")
    assert hardware.cpu_identity.__wrapped__() == "Apple M3 Pro"


def test_the_benchmark_adds_its_figure_and_the_next_plan_tells_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PICOTRAIN_CACHE", str(tmp_path))
    wanted = [*TINY, "hardware=cpu", "data=pystdlib", "train.total_batch_size=32", "train.max_steps=7", "train.precision=fp32"]
    told = picotrain("plan", *wanted, "hardware.compile=false")
    assert told.returncode == 0, told.stderr
    command = told.stdout.split("`")[1].split()
    assert command[:3] == ["picotrain", "bench", "step"]
    assert json.loads(picotrain("plan", *wanted, "--json").stdout)["predicted_step_ms"] is None
    done = picotrain(*command[1:], "--steps", "2", "--warmup", "1")
    assert done.returncode == 0, done.stderr
    (figure,) = map(json.loads, (tmp_path / "figures.jsonl").read_text().splitlines())
    told = picotrain("plan", *wanted, "hardware.compile=false")
    assert "a step" in told.stdout and "from 1 figure measured on this machine" in told.stdout
    p = json.loads(picotrain("plan", *wanted, "--json").stdout)
    assert p["predicted_step_ms"] == pytest.approx(figure["step_ms"], abs=0.2) and p["predicted_by"] == "measured"
