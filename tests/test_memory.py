"""Predicted memory: held against the tensors that a step keeps, against a GPU's step on the meta device, and against real runs."""

from __future__ import annotations

import json
import platform
from typing import Any

import pytest
import torch
from conftest import BENCHMARKS, benchmark

from picotrain import bench, hardware
from picotrain import planning as plan
from picotrain.bench import processes
from picotrain.cli.show import plan_table
from picotrain.config import Config, compose
from picotrain.data import stream
from picotrain.model import blocked, build, loss
from picotrain.planning import activations, memory
from picotrain.planning.activations import Step

LiveBytes, MEMORY = benchmark("live").LiveBytes, str(BENCHMARKS / "memory.py")
fast_bf16 = pytest.mark.skipif(not hardware.cpu().fast_bf16, reason="bf16 is emulated on this CPU, hundreds of times slower")
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap's growth was measured with glibc")

TINY = (
    "data=pystdlib", "model=d2", "tokenizer.vocab_size=300", "train.seq_len=256", "train.max_steps=1", "train.device_batch_size=2",
    "train.total_batch_size=512",
)  # fmt: skip


def decided(*words: str) -> Config:
    return plan.decide(compose(["data=pystdlib", *words]))


def predicted(config: Config, rows: int) -> memory.Memory:
    return memory.predict(config, *memory.facts(config)[:2], rows)


def test_the_numbers_that_the_plan_repeats_are_those_of_the_code():
    assert activations.ATTENTION_BLOCK == blocked.BLOCK
    assert activations.LOGIT_CHUNK_BYTES == loss.LOGIT_CHUNK_BYTES
    assert activations.LOGIT_CHUNK_BYTES_DEFAULT == loss.LOGIT_CHUNK_BYTES_DEFAULT
    assert activations.CAP_WITHOUT_MAXIMUM == loss.BOUNDED
    assert memory.WORKERS == stream.WORKERS


# What a step keeps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "words",
    [
        (),
        ("hardware.recompute=selective",),
        ("hardware.recompute=full",),
        ("model.n_kv_heads=1",),
        ("model.window_pattern=SSSL", "model.depth=4"),
        ("model.value_embeds=true",),
        ("model.residual_scalars=true",),
        ("model.smear=true",),
        ("model.logit_softcap=null",),
        ("model.logit_softcap=100",),
        ("model.kind=llama",),
        ("model.kind=llama", "model.n_kv_heads=1", "model.qk_norm=true"),
        ("model.kind=llama", "model.tie_embeddings=true"),
        ("model.kind=llama", "model.qk_norm=true", "hardware.recompute=selective"),
        ("model.kind=llama", "hardware.recompute=full"),
    ],
    ids=lambda words: " ".join(words) or "plain",
)
def test_what_an_eager_step_on_a_cpu_keeps_is_counted_to_five_percent(words: tuple[str, ...], precision: str, monkeypatch):
    for module in (activations, loss):  # several chunks
        monkeypatch.setattr(module, "LOGIT_CHUNK_BYTES", {"cpu": 2**19})
    config = decided(*TINY, "hardware=cpu", "hardware.compile=false", f"train.precision={precision}", *words)
    p = plan.make(config, "x")
    model = build(config.model, p.vocab_size, p.seq_len, p.precision, p.recompute)
    model.init_weights(0)
    ids = torch.zeros((p.device_batch_size, p.seq_len), dtype=torch.int64)
    with LiveBytes() as live:
        live.hold(*model.parameters(), *model.buffers(), ids)
        before = live.now
        value = model(ids, ids)
        kept, forward, live.peak = live.now - before, live.peak - before, live.now
        value.backward()
        backward = live.peak - before
    step = Step(config, *memory.facts(config)[:2], p.device_batch_size)
    counted = step.layers() + step.head_gradients()
    assert kept == pytest.approx(counted, rel=0.05)
    at_the_loss = counted + step.logits()
    in_the_backward = counted + step.recomputed_layer() + step.backward() + 4 * step.params.head
    assert max(forward, backward) == pytest.approx(max(at_the_loss, in_the_backward), rel=0.1)
    if p.recompute == "none":
        assert forward == pytest.approx(at_the_loss, rel=0.05)


@pytest.mark.parametrize("depth", [12, 20])
@pytest.mark.parametrize(
    "words",
    [
        ("--batch", "1", "16"),
        ("--batch", "4", "--grad-accum", "2"),
        ("--batch", "16", "--recompute", "selective", "full"),
        ("--batch", "4", "--set", "model.value_embeds=true", "model.residual_scalars=true", "model.smear=true", "model.n_kv_heads=2"),
        ("--batch", "4", "--recompute", "none", "full", "--set", "model.kind=llama", "model.n_kv_heads=2", "model.qk_norm=true"),
    ],
    ids=" ".join,
)
def test_a_step_on_a_gpu_is_predicted_to_ten_percent_of_its_live_tensors(depth: int, words: tuple[str, ...]):
    arguments = ["--count", "--depth", str(depth), "--seq-len", "2048", "--vocab", "32768", "--precision", "bf16", *words]
    for line in bench.load(MEMORY).run(bench.parser(MEMORY).parse_args(arguments)):
        assert line["device"] == "cuda" and line["measured_mib"] > 3000
        assert 0.9 < line["ratio"] < 1.1, line


@pytest.mark.parametrize("micro_batches", ["1", "2"])
@pytest.mark.parametrize("kind", [("gpt",), ("llama", "model.tie_embeddings=true")], ids=" ".join)
def test_the_gradients_of_large_tables_are_predicted_also_of_one_that_is_embedding_and_head(kind: tuple[str, ...], micro_batches: str):
    arguments = ["--count", "--depth", "4", "--seq-len", "32", "--vocab", "65536", "--precision", "bf16", "--batch", "1", "--grad-accum"]
    arguments += [micro_batches, "--set", *(f"model.kind={kind[0]}", *kind[1:])]
    for line in bench.load(MEMORY).run(bench.parser(MEMORY).parse_args(arguments)):
        assert 0.95 < line["ratio"] < 1.05, line


# Real runs -------------------------------------------------------------------------------------------------


def measured(*words: str) -> dict[str, Any]:
    (line,) = processes.lines(MEMORY, [*words, "--set", "hardware.threads=1"])
    return line


@glibc
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("--depth", "2", "--batch", "8"), marks=pytest.mark.slow),
        pytest.param(("--depth", "4", "--batch", "2", "--grad-accum", "2", "--steps", "4"), marks=pytest.mark.slow),
        pytest.param(
            ("--depth", "2", "--batch", "1", "--seq-len", "64", "--set", "model.width=1024", "hardware.threads=1"), marks=pytest.mark.slow
        ),
        pytest.param(("--depth", "4", "--batch", "4", "--precision", "bf16", "--steps", "4"), marks=[pytest.mark.slow, fast_bf16]),
        pytest.param(("--depth", "4", "--batch", "8", "--compile", "true"), marks=pytest.mark.slow),
        pytest.param(("--depth", "4", "--batch", "8", "--compile", "true", "--precision", "bf16"), marks=[pytest.mark.slow, fast_bf16]),
        pytest.param(("--depth", "4", "--batch", "8", "--recompute", "full"), marks=pytest.mark.slow),
        pytest.param(("--depth", "4", "--batch", "4", "--optimizer", "muon"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_run_on_a_cpu_is_predicted_to_twenty_percent_of_its_resident_memory(words: tuple[str, ...]):
    line = measured(*words) if "--set" not in words else next(iter(processes.lines(MEMORY, words)))
    assert 0.8 < line["ratio"] < 1.2, line


# The plan --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["hardware=cpu", "hardware=8xh100"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_prediction_grows_with_batch_depth_and_precision_and_falls_with_recompute(device: str, recompute: str):
    words = (device, "train.total_batch_size=1048576", "train.seq_len=1024", f"hardware.recompute={recompute}", "hardware.compile=false")
    by_rows = [predicted(decided("model=d12", *words), rows).peak for rows in (1, 2, 4, 8, 16)]
    assert by_rows == sorted(set(by_rows))
    by_depth = [predicted(decided(f"model=d{depth}", *words), 4).peak for depth in (2, 4, 6, 12, 20)]
    assert by_depth == sorted(set(by_depth))
    narrow, wide = (predicted(decided("model=d12", *words, f"train.precision={name}"), 16).activations for name in ("bf16", "fp32"))
    assert narrow < wide
    less, more = (predicted(decided("model=d12", *words, f"hardware.recompute={name}"), 16).peak for name in ("full", "none"))
    assert less < more


def test_the_plan_names_the_parts_of_its_prediction(capsys: pytest.CaptureFixture[str]):
    on_cpu, on_gpu = (plan.make(decided(*TINY, hardware), "x") for hardware in ("hardware=cpu", "hardware=1xh100"))
    for p in (on_cpu, on_gpu):
        assert sum(p.predicted_memory.values()) == p.predicted_memory_bytes
        assert json.loads(p.model_dump_json())["predicted_memory"]["weights"] == 4 * p.parameters["total"]
    assert {"staging", "process", "heap", "data"} <= on_cpu.predicted_memory.keys()
    assert not {"staging", "process", "heap", "data"} & on_gpu.predicted_memory.keys()
    plan_table(on_cpu)
    assert "process" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [1, 2, 8, 32])
def test_the_automatic_micro_batch_is_the_largest_power_of_two_that_fits(rows: int):
    """With just the room that `rows` take, and with a little less."""
    config = decided("model=d12", "hardware=1xh100", "train.total_batch_size=1048576")
    taken = predicted(config, rows).peak
    assert taken < predicted(config, 2 * rows).peak

    def chosen(memory_bytes: int) -> int:
        section = config.hardware.model_copy(update={"memory_bytes": memory_bytes})
        return plan.make(config.model_copy(update={"hardware": section}), "x").device_batch_size

    assert chosen(int(taken / memory.MEMORY_SHARE) + 2) == rows
    assert chosen(int(taken / memory.MEMORY_SHARE) - 2) == max(1, rows // 2)


def test_where_memory_runs_out_recomputing_is_among_what_is_proposed():
    config = decided("model=d12", "hardware=1xh100", "train.device_batch_size=1", "train.total_batch_size=16384")
    proposed = memory.lighter_settings(plan.make(config, "x"), config)
    assert [text.partition(":")[0] for text in proposed][:2] == ["hardware.recompute=selective", "hardware.recompute=full"]


@pytest.mark.parametrize("tokens", [8, 16, 24, 504])
@pytest.mark.parametrize("rows", [1, 6])
def test_what_is_proposed_can_be_set(tokens: int, rows: int):
    overrides = ["model=d4", "hardware=cpu", f"train.seq_len={tokens}", f"train.device_batch_size={rows}"]
    overrides += [f"train.total_batch_size={tokens * 6}", "hardware.memory_bytes=1000000"]
    made = plan.make(decided(*overrides), "x")
    proposed = memory.lighter_settings(made, decided(*overrides))
    assert proposed and any(text in note for text in proposed for note in made.notes)
    for setting in (text.split(":")[0].split(" ")[0] for text in proposed):
        assert setting not in overrides
        assert plan.make(decided(*overrides, setting), "x").predicted_memory_bytes < made.predicted_memory_bytes
