"""The step time that a plan tells: from figures that are about it, near what is measured, and never in the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import picotrain

from picotrain import hardware
from picotrain import planning as plan
from picotrain.bench.processes import BenchmarkFailed
from picotrain.cli import commands, estimate
from picotrain.config import Config, compose
from picotrain.launch import launch
from picotrain.planning import Plan, ceilings, pace
from picotrain.planning.pace import Figure

REPO = Path(__file__).resolve().parent.parent
RECORDED = pace.read_figures(REPO / "benchmarks" / "results" / "2026-11-25-step-figures.jsonl")[0]
CPU = hardware.Machine("cpu", "A CPU", 1, 2**34, 0.0, True, 2)
TINY = ["model.depth=1", "model.head_dim=64", "train.seq_len=16", "tokenizer.vocab_size=300", "train.device_batch_size=2"]


@pytest.fixture(autouse=True)
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own CPU with two threads."""
    monkeypatch.setattr(hardware, "cpu", lambda: CPU)
    monkeypatch.setattr(hardware, "cpu_identity", lambda: "A CPU (1 2 3)")
    monkeypatch.setattr(hardware, "cores", lambda: 2)


def decided(cache: Path, *overrides: str) -> Config:
    fixed = ["hardware=cpu", "data=pystdlib", "train.max_steps=100", "train.precision=bf16", "hardware.compile=true", "cadence=none"]
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


def test_a_plan_tells_what_was_measured_of_its_very_step(tmp_path: Path):
    pace.remember(line(tmp_path), tmp_path)
    p = planned(tmp_path)
    assert (p.predicted_step_ms, p.predicted_by) == (pytest.approx(1000), "measured")
    assert p.predicted_hours == pytest.approx(100 / 3600) and p.predicted_cost is None
    assert planned(tmp_path, "hardware.price_per_hour=36").predicted_cost == pytest.approx(1)


def test_the_optimizer_comes_once_a_step_however_many_micro_batches_there_are(tmp_path: Path):
    batch = planned(tmp_path).total_batch_size
    pace.remember(line(tmp_path), tmp_path)
    assert planned(tmp_path, f"train.total_batch_size={2 * batch}").predicted_step_ms == pytest.approx(1900)


def test_figures_of_other_settings_are_not_mixed_in(tmp_path: Path):
    pace.remember(line(tmp_path), tmp_path)
    for other in (
        "hardware.threads=1", "train.precision=fp32", "hardware.compile=false", "optimizer=muon", "model.smear=true", "hardware.name=B CPU",
    ):  # fmt: skip
        assert planned(tmp_path, other).predicted_step_ms is None, other
    assert planned(tmp_path).predicted_step_ms


def test_a_figure_tells_nothing_of_another_step(tmp_path: Path):
    pace.remember(line(tmp_path), tmp_path)  # d4, T=512
    for other in ("model=d6", "train.seq_len=256", "train.device_batch_size=1", "tokenizer.vocab_size=1024"):
        assert planned(tmp_path, other).predicted_step_ms is None, other


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


def test_the_newest_figure_wins(tmp_path: Path):
    for step_ms in (5000.0, 2000.0):  # optimizer included
        pace.remember(line(tmp_path, step_ms=step_ms), tmp_path)
    assert planned(tmp_path).predicted_step_ms == pytest.approx(2000)


def test_a_time_changes_nothing_else_of_a_plan(tmp_path: Path):
    before = planned(tmp_path)
    pace.remember(line(tmp_path), tmp_path)
    after = planned(tmp_path)
    assert {key for key, value in after if getattr(before, key) != value} == {
        "predicted_step_ms", "predicted_by", "predicted_from", "predicted_hours", "predicted_eval_s",
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


@pytest.mark.slow
def test_the_benchmark_adds_its_figure_and_the_next_plan_tells_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PICOTRAIN_CACHE", str(tmp_path))
    wanted = [*TINY, "hardware=cpu", "data=pystdlib", "train.total_batch_size=32", "train.max_steps=7", "train.precision=fp32"]
    told = picotrain("plan", *wanted, "hardware.compile=false")
    assert told.returncode == 0, told.stderr
    command = told.stdout.split("`")[1].split()
    assert command[:3] == ["picotrain", "bench", "step"]
    assert json.loads(picotrain("plan", *wanted, "--json").stdout)["predicted_by"] == "assumed"
    done = picotrain(*command[1:], "--steps", "2", "--warmup", "1")
    assert done.returncode == 0, done.stderr
    (figure,) = map(json.loads, (tmp_path / "figures.jsonl").read_text().splitlines())
    told = picotrain("plan", *wanted, "hardware.compile=false")
    assert "a step" in told.stdout and "from 1 figure measured on this machine" in told.stdout
    p = json.loads(picotrain("plan", *wanted, "--json").stdout)
    assert p["predicted_step_ms"] == pytest.approx(figure["step_ms"], abs=0.2) and p["predicted_by"] == "measured"


# Without a figure ------------------------------------------------------------------------------------------


def keep_ceiling(cache: Path, *overrides: str, gflops: float = 1000.0, busy: str = "") -> None:
    found = ceilings.Ceiling(setting=ceilings.setting(decided(cache, *overrides)), gflops=gflops, busy=busy)
    pace.remember(found.model_dump_json(), cache, ceilings.FILE)


@pytest.mark.parametrize("figure", RECORDED, ids=lambda figure: f"width {figure.width:.0f}, vocabulary {figure.vocab:.0f}")
def test_a_ceiling_alone_tells_a_recorded_step_within_30_percent(figure: Figure, tmp_path: Path):
    words = [f"model.depth={figure.width // 64:.0f}", f"tokenizer.vocab_size={figure.vocab:.0f}", f"train.seq_len={figure.seq_len:.0f}"]
    words += [f"train.device_batch_size={figure.batch:.0f}", f"train.total_batch_size={figure.batch * figure.seq_len:.0f}"]
    keep_ceiling(tmp_path, gflops=figure.matmul_gflops)
    told = planned(tmp_path, *words)
    assert told.flops_per_token == figure.flops_per_token and told.predicted_by == "assumed"
    assert told.predicted_step_ms == pytest.approx(figure.step_ms, rel=0.3)


def test_an_assumed_time_falls_with_width_threads_and_compiling_and_says_what_it_assumes(tmp_path: Path):
    for threads in (2, 4):
        for precision in ("bf16", "fp32"):
            keep_ceiling(tmp_path, f"hardware.threads={threads}", f"train.precision={precision}")
    d4 = planned(tmp_path)
    share = float(d4.predicted_from.partition("%")[0])
    assert "1.00 TFLOP/s" in d4.predicted_from and 40 < share < 70
    assert d4.predicted_step_ms
    for slower in ("hardware.compile=false", "train.precision=fp32"):
        assert (planned(tmp_path, slower).predicted_step_ms or 0) > 1.2 * d4.predicted_step_ms, slower
    assert (planned(tmp_path, "hardware.threads=4").predicted_step_ms or 0) < 0.9 * d4.predicted_step_ms
    assert float(planned(tmp_path, "model=d8").predicted_from.partition("%")[0]) > share + 10
    pace.remember(line(tmp_path), tmp_path)
    assert planned(tmp_path).predicted_by == "measured"


def test_a_ceiling_counts_for_what_it_was_measured_with_and_the_newest_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "nothing was measured" in planned(tmp_path).predicted_from
    keep_ceiling(tmp_path, gflops=100.0, busy="load 9.0 on 2 cores")
    assert "load 9.0 on 2 cores" in planned(tmp_path).predicted_from
    keep_ceiling(tmp_path)
    for rubbish in ('{"setting": 1}', "rubbish"):
        pace.remember(rubbish, tmp_path, ceilings.FILE)
    assert "1.00 TFLOP/s" in planned(tmp_path).predicted_from
    for other in ("hardware.threads=1", "train.precision=fp32", "hardware.name=B CPU"):
        assert planned(tmp_path, other).predicted_step_ms is None, other
    assert "B CPU (cpu) is not here" in planned(tmp_path, "hardware.name=B CPU").predicted_from
    assert "hardware.peak_flops" in planned(tmp_path, "hardware.device=cuda", "hardware.name=T4").predicted_from
    monkeypatch.setattr(hardware, "cpu_identity", lambda: "A CPU (1 2 4)")
    assert planned(tmp_path).predicted_step_ms is None


def test_validations_count_each_as_a_third_of_training_on_its_tokens(tmp_path: Path):
    keep_ceiling(tmp_path)
    off = planned(tmp_path)
    cadence = ["train.max_steps=100", "train.eval_every=40", "optimizer.scale=false", f"train.eval_tokens={off.total_batch_size}"]
    p = planned(tmp_path, *cadence)
    assert p.predicted_eval_s == pytest.approx((p.predicted_step_ms or 0) / 3000, rel=0.05)  # the optimizer is no part of it
    assert 3600 * (p.predicted_hours or 0) == pytest.approx(100 * (p.predicted_step_ms or 0) / 1000 + 4 * (p.predicted_eval_s or 0))
    for steps, done, count in ((100, 0, 4), (100, 1, 3), (100, 40, 3), (100, 41, 2), (80, 0, 3), (30, 0, 2), (100, 100, 1)):
        config = decided(tmp_path, f"train.max_steps={steps}", "train.eval_every=40")
        assert pace.validations(plan.make(config, "x"), config, done) == count, (steps, done)
    left = pace.seconds_left(p, decided(tmp_path, *cadence), 60)
    assert left == pytest.approx(40 * (p.predicted_step_ms or 0) / 1000 + 2 * (p.predicted_eval_s or 0))


def test_validation_that_takes_much_of_a_run_is_said_with_what_would_help(tmp_path: Path):
    keep_ceiling(tmp_path)
    words = ["data=climbmix", "cadence=default", "train.max_steps=528"]
    (note,) = (note for note in planned(tmp_path, *words).notes if "validations take" in note)
    advised = planned(tmp_path, *words, next(word.rstrip(";") for word in note.split() if word.startswith("train.eval_tokens=")))
    assert 3600 * (advised.predicted_hours or 0) < 1.06 * 528 * (advised.predicted_step_ms or 0) / 1000
    assert not any("validations take" in note for note in advised.notes)
    # The embedded library's validation shard is small, however many tokens are asked for.
    assert not any("validations take" in note for note in planned(tmp_path, "cadence=default", "train.max_steps=528").notes)


def test_epochs_of_a_corpus_that_is_not_there_have_no_hours(tmp_path: Path):
    keep_ceiling(tmp_path)
    p = planned(tmp_path, "data=climbmix", "train.max_steps=null", "train.num_train_epochs=1")
    assert p.predicted_step_ms and p.predicted_hours is None and p.predicted_cost is None


# Said before anything long --------------------------------------------------------------------------------


class Measured:
    """Stands in for the process that measures the ceiling."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gflops: float = 1000.0):
        self.asked: list[list[str]] = []
        self.gflops = gflops
        monkeypatch.setattr(estimate, "lines", self)
        monkeypatch.setattr(hardware, "others_compute", lambda: self.busy)
        self.busy = ""

    def __call__(self, name: str, options: list[str]) -> list[dict[str, Any]]:
        self.asked.append([name, *options])
        return [{"best_gflops": self.gflops}]


def test_the_ceiling_is_measured_once_as_the_plan_has_it_and_again_when_the_machine_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured = Measured(monkeypatch)
    measured.busy = "load 5.0 on 2 cores"
    for _ in range(2):
        estimate.calibrate(decided(tmp_path))
    assert len(measured.asked) == 1 and "load 5.0" in planned(tmp_path).predicted_from
    assert {"--precision", "bf16", "--threads", "2"} <= {*measured.asked[0]}
    measured.busy = ""
    for _ in range(2):
        estimate.calibrate(decided(tmp_path))
    assert len(measured.asked) == 2 and "load" not in planned(tmp_path).predicted_from
    for known in ("hardware=8xh100", "hardware.name=B CPU"):
        estimate.calibrate(decided(tmp_path, known))
    pace.remember(line(tmp_path, "train.precision=fp32"), tmp_path)
    estimate.calibrate(decided(tmp_path, "train.precision=fp32"))
    assert len(measured.asked) == 2


def test_a_machine_that_cannot_be_measured_or_remembered_costs_no_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    measured = Measured(monkeypatch)
    (tmp_path / "file").write_text("")
    estimate.calibrate(decided(tmp_path / "file"))
    assert "PICOTRAIN_CACHE" in capsys.readouterr().err and measured.asked

    def fails(name: str, options: list[str]) -> Any:
        raise BenchmarkFailed(name, 1, "there is no torch")

    monkeypatch.setattr(estimate, "lines", fails)
    estimate.calibrate(decided(tmp_path))
    assert "there is no torch" in capsys.readouterr().err


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What `picotrain train` says before the run directory is opened."""
    Measured(monkeypatch)
    monkeypatch.setattr(hardware, "detect", lambda: CPU)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        def opened(*anything: Any) -> None:
            return None

        monkeypatch.setattr("picotrain.run.open_run", opened)
        for name in ("read_run", "summarise", "what_next"):  # nothing was opened that could have ended
            monkeypatch.setattr(f"picotrain.report.{name}", lambda *anything: None)
        capsys.readouterr()
        launch(lambda: commands.new_run([f"run.cache_dir={tmp_path}", *words], None, None))
        return "\n".join(line for line in capsys.readouterr().err.splitlines() if "run takes" in line)

    return run


def test_a_long_run_on_a_cpu_says_its_time_and_what_would_take_minutes(said: Any, tmp_path: Path):
    text = said("data=pystdlib", "model=d6", "train.max_steps=20000", "run.name=mine", "hardware.compile=true")
    assert "this run takes about" in text and "days" in text and "`picotrain train experiment=cpu_speedrun`" in text
    shorter = text.split("`")[3].split()[2:]
    assert "run.name=mine-short" in shorter and "model=d6" in shorter and "train.max_steps=20000" not in shorter
    again = said(*shorter)
    minutes = int(again.partition("takes about ")[2].split()[0])
    assert again.count("`") == 0 and 3 <= minutes <= 7
    epochs = said("data=pystdlib", "model=d6", "train.target_tokens=2e9", "hardware.compile=true").split("`")[3].split()[2:]
    assert "about 5 min" in said(*epochs) and not any("target_tokens" in word for word in epochs)


def test_a_short_run_and_a_finished_one_are_not_worth_a_word(said: Any, tmp_path: Path):
    assert "takes" not in said("model=d2", "data=pystdlib", "train.max_steps=3", "train.total_batch_size=4096", "tokenizer.vocab_size=300")


def test_a_run_that_goes_on_says_what_is_left(said: Any, tmp_path: Path):
    words = ["data=pystdlib", "model=d6", "train.max_steps=2000", "run.dir=r"]
    whole = said(*words)
    run = tmp_path / "r"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    (run / "checkpoints" / "latest").write_text("step_00001900\n")
    planned(tmp_path, "model=d6", "train.max_steps=2000").save(run / "plan.json")
    rest = said(*words)
    assert "this run takes" in whole and "from step 1,900 on" in rest and "experiment=" not in rest
    hours = [int(text.partition("about ")[2].split()[0]) for text in (whole, rest)]
    assert hours[0] > 15 * hours[1] > 0 and " h" in whole and " h" in rest


def test_epochs_of_a_named_corpus_are_told_before_it_is_there(said: Any, tmp_path: Path):
    assert "takes about" in said("data=climbmix", "train.num_train_epochs=1")
