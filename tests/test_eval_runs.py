"""CORE and other evaluations inside a run and by `picotrain eval`: what lands where, and that a failure costs nothing."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import lines, losses, picotrain
from test_hardships import patched
from test_hf import gpt2  # noqa: F401  # a fixture

from picotrain import hardware
from picotrain.report import read_run

TASKS = {"colours": "multiple_choice", "names": "schema", "ends": "language_modeling"}

# Torch's threads now and then abort while the interpreter of one of several ranks ends; here it happens every time.
ABORTS_AT_EXIT = """
import atexit
if os.environ.get("WORLD_SIZE", "1") != "1":
    atexit.register(os.abort)
"""
# And each rank says at its end how many threads it had.
TELLS_ITS_THREADS = """
import sys
leave = os._exit
def tell(code):
    os.write(2, f"threads of a rank: {sys.modules['torch'].get_num_threads()}\\n".encode())  # at once: two ranks write
    leave(code)
if os.environ.get("WORLD_SIZE", "1") != "1":
    os._exit = tell
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small tasks, and one whose file breaks off in its third line."""
    root = tmp_path_factory.mktemp("eval") / "bundle"
    (root / "eval_data").mkdir(parents=True)
    rows = {
        "colours": [{"query": f"the cat sees {i}", "choices": ["the river.", "two apples."], "gold": i % 2} for i in range(12)],
        "names": [{"context_options": ["the cat", "a dog"], "continuation": f"sees the river {i}", "gold": i % 2} for i in range(8)],
        "ends": [{"context": f"a small model {i} reads ", "continuation": "seven tokens"} for i in range(9)],
    }
    entries = []
    for label, kind in [*TASKS.items(), ("torn", "multiple_choice")]:
        text = "".join(json.dumps(row) + "\n" for row in rows.get(label, rows["colours"][:2]))
        text += '{"query": "half' if label == "torn" else ""
        (root / "eval_data" / f"{label}.jsonl").write_text(text)
        shots = 0 if kind == "schema" else 2
        entries.append(f"- label: {label}\n  dataset_uri: {label}.jsonl\n  num_fewshot: [{shots}]\n  icl_task_type: {kind}\n")
    (root / "core.yaml").write_text("icl_tasks:\n" + "".join(entries))
    baselines = "".join(f"{label},{0 if label == 'ends' else 50}\n" for label in [*TASKS, "torn"])
    (root / "eval_meta_data.csv").write_text(f"Eval Task,Random baseline\n{baselines}")
    return root


@pytest.fixture(scope="module")
def run(tiny, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that measured CORE at step 6 and at its end."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = picotrain("train", *tiny(folder, "train.core_metric_every=6", f"evaluation.core.bundle={bundle}", "train.save_every=6"))
    assert done.returncode == 0, done.stderr
    (folder.parent / "out").write_text(done.stdout + done.stderr)
    return folder


def test_core_in_a_run_is_in_its_metrics_its_checkpoint_and_its_report(run, bundle):
    records = lines(run, "core")
    assert [record["step"] for record in records] == [6, 12]
    last = records[-1]
    assert {label: task["n"] for label, task in last["tasks"].items()} == {"colours": 12, "names": 8, "ends": 9, "torn": 0}
    centered = [task["centered"] for task in last["tasks"].values() if task["centered"] is not None]
    assert len(centered) == 3 and last["core_metric"] == pytest.approx(sum(centered) / 3)
    assert (last["evaluated"], last["of"]) == (3, 4) and "torn.jsonl, line 3" in last["problems"]["torn"].replace(":3", ", line 3")
    assert last["baseline_table"].startswith("eval_meta_data.csv") and last["bundle"] == str(bundle)
    beside = json.loads((run / "checkpoints/step_00000012/metrics.json").read_text())
    assert beside["core_metric"] == last["core_metric"] and "val_bpb" in beside
    assert "colours" in (run / "report.md").read_text() and "colours" in (run / "report.html").read_text()
    assert "core_metric" in (run.parent / "out").read_text()


def test_without_a_bundle_the_start_says_so_once_and_no_figure_is_made_up(tmp_path, tiny):
    done = picotrain("train", *tiny(tmp_path / "run", "train.max_steps=2"))
    assert (done.stdout + done.stderr).count("CORE will not be evaluated") == 1
    assert lines(tmp_path / "run", "core") == []
    assert "not evaluated" in (tmp_path / "run" / "report.md").read_text()


def test_a_bundle_that_is_not_there_ends_the_start_before_anything_is_trained(tmp_path, tiny):
    done = picotrain("train", *tiny(tmp_path / "run", f"evaluation.core.bundle={tmp_path / 'nowhere'}"))
    assert done.returncode == 2 and "nowhere" in done.stderr and "Traceback" not in done.stderr
    url = picotrain("train", *tiny(tmp_path / "run", "evaluation.core.bundle=https://example.org/bundle.zip"))
    assert url.returncode == 2 and "evaluation.core.sha256" in url.stderr


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_an_evaluation_that_raises_on_one_rank_costs_neither_run_nor_weights(tmp_path, tiny, bundle, nproc):
    code = f"""{ABORTS_AT_EXIT}
hidden = model.GPT.hidden
def breaking(method):
    def broken(self, *rest, **more):
        if not self.training and os.environ.get("RANK", "0") == "{nproc - 1}":
            raise ZeroDivisionError("in an evaluation")
        return method(self, *rest, **more)
    return broken
model.GPT.forward, model.GPT.hidden = breaking(forward), breaking(hidden)
"""
    straight, run = tmp_path / "straight", tmp_path / "run"
    words = (f"hardware.nproc_per_node={nproc}", "train.device_batch_size=4", "train.max_steps=6", "train.eval_every=3")
    words += ("train.core_metric_every=3", "train.sample_every=3", f"evaluation.core.bundle={bundle}")
    assert picotrain("train", *tiny(straight, *words)).returncode == 0
    done = picotrain("train", *tiny(run, *words), env=patched(tmp_path / "patch", code))
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(straight)
    failed = [event["message"] for event in lines(run, "event") if event["name"] == "evaluation_failed"]
    assert sum("bits per byte" in message for message in failed) == 3 and any("ZeroDivisionError" in message for message in failed)
    assert "evaluations failed" in done.stdout and "in broken" in done.stderr  # the summary, and where it was
    assert lines(run, "val") == [] and all(record["core_metric"] is None for record in lines(run, "core"))


def evaluate(run: Path, *words: str, ranks: int = 1, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    if ranks == 1:
        return picotrain("eval", str(run), *words)
    environment = (env or dict(os.environ)) | {"OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launcher, "-m", "picotrain", "eval", str(run), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def test_eval_writes_json_csv_markdown_and_predictions_and_agrees_with_the_run(run):
    done = evaluate(run)
    assert done.returncode == 0, done.stderr
    folder = run / "eval" / "step_00000012"
    results = json.loads((folder / "results.json").read_text())
    assert results["core"]["core_metric"] == pytest.approx(lines(run, "core")[-1]["core_metric"])
    with (folder / "core.csv").open() as file:
        table = {row["task"]: row for row in csv.DictReader(file)}
    assert set(table) == {"colours", "names", "ends", "torn", "CORE"} and "torn.jsonl" in table["torn"]["problem"]
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert sum(one["task"] == "colours" for one in predictions) == 12
    share = sum(one["correct"] for one in predictions if one["task"] == "names") / 8
    assert share == float(table["names"]["accuracy"]) == results["core"]["tasks"]["names"]["accuracy"]
    assert [sample["prompt"] for sample in results["samples"]][-1] == ""  # one from nothing
    assert "colours" in done.stdout and (folder / "results.md").read_text() in done.stdout


def test_an_interrupted_eval_goes_on_with_the_tasks_that_are_missing_and_other_settings_begin_anew(run):
    tasks = run / "eval" / "step_00000012" / "tasks"
    assert evaluate(run).returncode == 0
    kept = {file.name: file.stat().st_mtime_ns for file in tasks.iterdir()}
    (tasks / "names.json").unlink()
    assert evaluate(run).returncode == 0
    again = {file.name: file.stat().st_mtime_ns for file in tasks.iterdir()}
    assert {name for name in kept if kept[name] != again[name]} == {"names.json"}
    assert evaluate(run, "--max-per-task", "4").returncode == 0
    assert json.loads((tasks.parent / "results.json").read_text())["core"]["tasks"]["colours"]["n"] == 4


def test_two_ranks_find_what_one_finds_and_say_a_mistake_once(run, tmp_path):
    assert evaluate(run, "--max-per-task", "7").returncode == 0
    folder = run / "eval" / "step_00000012"
    alone = json.loads((folder / "results.json").read_text()), (folder / "predictions.jsonl").read_text()
    for file in (folder / "tasks").iterdir():
        file.unlink()
    environment = patched(tmp_path / "patch", ABORTS_AT_EXIT + TELLS_ITS_THREADS)
    done = evaluate(run, "--max-per-task", "7", ranks=2, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"threads of a rank: {max(1, hardware.cores() // 2)}\n") == 2, "ranks share the cores"
    both = json.loads((folder / "results.json").read_text()), (folder / "predictions.jsonl").read_text()
    assert both[1] == alone[1] and both[0]["core"] == alone[0]["core"]
    assert both[0]["bpb"]["val"] == pytest.approx(alone[0]["bpb"]["val"], rel=1e-6) and both[0]["samples"] == alone[0]["samples"]
    wrong = evaluate(run, "--bundle", str(tmp_path), ranks=2, env=environment)
    assert wrong.returncode != 0 and wrong.stderr.count("picotrain: ") == 1 and "core.yaml" in wrong.stderr, wrong.stderr


def test_a_hugging_face_model_is_measured_on_the_runs_documents_and_bundle(run, gpt2):  # noqa: F811
    done = picotrain("eval", str(run), "--hf", str(gpt2), "--max-per-task", "5")
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "eval" / f"hf-{gpt2.name}" / "results.json").read_text())
    assert results["core"]["tasks"]["ends"]["n"] == 5 and results["window"] <= 32 and results["bpb"]["val"] > 1
    assert "Whole documents" in done.stdout
    some = picotrain("eval", str(run), "--hf", str(gpt2), "--max-per-task", "5", "--tokens", "500")
    bounded = json.loads((run / "eval" / f"hf-{gpt2.name}-tokens-500" / "results.json").read_text())
    assert some.returncode == 0 and 500 <= bounded["tokens"]["val"] < results["tokens"]["val"]
    nowhere = picotrain("eval", str(run), "--hf", str(run))
    assert nowhere.returncode == 2 and "no Hugging Face model" in nowhere.stderr


def test_all_that_an_evaluation_lacks_is_said_before_anything_is_measured(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    (other / "eval").write_text("a file where the folder would be")
    data = json.loads((other / "data.json").read_text())
    data["corpus"]["root"] = str(tmp_path / "gone")
    (other / "data.json").write_text(json.dumps(data))
    weights = next(other.glob("checkpoints/step_00000012/model-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (tmp_path / "empty").mkdir()
    done = evaluate(other, "--bundle", str(tmp_path / "empty"), "--baseline-table", "table.csv")
    assert done.returncode == 2 and "5 problems" in done.stderr and "Traceback" not in done.stderr, done.stderr
    for part in ("is damaged", "empty/core.yaml", "empty/table.csv", "gone/shard_00002", "gone/shard_00000", "eval is no folder"):
        assert part in done.stderr
    assert not done.stdout and (other / "eval").is_file()


def test_a_part_that_fails_costs_no_other_one_and_the_results_say_what_is_missing(run, tmp_path):
    code = """
import sys
from picotrain.cli import main
from picotrain import sampling, ticker
from picotrain.cli import evaluate
def broken(*_, **__): raise ZeroDivisionError("in the middle")
setattr(sampling, "complete", broken)
setattr(evaluate, "core_results", broken)
ticker.EVERY_S = 0.01
main()
"""
    other = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    done = subprocess.run([sys.executable, "-c", code, "eval", str(other)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    results = json.loads((other / "eval/step_00000012/results.json").read_text())
    assert results["bpb"]["val"] > 0 and results["bpb"]["train"] > 0 and results["core"] is None
    assert set(results["missing"]) == {"CORE", "samples"} and "ZeroDivisionError" in results["missing"]["CORE"]
    assert "not complete" in done.stderr and "CORE: ZeroDivisionError: in the middle" in done.stderr and "results.json" in done.stderr
    assert "bits per byte, validation: " in done.stderr  # no terminal: lines
    assert "Not measured" in (other / "eval/step_00000012/results.md").read_text()


def test_an_evaluation_of_some_tokens_stands_beside_that_of_all(run):
    folder = run / "eval" / "step_00000012"
    done = evaluate(run, "--max-per-task", "3")
    assert done.returncode == 0, done.stderr
    whole = json.loads((folder / "results.json").read_text())
    assert str(folder / "results.json") in done.stderr and str(folder / "core.csv") in done.stderr  # it names what it wrote
    done = evaluate(run, "--max-per-task", "3", "--tokens", "320")
    assert done.returncode == 0, done.stderr
    bounded = json.loads((run / "eval" / "step_00000012-tokens-320" / "results.json").read_text())
    assert json.loads((folder / "results.json").read_text()) == whole and whole["only_tokens"] is None
    assert bounded["only_tokens"] == 320 and bounded["core"] == whole["core"]
    assert all(200 < bounded["tokens"][split] <= 320 < whole["tokens"][split] for split in ("val", "train"))
    assert "first 320 tokens" in done.stdout
    assert [results["step"] for results in read_run(run).evals] == sorted({results["step"] for results in read_run(run).evals})


def test_compare_takes_over_what_eval_has_measured(run):
    assert picotrain("eval", str(run), "--checkpoint", "6", "--max-per-task", "7").returncode == 0
    assert picotrain("eval", str(run), "--max-per-task", "7").returncode == 0
    files = sorted((run / "eval").glob("step_*/tasks/*.json"))
    before = [file.stat().st_mtime_ns for file in files]
    done = picotrain("compare", f"{run}@6", str(run), "--max-per-task", "7", "--documents", "20")
    assert done.returncode == 0, done.stderr
    assert len(files) == 6 and [file.stat().st_mtime_ns for file in files] == before
    assert "colours" in done.stdout
