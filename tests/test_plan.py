"""What a config means, and what does not fit together, found before anything is built."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from picotrain import hardware
from picotrain import planning as plan
from picotrain import run as runs
from picotrain.config import Config, compose
from picotrain.data.corpus import Corpus, RowGroup, Shard
from picotrain.errors import ConfigError

MIB = 1 << 20


def decided(*overrides: str) -> Config:
    return plan.decide(compose(["hardware=cpu", "data=pystdlib", *overrides]))


def corpus(mebibytes: int = 32) -> Corpus:
    """Row groups of 1 MiB in two shards."""
    groups = tuple(RowGroup(100, MIB) for _ in range(mebibytes // 2))
    shards = tuple(Shard(f"shard_{i}.parquet", 1, groups, "f") for i in range(2))
    return Corpus("made-up", Path("."), shards, Shard("val.parquet", 1, groups[:1], "f"))


def problems(*overrides: str, with_corpus: bool = True) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan.make(decided(*overrides), "x", corpus() if with_corpus else None)
    return [str(problem) for problem in caught.value.problems]


def test_the_batch_is_the_product_of_its_parts():
    p = plan.make(decided("model=d4", "hardware.nproc_per_node=2"), "x", corpus())
    assert p.total_batch_size == p.device_batch_size * p.seq_len * p.dp_size * p.grad_accum_steps
    assert p.rows_per_step * p.seq_len == p.total_batch_size


@pytest.mark.parametrize(
    ("override", "steps"),
    [
        ("train.max_steps=7", 7),
        ("train.target_tokens=100000", math.ceil(100_000 / 8192)),
        ("train.target_param_data_ratio=0.5", math.ceil(0.5 * (3_145_728 + 32_768 * 256) / 8192)),
        ("train.target_flops=1e12", math.ceil(int(1e12 / 75_497_472) / 8192)),
    ],
)
def test_each_horizon_gives_its_steps(override: str, steps: int):
    p = plan.make(decided("model=d4", "train.total_batch_size=8192", override), "x", corpus())
    assert p.num_steps == steps
    assert p.horizon == override.split("=")[0]
    assert p.total_tokens == steps * 8192


def test_without_a_horizon_there_are_twelve_tokens_a_parameter():
    p = plan.make(decided("model=d4"), "x", corpus())
    assert p.total_tokens == pytest.approx(12 * (3_145_728 + 32_768 * 256), rel=0.01)


def test_epochs_count_the_tokens_of_the_corpus():
    p = plan.make(decided("train.total_batch_size=8192", "train.num_train_epochs=1.5"), "x", corpus(32), bytes_per_token=4.0)
    assert p.total_tokens == pytest.approx(1.5 * 32 * MIB / 4, abs=8192)
    assert p.epochs == pytest.approx(1.5, rel=0.01)


def test_more_than_four_epochs_is_a_warning():
    assert any("passes over the corpus" in note for note in plan.make(decided(), "x", corpus(32)).notes)
    few = plan.make(decided("train.max_steps=5"), "x", corpus(32)).notes
    assert not any("passes over the corpus" in note for note in few)


def test_a_batch_that_does_not_divide_names_the_nearest_that_do():
    (found,) = problems("train.total_batch_size=5000", "train.seq_len=512", "hardware.nproc_per_node=2")
    assert "train.total_batch_size" in found and "5,000" in found
    assert "4,096 or 5,120" in found


def test_a_batch_below_one_row_names_the_smallest():
    (found,) = problems("train.total_batch_size=100", "train.seq_len=512")
    assert "512" in found and "nearest that work: 512" in found


def test_a_dp_size_that_does_not_divide_the_lanes_names_the_valid_sizes():
    found = problems("hardware.nproc_per_node=3", "train.total_batch_size=6144", "train.seq_len=512")
    assert any("dp_size 3 does not divide the 32 lanes" in line and "1, 2, 4, 8, 16, 32" in line for line in found)


def test_more_lanes_than_units_is_an_error():
    assert any("data.lanes" in line and "at most 32" in line for line in problems("data.lanes=64"))


def test_all_problems_come_at_once():
    assert len(problems("data.lanes=64", "train.total_batch_size=5001", "hardware.nproc_per_node=3")) == 3


def test_auto_micro_batch_divides_the_rows_and_grows_with_memory():
    h100 = decided("model=d12", "hardware=8xh100")
    assert plan.make(h100, "x").device_batch_size > 1
    small = h100.model_copy(update={"hardware": h100.hardware.model_copy(update={"memory_bytes": 8 * 2**30})})
    assert plan.make(small, "x").device_batch_size < plan.make(h100, "x").device_batch_size
    odd = plan.make(decided("train.seq_len=512", "train.total_batch_size=3072"), "x", corpus())  # 6 rows
    assert odd.device_batch_size == 2


def test_hardware_presets_do_not_change_the_experiment():
    one, eight = (plan.make(decided("model=d12", "data=climbmix", f"hardware={name}"), "x") for name in ("1xh100", "8xh100"))
    assert (one.total_batch_size, one.num_steps, one.rates) == (eight.total_batch_size, eight.num_steps, eight.rates)
    assert eight.grad_accum_steps * 8 * eight.device_batch_size == one.grad_accum_steps * one.device_batch_size


def test_time_and_cost_are_known_only_where_the_hardware_is():
    known, unknown = plan.make(decided("hardware=8xh100"), "x"), plan.make(decided("hardware.name=A CPU"), "x", corpus())
    assert known.predicted_hours and known.predicted_cost and known.peak_flops == 989.4e12
    assert unknown.predicted_hours is unknown.predicted_cost is unknown.peak_flops is None


def test_what_is_not_known_yet_is_said_and_not_guessed():
    p = plan.make(decided(), "x")
    assert p.lanes is p.num_units is p.epochs is None
    assert any("not prepared yet" in note for note in p.notes)


def test_a_plan_reads_back_as_it_was(tmp_path: Path):
    p = plan.make(decided(), "x", corpus())
    p.save(tmp_path / "plan.json")
    assert runs.read_plan(tmp_path) == p


def test_deciding_leaves_no_auto_and_takes_bf16_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch):
    for fast, precision in ((True, "bf16"), (False, "fp32")):
        machine = hardware.Machine("cpu", "Some CPU", 1, 2**34, 0.0, fast, 4)
        monkeypatch.setattr(hardware, "cpu", lambda machine=machine: machine)
        config = decided("hardware.nproc_per_node=2", "train.max_steps=2", "train.total_batch_size=8192")
        assert (config.train.precision, config.hardware.threads, config.hardware.compile) == (precision, hardware.cores() // 2 or 1, False)
        assert config.train.seq_len == 512
    assert decided("train.precision=fp32", "hardware=8xh100").train.precision == "fp32"


def test_a_cpu_compiles_where_that_pays_and_can_be_done(monkeypatch: pytest.MonkeyPatch):
    for compiler, steps, compiled in ((True, 3, False), (True, 3000, True), (False, 3000, False)):
        monkeypatch.setattr(hardware, "has_compiler", lambda compiler=compiler: compiler)
        assert decided(f"train.max_steps={steps}", "train.total_batch_size=8192", "hardware=cpu").hardware.compile is compiled
    assert decided("train.max_steps=3", "hardware=cpu", "hardware.compile=true").hardware.compile is True


def test_a_horizon_in_epochs_compiles_by_the_size_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "has_compiler", lambda: True)
    for megabytes, compiled in ((1, False), (40, True)):
        (text := tmp_path / f"{megabytes}.txt").write_bytes(b"word " * (megabytes * 200_000))
        words = ["hardware=cpu", "model=d2", "data=files", f"data.path={text}", "train.num_train_epochs=1", f"run.cache_dir={tmp_path}"]
        assert plan.resolve(compose(words)).hardware.compile is compiled


def test_data_auto_depends_on_the_horizon():
    tokens_of_30_mb = 30e6 / plan.estimate_bytes_per_token(32_768)
    for epochs, choice in ((19, "pystdlib"), (21, "climbmix")):
        words = [f"train.target_tokens={int(epochs * tokens_of_30_mb)}"]
        assert plan.choose_data(decided("hardware=1xh100", *words), 30_000_000)[0] == choice
        assert plan.choose_data(decided("hardware=cpu", *words), 30_000_000)[0] == "pystdlib", "nothing is downloaded there unasked"


def test_hardware_that_is_not_here_is_refused_before_training(monkeypatch: pytest.MonkeyPatch):
    here = hardware.Machine("cuda", "NVIDIA A100", 2, 2**36, 8.0, True, 8)
    monkeypatch.setattr(hardware, "detect", lambda: here)
    with pytest.raises(ConfigError, match="8 processes, but 2 GPUs"):
        runs.check_machine(decided("hardware=8xa100"))
    monkeypatch.setattr(hardware, "detect", hardware.cpu)
    with pytest.raises(ConfigError, match="hardware=cpu"):
        runs.check_machine(decided("hardware=1xh100"))


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (("optimizer=muon", "train.max_steps=10"), "over 10 steps optimizer.weight_decay=0.1"),
        (("optimizer=adamw", "train.max_steps=3"), "it is held at 23.6"),
        (("optimizer=adamw", "optimizer.weight_decay=500"), "optimizer.weight_decay=500 "),
        (("optimizer.scale=false", "optimizer.matrix_lr=0.02", "optimizer.weight_decay=7"), "shrinks the matrices by 14%"),
        (("optimizer.scale=false", "optimizer.matrix_lr=1", "optimizer.weight_decay=4.5"), "turns their signs"),
        (("optimizer=adamw",), ""),
        (("optimizer=muon",), ""),
        (("optimizer=adamw", "train.max_steps=3", "optimizer.weight_decay=0"), ""),
        (("optimizer.scale=false", "optimizer.matrix_lr=0.02", "optimizer.weight_decay=4"), ""),
        (("experiment=cpu_d4",), ""),
    ],
)
def test_decay_that_shrinks_matrices_fast_is_said(words: tuple[str, ...], warned: str):
    made = plan.make(plan.decide(compose(["model=d6", "hardware=cpu", "data=pystdlib", *words])), "x")
    notes = [note for note in made.notes if "optimizer.weight_decay" in note]
    assert len(notes) == bool(warned)
    assert all(warned in note and note.startswith("warning: ") for note in notes)
