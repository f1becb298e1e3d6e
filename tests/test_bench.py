"""`picotrain bench` and the scripts beside it: every benchmark in a tiny setting, the table, the JSON, and what is refused."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import pytest
from conftest import BENCHMARKS, benchmark, picotrain, start
from test_bundle import write_bundle

from picotrain import bench, hardware, planning, shape
from picotrain.bench import environment, processes, step, table
from picotrain.cli import bench as command_module
from picotrain.cli import main
from picotrain.errors import PicotrainError
from picotrain.evaluation import Bpb
from picotrain.hardware import Machine
from picotrain.models.gpt import GPTConfig

REPO = BENCHMARKS.parent
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in ("common", "live"))
H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", 1, 80 * 2**30, 9.0, True, 16)
LAPTOP = Machine("cpu", "a CPU", 1, 16 * 2**30, 0.0, False, 2)
TINY_STEP = ["--depth", "1", "--seq-len", "16", "--batch", "2", "--vocab", "300", "--steps", "2", "--warmup", "1"]
TINY_MATMUL = ["--size", "512", "--repeats", "2"]


class Result:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command in this process, its benchmarks as well."""

    def run(*arguments: str, lines: Callable[..., Iterator[dict[str, Any]]] = run_here) -> Result:
        monkeypatch.setattr(command_module, "lines", lines)
        monkeypatch.setattr(bench, "end_on_sigterm", lambda: None)
        monkeypatch.setattr(sys, "argv", ["picotrain", "bench", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return run


def run_here(name: str, arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    return bench.load(name).run(bench.parser(name).parse_args(arguments))


def script(name: str) -> str:
    return str(BENCHMARKS / f"{name}.py")


def measure(name: str, *arguments: str) -> list[dict[str, Any]]:
    """The lines of a benchmark, or else of a script, each as its JSON has it; those of the command's own with rows for its table."""
    found = [json.loads(json.dumps(line)) for line in run_here(name if name in bench.NAMES else script(name), arguments)]
    for line in found if name in bench.NAMES else []:
        assert all(isinstance(cell, str) for row in table.rows(line) for cell in row)
    return found


# Every benchmark -------------------------------------------------------------------------------------------


def test_matmul_counts_two_operations_for_each_product():
    (line,) = measure("matmul", *TINY_MATMUL, "--precision", "fp32")
    assert line["gflops"] > 0 and line["size"] == 512 and line["of_peak"] is None  # no data sheet for a CPU


def test_step_measures_the_parts_of_a_step_and_counts_all_of_its_micro_batches():
    (line,) = measure("step", *TINY_STEP, "--grad-accum", "3")
    assert line["batch"] == 2 and line["grad_accum"] == 3 and line["vocab"] == 300
    assert line["tok_per_sec"] == pytest.approx(3 * 2 * 16 / (line["step_ms"] / 1000), rel=0.1)  # both are rounded
    assert line["forward_ms"] + line["backward_ms"] + line["optimizer_ms"] > 0
    assert line["mfu"] is None and line["predicted_mib"] > 0 and line["peak_rss_mib"] > 0


def test_step_takes_any_key_of_the_config_and_the_micro_batch_of_the_plan():
    options = bench.parser("step").parse_args([*TINY_STEP, "--depth", "4", "--batch", "auto", "--set", "model.window_pattern=SL"])
    options.depth, options.repeats = [4], 1
    config = step.config_of(options)
    assert config.model.window_pattern == "SL" and config.tokenizer.vocab_size == 300
    rows = planning.make(config, "step").device_batch_size
    assert rows > 1 and rows & (rows - 1) == 0


def test_step_interleaves_settings_and_takes_medians_over_repeats(monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[int, str]] = []

    def one(name: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
        options = bench.parser(name).parse_args(arguments)
        assert options.repeats == 1 and options.compile
        seen.append((options.depth[0], options.precision[0]))
        first = 20.0 if len(seen) <= 4 else 2.0 + len(seen) / 100
        return [{"depth": options.depth[0], "tok_per_sec": 100 * len(seen), "first_step_s": first, "mfu": None, "compile": True}]

    monkeypatch.setattr(processes, "lines", one)
    options = bench.parser("step").parse_args(["--depth", "2", "4", "--precision", "fp32", "bf16", "--compile", "--repeats", "3"])
    found = list(step.run(options))
    assert seen == 3 * [(2, "fp32"), (2, "bf16"), (4, "fp32"), (4, "bf16")]
    assert [line["tok_per_sec"] for line in found] == [500, 600, 700, 800]
    assert found[0]["tok_per_sec_all"] == [100, 500, 900] and found[0]["depth"] == 2 and found[0]["mfu"] is None
    assert (found[0]["first_step_s"], found[0]["first_step_warm_s"]) == (20.0, pytest.approx(2.07))


def test_loader_and_the_usual_method_read_the_same_corpus(corpus_dir: Path):
    options = ["--path", str(corpus_dir), "--seconds", "0.05", "--vocab", "300"]
    wide, narrow = measure("loader", *options)
    assert (wide["rows"], wide["seq_len"], narrow["rows"], narrow["seq_len"]) == (32, 2048, 8, 512)
    assert wide["tokens_per_s"] > 0 and 0 <= narrow["dropped_percent"] < 5
    beside = next(run_here(script("loader"), [*options, "--short"]))
    assert beside.keys() > wide.keys() and beside["usual"]["tokens_per_s"] > 0 and beside["corpus"].endswith("-short")


def test_checkpoint_says_how_long_a_save_holds_the_loop(tmp_path: Path):
    (line,) = measure("checkpoint", "--depth", "1", "--saves", "1", "--signals", "0", "--folder", str(tmp_path))
    assert line["benchmark"] == "checkpoint" and line["state_mb"] > 10
    assert line["stall_share"] == pytest.approx(line["stall_s"] / line["sync_s"], abs=0.01)


SMALL_RUN = ["model.depth=1", "tokenizer.vocab_size=300", "train.seq_len=32", "train.total_batch_size=64", "train.device_batch_size=2"]


@pytest.mark.slow
def test_time_to_bpb_trains_what_its_recipes_say_and_counts_without_the_first_ten(corpus_dir: Path, tmp_path: Path):
    small = [*SMALL_RUN, "hardware.compile=false", "data.unit_bytes=8192", "train.eval_tokens=64"]
    recipes = ["--recipes", "fast", "reference", "--steps", "12", "--target", "0.1", "--val-tokens", "640"]
    options = ["--corpus", str(corpus_dir), "--cache", str(tmp_path), *recipes, "--set", *small]
    lines = {line["recipe"]: line for line in measure("time_to_bpb", *options)}
    assert list(lines) == ["fast", "reference"]
    for line in lines.values():
        assert (line["steps"], line["tokens"], line["reached"]) == (12, 12 * 64, False)
        assert 0 <= line["steps_s"] <= line["training_s"] < line["command_s"] and line["prepare_s"] > 0
        assert 0 < line["val_bpb"] < 10 and 500 < line["val_tokens"] <= 640, "20 rows, but for their special tokens; not the run's own 2"
        model = line["model"]
        assert model["value_embeds"] and model["residual_scalars"] and model["smear"] and model["qk_scale"] == 1.3
        assert line["optimizer"] == "muon"


def test_time_to_bpb_plans_the_steps_of_a_budget_by_a_short_run(monkeypatch: pytest.MonkeyPatch):
    time_to_bpb = benchmark("time_to_bpb")
    found = {"steps": 30, "step_ms": 250.0, "steps_s": 5.0, "command_s": 9.0}
    monkeypatch.setattr(time_to_bpb, "_train", lambda words, run_dir: {**found, "words": words})
    monkeypatch.setattr(time_to_bpb, "_seconds", lambda words: 1.0)
    monkeypatch.setattr(
        benchmark("time_to_bpb"), "_validated", lambda run_dir, max_tokens: Bpb(val_bpb=1.0, val_loss=1.0, tokens=64, bytes=64)
    )
    (line,) = measure("time_to_bpb", "--recipes", "fast", "--budget", "5")
    assert "train.max_steps=30" in line["words"] and line["reached"], "ten, which are not counted, and 5 s of 250 ms"


def test_a_corpus_that_is_not_there_is_one_message():
    with pytest.raises(PicotrainError, match="there is no /nowhere") as found:
        measure("time_to_bpb", "--corpus", "/nowhere", "--recipes", "fast")
    assert "tokenizer train" not in str(found.value)


def test_sampling_times_both_ways(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark("sampling"), "NEW_TOKENS", 3)
    (line,) = measure("sampling", "--depth", "1", "--repeats", "1", "--threads", "1")
    assert line["batch_1"] > 0 and line["batch_8"] > 0 and line["batch_1_without_cache"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # transformers' and inductor's own
def test_peers_have_our_matrices_and_are_trained():
    options = [
        "--depth",
        "2",
        *["--seq-len", "64", "--batch", "2", "--vocab", "300", "--steps", "1", "--warmup", "1", "--precision", "fp32"],
    ]
    peers, options = benchmark("peers"), bench.parser(script("peers")).parse_args(options)
    model = GPTConfig(depth=2, head_dim=64)
    matrices = shape.parameters(shape.dims(model), 300, model).matrices
    tables = ("wte.", "wpe.", "embed_tokens.", "lm_head.")
    for peer in peers.PEERS:
        theirs = peers._build(peer, 2, options)
        assert matrices == sum(p.numel() for name, p in theirs.named_parameters() if p.ndim == 2 and not any(t in name for t in tables))
    options.one = "gpt2"
    line = next(peers.run(options))
    assert (line["peer"], line["tok_per_sec"] > 0) == ("gpt2", True)


def test_peers_are_compared_within_a_repeat(monkeypatch: pytest.MonkeyPatch):
    rates = {"picotrain": iter([200, 100, 300]), "gpt2": iter([100, 100, 100]), "nanochat": iter([50, 40, 50])}

    def lines(name: str, words: list[str], variables: dict[str, str]) -> list[dict[str, Any]]:
        who = next((word.partition("=")[2] for word in words if word.startswith("--one=")), "picotrain")
        assert variables["TORCHINDUCTOR_CACHE_DIR"].endswith(who)  # nobody is helped by another's compiled code
        same = dict.fromkeys(("seq_len", "batch", "vocab", "precision", "hardware", "threads", "torch", "matmul_gflops"), 1)
        return [same | {"depth": 4, "tok_per_sec": next(rates[who]), "first_step_s": 1.0, "peak_rss_mib": 1}]

    monkeypatch.setattr(processes, "lines", lines)
    (line,) = measure("peers", "--depth", "4", "--repeats", "3")
    assert line["times"] == {"gpt2": 2.0, "nanochat": 4.0}
    assert line["times_least"] == {"gpt2": 1.0, "nanochat": 2.5}
    assert line["tok_per_sec"] == {"picotrain": 200, "gpt2": 100, "nanochat": 50}


TINY_VARIANTS = ["--depth", "1", "--seq-len", "16", "--batch", "2", "--vocab", "300", "--no-compile", "--rounds", "5"]


def test_variants_are_compared_with_the_config_as_it_is_within_a_round(monkeypatch: pytest.MonkeyPatch):
    plain, wide, two = measure("variants", *TINY_VARIANTS, "--variants", "model.width=512", "model.smear=true optimizer=adamw")
    assert (plain["variant"], plain["times"], plain["quartiles"]) == ("", 1.0, [1.0, 1.0]) and plain["optimizer"] == "muon"
    assert wide["times"] > 1.5, "eight times as wide"
    assert two["variant"] == "model.smear=true optimizer=adamw" and two["step_ms"] > 0
    for line in (wide, two):
        low, high = line["quartiles"]
        assert low <= line["times"] <= high


def test_variants_have_one_process():
    threads = f"hardware.threads={hardware.cores() + 1}"
    with pytest.raises(PicotrainError) as found:
        measure("variants", *TINY_VARIANTS, "--variants", threads, "model.smear=true")
    assert threads in str(found.value) and "bench step" in str(found.value) and "smear" not in str(found.value)


def test_a_variant_that_is_no_config_is_one_message_and_exit_code_2():
    command = [sys.executable, script("variants"), *TINY_VARIANTS, "--variants", "model.smeer=true"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1 and "model.smeer" in done.stderr and "model.smear" in done.stderr


def test_busy_compares_the_ways_to_wait_beside_processes_that_end_with_it(monkeypatch: pytest.MonkeyPatch):
    busy = benchmark("busy")
    rates, beside = {str(hardware.SPINS): 90, "300000": 20, "0": 100}, []

    def measured(name: str, arguments: Sequence[str], variables: dict[str, str]) -> list[dict[str, Any]]:
        beside.append([process.poll() for process in started])
        return [dict.fromkeys(busy.WORK, rates[variables["GOMP_SPINCOUNT"]])]

    started: list[Any] = []
    original = busy.subprocess.Popen
    monkeypatch.setattr(busy.subprocess, "Popen", lambda *words: started.append(original(*words)) or started[-1])
    monkeypatch.setattr(busy.processes, "lines", measured)
    (line,) = measure("busy", "--loads", "2", "--repeats", "1")
    assert line["training"] == {"chosen": 90, "active": 20, "passive": 100} and line["of_better"]["sampling"] == 0.9
    assert beside == [[None, None]] * 3 and len(started) == 2
    monkeypatch.setattr(busy.processes, "lines", lambda *anything: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure("busy", "--loads", "1", "--repeats", "1")
    assert len(started) == 3 and all(process.poll() is not None for process in started)


def test_busy_measures_all_three_kinds_of_work():
    (line,) = measure("busy", "--here", "--seconds", "0")
    assert all(line[work] > 0 for work in benchmark("busy").WORK)


def lives(pid: int) -> bool:
    """Whether a process is there; one that has ended and that nobody waits for (PID 1 of a container may not) is not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_a_busy_process_ends_when_whoever_started_it_is_gone():
    popen = f"subprocess.Popen([sys.executable, '-c', {benchmark('busy').BUSY!r}, str(os.getpid())], stdout=subprocess.DEVNULL)"
    code = f"import os, subprocess, sys; print({popen}.pid)"
    pid = int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)
    deadline = time.monotonic() + 20
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not lives(pid)


def test_startup_times_the_help_of_the_command():
    (line,) = measure("startup", "--modes", "help", "--repeats", "1")
    assert line["mode"] == "help" and line["command_s"] > 0


@pytest.mark.slow
def test_startup_sees_the_first_step_of_a_run():
    (line,) = measure("startup", "--modes", "eager", "--repeats", "1", "--depth", "2")
    assert 0 < line["first_step_s"] < line["command_s"]


def test_startup_says_what_it_cannot_measure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "has_compiler", lambda: False)
    monkeypatch.setattr("picotrain.bench.startup._help", lambda: {"command_s": 0.1})
    without, help_line = measure("startup", "--modes", "help", "compiled", "--repeats", "1")
    assert "C++ compiler" in without["not_measured"] and help_line["mode"] == "help"
    assert table.rows(without)[0].reference.startswith("not measured: ")


def test_corpus_reads_every_row_once_and_starts_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = benchmark("corpus")
    real, starts = corpus.start, []

    def once(folder: Path) -> dict[str, float]:
        """One process is enough to see that it starts; the benchmark takes four."""
        starts.append(starts[0] if starts else real(folder))
        return starts[-1]

    monkeypatch.setattr(corpus, "start", once)
    lines = measure("corpus", "--shards", "4", "--ranks", "1", "2", "--folder", str(tmp_path / "corpus"))
    assert [line["cached"] for line in lines[:4]] == [False, True, True, True] and lines[0]["first_batch_s"] > 0
    one, two = lines[4:]
    assert one["rows"] == two["rows"] > 0 and two["dp_size"] == 2 and two["every_row_once"]


def test_core_agrees_with_the_plain_implementation(tmp_path: Path, corpus_dir: Path):
    options = ["--bundle", str(write_bundle(tmp_path)), "--corpus", str(corpus_dir)]
    *tasks, whole = measure("core", *options, "--vocab", "300", "--depth", "1", "--threads", "1")
    assert [line["task"] for line in tasks] == ["choice", "pairs", "words"]
    assert whole["examples"] == 3 and whole["mismatches_beyond_margin"] == []
    with pytest.raises(PicotrainError, match="no task typo; it has choice, pairs, words"):
        measure("core", *options, "--vocab", "300", "--tasks", "typo")


# The command -----------------------------------------------------------------------------------------------


def test_a_set_becomes_one_table_and_one_file(command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    tiny = [("matmul", [*TINY_MATMUL, "--precision", "fp32"]), ("step", TINY_STEP)]
    monkeypatch.setattr(command_module, "quick_set", lambda machine: tiny)
    result = command("--device", "cpu", "--out", str(tmp_path / "out.json"))
    assert result.code == 0, result.err
    assert "fp32, 512 x 512" in result.out and "GFLOP/s" in result.out
    assert "d1 fp32, 2 x 16" in result.out and "of the matmul ceiling" in result.out and "of the plan's prediction" in result.out
    assert result.out.count("benchmark") == 1
    assert "1 of 2: matmul" in result.err and "2 of 2: step" in result.err
    written = json.loads((tmp_path / "out.json").read_text())
    assert [line["benchmark"] for line in written["results"]] == ["matmul", "step"]
    where = written["environment"]
    assert where["packages"]["torch"] and where["hardware"]["cores"] == hardware.cores() and where["time"] and "commit" in where


def test_json_lines_begin_with_where_they_were_measured(command):
    result = command("matmul", *TINY_MATMUL, "--device", "cpu", "--json")
    first, *lines = map(json.loads, result.out.splitlines())
    assert first["environment"]["hardware"]["device"] == "cpu"
    assert [(line["benchmark"], line["precision"], line["size"]) for line in lines] == [("matmul", "fp32", 512), ("matmul", "bf16", 512)]


def test_a_benchmark_that_fails_costs_no_other_and_decides_the_exit_code(command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def some_fail(name: str, arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
        if name == "step":
            raise processes.BenchmarkFailed(name, -9, "Traceback: no memory")
        yield from run_here("matmul", TINY_MATMUL)

    result = command("step", "matmul", "--device", "cpu", "--out", str(tmp_path / "out.json"), lines=some_fail)
    assert result.code == 1
    assert "ended with exit code -9" in result.err and "no memory" in result.err
    assert "not measured" in result.out and "fp32, 512 x 512" in result.out
    assert [line["benchmark"] for line in json.loads((tmp_path / "out.json").read_text())["results"]] == ["step", "matmul", "matmul"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["stp"], ["no benchmark 'stp'", "nearest: step", "loader"]),
        (["step", "lodr"], ["no benchmark 'lodr'", "nearest: loader"]),
        (["stp", "lodr"], ["no benchmark 'stp'", "no benchmark 'lodr'"]),
        (["sampling", "--depth", "2"], ["`python benchmarks/sampling.py --depth 2`"]),
        (["step", "memory", "core"], ["`python benchmarks/memory.py`", "`python benchmarks/core.py`"]),
        (["--depth", "2"], ["--depth", "picotrain bench step --depth 6"]),
        (["step", "loader", "--depth", "2"], ["--depth"]),
        (["--device", "tpu"], ["tpu", "cpu or cuda"]),
        (["--device", "cuda"], ["no NVIDIA GPU", "--device cpu"]),
        (["matmul", "--out", "/nowhere/out.json"], ["/nowhere/out.json", "cannot be written"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(command, monkeypatch: pytest.MonkeyPatch, arguments: list[str], parts: list[str]):
    monkeypatch.setattr(hardware, "detect", lambda: LAPTOP)
    result = command(*arguments)
    assert result.code == 2 and result.out == ""
    assert result.err.count("error:") == 1 and "Traceback" not in result.err
    assert all(part in result.err for part in parts)


def test_help_names_every_benchmark_and_a_name_asks_for_its_options(command):
    assert all(name in command("--help").out for name in bench.NAMES)
    assert "--grad-accum" in command("step", "--help").out


@pytest.mark.parametrize("columns", [60, 100])
def test_the_help_of_a_benchmark_fits_the_terminal_and_names_the_command_that_was_typed(command, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("step", "loader", "startup"):
        shown = command(name, "--help").out
        assert max(map(len, shown.splitlines())) <= columns, max(shown.splitlines(), key=len)
        assert f"    picotrain bench {name}" in shown and "python benchmarks/" not in shown


def test_a_process_of_its_own_runs_a_benchmark_and_its_mistakes_reach_the_user():
    done = picotrain("bench", "step", *TINY_STEP, "--no-compile", "--precision", "fp32", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[1])["depth"] == 1
    done = picotrain("bench", "step", "--dpth", "1", "--device", "cpu")
    assert done.returncode == 2 and done.stdout == ""
    assert "error: unrecognized arguments: --dpth 1; `picotrain bench step --help`" in done.stderr and "usage" not in done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for child processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ending_the_command_ends_the_process_that_measures(number: signal.Signals):
    process = start("bench", "matmul", "--repeats", "1000000", "--device", "cpu", stdout=DEVNULL, stderr=DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 120
    while not (found := measuring(children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found, "nothing is measured"
    process.send_signal(number)
    assert process.wait(60) == (128 + number if number == signal.SIGTERM else -number)
    while measures(found[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not measures(found[0])


def measuring(children: Path) -> list[int]:
    """Processes among the children that have begun to run a benchmark."""
    return [pid for pid in map(int, children.read_text().split()) if measures(pid)]


def measures(pid: int) -> bool:
    """Whether that process is there and runs a benchmark."""
    try:
        return b"picotrain.bench" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


# Sets, scripts, docs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [H100, LAPTOP])
def test_the_options_of_every_set_are_those_of_their_benchmarks(machine: Machine):
    for tasks in (command_module.quick_set(machine), command_module.full_set(machine)):
        for name, options in tasks:
            bench.parser(name).parse_args(options)
        assert {name for name, _ in tasks} == {*bench.NAMES}


def test_a_gpu_measures_compiled_bf16_at_2048_tokens():
    settings = [bench.parser(name).parse_args(options) for name, options in command_module.full_set(H100) if name == "step"]
    assert settings[0].depth == [12, 20]
    for options in settings:
        assert options.device == "cuda" and options.seq_len == 2048 and options.compile
        assert options.precision == ["bf16"] and options.batch == "auto" and options.repeats == 3


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_answers_help(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bench, "end_on_sigterm", lambda: None)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.syspath_prepend(BENCHMARKS)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script(name), run_name="__main__")
    assert not ended.value.code
    out = capsys.readouterr().out
    assert f"usage: {name}.py" in out and f"python benchmarks/{name}.py" in out


def test_what_the_command_names_and_what_the_docs_show_is_there_and_takes_its_options():
    texts = [path.read_text() for path in [*(REPO / "docs").glob("*.md"), REPO / "README.md"]]
    shown = [match for text in texts for match in re.findall(r"python benchmarks/(\w+)\.py([^`|\n]*)", text)]
    assert {name for name, _ in shown} >= {"step", "loader", "checkpoint", "sampling", "corpus", "core", "peers", "busy", "variants"}
    for name, options in shown:
        own = hasattr(benchmark(name), "arguments")  # the others are the command's
        if name != "tinyshakespeare":  # which is no benchmark of this kind
            bench.parser(script(name) if own else name).parse_args(shlex.split(options, comments=True))
    assert {*bench.SCRIPTS, *bench.NAMES, "tinyshakespeare", "house"} == {*SCRIPTS}  # these two are of our own house and its claims
    assert not {*bench.SCRIPTS} & {*bench.NAMES}


# Each script in a process forked before torch is there, whose import is not made.
FIRST = """
import os, runpy, sys

class Torch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), file=sys.stderr, flush=True)
            os._exit(0)

sys.meta_path.insert(0, Torch)
for script in sys.argv[1:]:
    if not os.fork():
        sys.path.insert(0, os.path.dirname(script))
        sys.argv = [script, "--help"]
        runpy.run_path(script, run_name="__main__")
    os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp's variable is set on Linux alone")
def test_scripts_say_how_threads_wait_before_torch_is_loaded():
    environment = {key: value for key, value in os.environ.items() if key not in hardware.WAITING_VARIABLES}
    command = [sys.executable, "-c", FIRST, *map(script, [*bench.NAMES, *bench.SCRIPTS])]
    done = subprocess.run(command, stdout=DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, check=True)
    said = done.stderr.split()
    assert len(said) >= 6 and {*said} == {str(hardware.SPINS)}


# Where it was measured -------------------------------------------------------------------------------------


def test_clocks_are_read_while_the_device_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = tmp_path / "nvidia-smi"
    fake.write_text('#!/bin/sh\necho "$@" > "$0.asked"\nsleep 0.2\necho "1980, 2619, 652.31, [N/A]"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    worked: list[int] = []
    found = environment.gpu(environment.STATE, lambda: (worked.append(1), time.sleep(0.01)))
    assert found == {"sm_mhz": 1980, "memory_mhz": 2619, "power_w": 652.31, "temperature_c": "[N/A]"}
    assert worked and "-i 3 --query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu" in (tmp_path / "nvidia-smi.asked").read_text()


def test_without_a_driver_there_are_no_clocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.gpu(environment.STATE) == {}
