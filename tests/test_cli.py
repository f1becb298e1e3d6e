"""The command line: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from conftest import lines
from conftest import picotrain as in_a_process
from test_hardships import patched

from picotrain import __version__, checkout, hardware
from picotrain.cli import app, main, rehearsal
from picotrain.cli.about import KEYS, USUAL, group_choices
from picotrain.config import elsewhere
from picotrain.config.groups import GROUPS, choices
from picotrain.config.overrides import parse
from picotrain.tokenizer import train_tokenizer


class Result:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run the command in this process: the same `main`, without the seconds that importing torch takes."""

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["picotrain", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    done = in_a_process("train", *tiny(run_dir, "train.max_steps=6", "train.sample_every=6"))
    assert done.returncode == 0, done.stderr
    return run_dir


def refused(result: Result, *parts: str) -> None:
    """Exit code 2, one message with these parts, no traceback."""
    assert result.code == 2, result.out + result.err
    assert result.err.count("error:") == 1 and "Traceback" not in result.err
    for part in parts:
        assert part in result.err


def test_help_teaches_and_answers_at_once():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = in_a_process("--help")
        times.append(time.perf_counter() - started)
        assert done.returncode == 0
        assert all(
            name in done.stdout for name in ["train", "plan", "config", "resume", "eval", "sample", "report", "data", "tokenizer", "doctor"]
        )
    assert min(times) < 1.0  # 0.3 s on a quiet machine; the bound leaves room for a busy one


def test_help_and_plan_import_no_torch():
    for line in ("['picotrain', '--help']", "['picotrain', 'plan', 'model=d2', 'data=pystdlib']"):
        code = f"import sys; sys.argv = {line}\nfrom picotrain.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        code += "assert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def every_command() -> list[tuple[list[str], Any]]:
    """The words of each command, and the command itself."""
    root: Any = typer.main.get_command(app)
    found: list[tuple[list[str], Any]] = []
    for name, one in root.commands.items():
        inner = getattr(one, "commands", None)
        found += [([name, sub], each) for sub, each in inner.items()] if inner else [([name], one)]
    return [(words, one) for words, one in found if not one.hidden]


@pytest.mark.parametrize("columns", [60, 80])
def test_every_command_has_help_that_fits_and_shows_an_example(command, monkeypatch: pytest.MonkeyPatch, columns: int):
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in [[], ["data"], ["tokenizer"], *(words for words, _ in every_command())]:
        shown = command(*words, "--help").out
        assert "Usage: " in shown and "..." not in re.sub(r"\.\.\.(\]|$| *<|}| -)", "", shown, flags=re.M).partition("Commands:")[2]
        assert max(map(len, shown.splitlines())) <= columns, max(shown.splitlines(), key=len)
        assert "{" not in shown.partition("Options:")[0] and "list[" not in shown  # usage as people write it
        if words not in ([], ["data"], ["tokenizer"]):
            assert re.search(rf"Examples?:\n .*picotrain.* {words[-1]}", shown), shown


def test_the_list_of_commands_is_whole_and_a_wrapped_example_still_the_command(command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "60")
    shown = " ".join(command("--help").out.split())
    for words, one in every_command():
        if len(words) == 1:
            assert one.help.split("\n")[0].strip() in shown
    example = "picotrain compare runs/a runs/b@best --bundle eval_bundle --html ab.html"
    assert shlex.split(example) in [
        shlex.split(line) for line in command("compare", "--help").out.replace("\\\n", "").splitlines() if "@best " in line
    ]


def test_the_examples_of_the_help_are_words_that_the_commands_take(command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    tried = 0
    for words, _ in every_command():
        for line in re.findall(r"^    picotrain (.*)$", command(*words, "--help").out, flags=re.M):
            example = shlex.split(re.split(r" {2,}| [|>]", line)[0])
            at = 2 if example[0] in ("data", "tokenizer") else 1
            one = next(one for names, one in every_command() if names == example[:at])
            one.make_context("picotrain " + " ".join(example[:at]), example[at:])  # refuses what is no option, argument or key
            tried += 1
    assert tried > 25


def test_help_lists_the_groups_with_their_choices_and_keys_that_there_are(command):
    assert tuple(USUAL) == GROUPS
    for group in GROUPS:
        text = group_choices(group)
        listed = {f"{a}x{b}" for a, b in itertools.product(("1", "8"), ("a100", "h100", "h200"))} if "{" in text else set()
        listed |= {word for word in text.split() if "{" not in word}
        assert listed == set(choices(group))
    assert not parse([word.replace("~/texts", "x") for word in KEYS]).read().problems
    for words in ((), ("train",)):
        shown = command(*words, "--help").out
        assert "d32" in shown and "train.max_steps=500" in shown and "picotrain config" in shown


def test_the_version_comes_with_the_commit_of_a_checkout_and_a_run_keeps_it(command, trained: Path):
    shown = command("--version")
    state = checkout.state()
    assert shown.code == 0 and __version__ in shown.out and (state is None or state.commit[:12] in shown.out)
    kept = json.loads((trained / "environment.json").read_text())
    assert kept["picotrain"] == __version__ and kept["commit"] == (state and state.commit) and "dirty" in kept


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_the_commit_is_that_of_the_codes_own_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "package" / "checkout.py"
    file.parent.mkdir()
    shutil.copy(checkout.__file__, file)
    (tmp_path / "own.txt").write_text("somebody's")
    monkeypatch.setattr(checkout, "__file__", str(file))
    assert checkout.state() is None  # no repository
    git("init", "-q")
    git("add", "own.txt")
    git("commit", "-qm", "one")
    assert checkout.state() is None  # installed into somebody's checkout
    git("add", ".")
    git("commit", "-qm", "two")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as in a hook of another repository
    assert checkout.state() == (git("--git-dir", str(tmp_path / ".git"), "rev-parse", "HEAD"), False)
    file.write_text(file.read_text() + "#\n")
    assert checkout.state()[1]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout.state() is None  # no git


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "--max-steps", "100"], ["--max-steps 100", "train.max_steps=100"]),
        (["train", "--max_steps=100"], ["--max_steps=100", "right would be train.max_steps=100"]),
        (["plan", "--train.max-steps", "100"], ["train.max_steps=100"]),
        (["train", "--model", "d4"], ["right would be model=d4"]),
        (["train", "--model", "24"], ["right would be model=d24"]),
        (["train", "--seed", "1"], ["run.seed=1"]),
        (["train", "--lr", "1e-3"], ["optimizer.matrix_lr=1e-3"]),
        (["train", "--learning_rat=1"], ["optimizer.matrix_lr=1"]),
        (["train", "--batch-size", "8"], ["train.device_batch_size=8"]),
        (["train", "--device", "cpu"], ["hardware.device=cpu"]),
        (["train", "--resume"], ["picotrain resume RUN"]),
        (["train", "--bf16", "--no-compile"], ["train.precision=bf16", "hardware.compile=false", "2 problems"]),
        (["train", "--data", "~/texts"], ["data=files data.path=~/texts"]),
        (["train", "--frobnicate", "5"], ["--frobnicate 5", "picotrain config"]),
        (["train", "--confg", "a.yaml", "train.max_step=3"], ["--config a.yaml", "train.max_steps", "2 problems"]),
        (["train", "max_steps=100"], ["train.max_steps=100"]),
        (["train", "n_layer=12", "wandb_log=True"], ["model.depth=12", "logger.trackers=wandb", "2 problems"]),
        (["train", "--archive.ur", "s3://me:secret@host/x"], ["archive.url=s3://...@host/x"]),
        (["--max-steps", "5"], ["picotrain train train.max_steps=5"]),
        (["model=d4"], ["picotrain train model=d4"]),
        (["trian"], ["did you mean `picotrain train`?"]),
        (["trian", "--max-steps", "3"], ["did you mean `picotrain train`?"]),
        (["data", "shw"], ["did you mean `picotrain data show`?", "verify"]),
        (["eval", "--checkpont", "best"], ["--checkpoint best", "RUN: is missing", "picotrain eval RUN"]),
        (["report", "a", "b"], ["b: is one word too many"]),
        (["train", "--config"], ["--config: needs a value"]),
        (["sample", "a", "--max-tokens", "z", "--top-k", "-3", "--seed", "1.5"], ["max-tokens z", "of at least 1", "top-k -3", "seed 1.5"]),
        (["sample", "a", "--temperature", "hot"], ["--temperature hot: is not a number"]),
        (["data", "prepare", "a", "--min_chars", "x"], ["--min-chars x", "--out: is missing"]),
        (["compare"], ["MODEL: is missing", "picotrain compare MODEL..."]),
        (["completion", "tcsh"], ["bash, zsh, fish"]),
    ],
)
def test_a_wrong_command_line_is_answered_with_what_would_be_right(command, words: list[str], parts: list[str]):
    result = command(*words)
    refused(result, *parts)
    assert "Usage:" not in result.err and "secret" not in result.err and not result.out


def test_what_other_trainers_call_a_key_leads_to_words_that_can_be_typed():
    for name in elsewhere.NAMES:
        value = {"optim": "muon", "lr_scheduler": "cosine", "lr_scheduler_type": "cosine", "dtype": "bfloat16", "mixed_precision": "bf16"}
        words = elsewhere.exact(name, value.get(name, "8"))
        assert words and not parse(words.replace("TOKENS", "4096").split()).problems, name


def test_plan_prints_what_a_rented_node_would_do_without_it(command):
    result = command("plan", "model=d20", "hardware=8xh100")
    assert result.code == 0
    assert "8 x NVIDIA H100" in result.out and "1,048,576 tokens" in result.out and "$" in result.out


def test_plan_as_json_is_the_plan(command):
    plan = json.loads(command("plan", "--json", "model=d20", "hardware=8xh100").out)
    assert plan["dp_size"] == 8
    assert plan["total_batch_size"] == plan["device_batch_size"] * plan["seq_len"] * plan["dp_size"] * plan["grad_accum_steps"]


def test_config_prints_yaml_that_trains_the_same(command, tmp_path: Path):
    first = command("config", "model=d2", "data=pystdlib", "train.max_steps=5").out
    (tmp_path / "config.yaml").write_text(first)
    second = command("config", "--config", str(tmp_path / "config.yaml")).out
    without_run = [re.sub(r"(?s)^run:\n(  .*\n)+", "", text, flags=re.M) for text in (first, second)]
    assert without_run[0] == without_run[1]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model=d5"], ["model=d5", "d4", "d6"]),
        (["model=2"], ["model=2", "d2"]),
        (["model=null"], ["model=null"]),
        (["train.seqlen=5"], ["train.seqlen", "train.seq_len"]),
        (["+train.foo=5"], ["train.foo"]),
        (["train.seq_len=true"], ["train.seq_len"]),
        (["train.max_steps=0"], ["train.max_steps"]),
        (["train.max_steps=-3"], ["train.max_steps"]),
        (["train.max_steps=3", "train.num_train_epochs=1"], ["max_steps", "num_train_epochs"]),
        (["data=pystdlib", "train.total_batch_size=5000", "train.seq_len=512"], ["5,000", "4,608 or 5,120"]),
        (["model.width=300"], ["model.width", "320"]),
        (["hydra.run.dir=x"], ["hydra"]),
        (["model=d4,d6"], ["sweep"]),
        (["run.name=${oc.env:HOME}"], ["environment"]),
        (["data=files"], ["data.path"]),
        (["data=files", "data.path=/nowhere/at/all"], ["/nowhere/at/all"]),
    ],
)
def test_a_mistake_ends_in_one_message_before_anything_starts(command, tmp_path: Path, monkeypatch, overrides, parts):
    monkeypatch.chdir(tmp_path)
    refused(command("train", *overrides), *parts)
    assert not list(tmp_path.rglob("config.yaml"))


def test_all_mistakes_come_at_once(command):
    result = command("train", "model=d5", "train.seqlen=512", "train.max_steps=-1")
    refused(result, "3 problems", "model=d5", "train.seqlen", "train.max_steps")


def test_a_dp_size_that_does_not_divide_the_lanes_is_refused(command, tiny, tmp_path: Path):
    refused(command("train", *tiny(tmp_path / "run", "hardware.nproc_per_node=3", "train.total_batch_size=384")), "dp_size 3", "1, 2, 4")


def test_a_tokenizer_of_another_vocabulary_is_refused(command, tiny, tmp_path: Path, corpus_dir: Path):
    texts = pq.read_table(corpus_dir / "shard_00000.parquet").column("text").to_pylist()
    train_tokenizer(texts, 280, tmp_path / "tokenizer.json")
    refused(
        command("train", *tiny(tmp_path / "run", f"tokenizer.path={tmp_path / 'tokenizer.json'}")), "280", "300", "tokenizer.vocab_size=280"
    )


def test_a_corpus_without_a_full_row_is_refused(command, tiny, tmp_path: Path):
    (tmp_path / "small").mkdir()
    for shard in range(2):
        pq.write_table(pa.table({"text": ["a b c d"]}), tmp_path / f"small/shard_{shard}.parquet")
    refused(
        command("train", *tiny(tmp_path / "run", f"data.path={tmp_path / 'small'}", "tokenizer.vocab_size=257", "data.lanes=null")), "row"
    )


def test_a_folder_without_a_text_column_names_those_it_has(command, tiny, tmp_path: Path):
    (tmp_path / "other").mkdir()
    for shard in range(2):
        pq.write_table(pa.table({"content": ["a"], "id": [1]}), tmp_path / f"other/shard_{shard}.parquet")
    refused(command("train", *tiny(tmp_path / "run", f"data.path={tmp_path / 'other'}")), "text", "content, id")


def test_a_run_directory_of_another_experiment_is_refused_with_the_keys_that_differ(command, tiny, trained: Path):
    before = (trained / "config.yaml").read_bytes()
    refused(command("train", *tiny(trained, "run.seed=5", "train.seq_len=64")), "another experiment", "run.seed", "train.seq_len")
    assert (trained / "config.yaml").read_bytes() == before


def test_resume_never_refuses_a_run_that_is_there(command, tiny, trained: Path):
    refused(command("train", *tiny(trained, "run.resume=never")), "run.resume=never")


def test_a_folder_that_is_no_run_is_not_trained_into(command, tiny, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("precious")
    refused(command("train", *tiny(tmp_path)), "no run and not empty")
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_saved_config_with_interpolation_or_an_object_is_refused(command, trained: Path, tmp_path: Path):
    text = (trained / "config.yaml").read_text()
    for bad in ("seed: ${oc.env:HOME}", "seed: !!python/object/apply:os.system ['touch owned']"):
        (tmp_path / "config.yaml").write_text(re.sub(r"seed: \d+", lambda _, bad=bad: bad, text))
        refused(command("train", "--config", str(tmp_path / "config.yaml")))
    assert not Path("owned").exists()


@pytest.mark.parametrize("name", ["eval", "sample", "report", "resume"])
def test_a_folder_that_is_no_run_names_the_runs_that_may_be_meant(command, trained: Path, name: str, tmp_path: Path, monkeypatch):
    refused(command(name, str(trained.parent / "typo")), "holds no run", "trained")
    (tmp_path / "runs").symlink_to(trained.parent)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").touch()  # no run: it has no plan
    monkeypatch.chdir(tmp_path)
    for slip in (trained.name, "runs"):
        result = command(name, slip)
        refused(result, "holds no run", "trained")
        assert "conf" not in result.err.replace("config", "")


def test_sample_continues_a_prompt_and_the_same_seed_gives_the_same_text(command, trained: Path):
    first, again, other = (command("sample", str(trained), "the cat", "--seed", seed, "--max-tokens", "20") for seed in ("1", "1", "2"))
    assert first.code == 0
    assert first.out.startswith("the cat") and len(first.out) > len("the cat\n")
    assert first.out == again.out != other.out


def test_sample_of_a_checkpoint_that_is_not_there_names_those_that_are(command, trained: Path):
    refused(command("sample", str(trained), "x", "--checkpoint", "5"), "complete steps: 6")


def test_eval_measures_both_splits_and_writes_them_down(command, trained: Path):
    result = command("eval", str(trained), "--checkpoint", "best")
    assert result.code == 0
    written = json.loads((trained / "eval/step_00000006/results.json").read_text())
    last = lines(trained, "val")[-1]
    assert written["bpb"]["val"] == pytest.approx(last["val_bpb"], rel=0.05)  # the loop measures 2,048 tokens of the shard
    assert written["samples"][0]["prompt"] == "The capital of France is"
    assert f"{written['bpb']['train']:.4f}" in (trained / "eval/step_00000006/results.md").read_text()


def test_report_can_be_written_again(command, trained: Path):
    (trained / "report.md").unlink()
    assert command("report", str(trained)).code == 0
    assert "bits per byte" in (trained / "report.md").read_text()


def test_doctor_runs_two_steps_and_says_what_is_fine(command, tiny, tmp_path: Path):
    result = command("doctor", *tiny(tmp_path / "run"))
    assert result.code == 0, result.out
    assert "two steps" in result.out and "FAIL" not in result.out and hardware.waiting() in result.out
    assert not (tmp_path / "run").exists()


def test_doctor_trains_and_saves_by_as_many_processes_as_the_run_and_leaves_nothing(command, tiny, tmp_path: Path):
    left = tmp_path / ".picotrain-doctor-killed"  # by a doctor that was killed
    left.mkdir()
    nodes = ["launch.nnodes=2", "launch.rdzv_endpoint=node0:29400", f"archive.url={tmp_path / 'archive'}"]
    result = command("doctor", *tiny(tmp_path / "run", "hardware.nproc_per_node=2", *nodes))
    assert result.code == 0, result.out
    (line,) = [line for line in result.out.splitlines() if "two steps" in line]
    told = result.out[result.out.index(line) :]
    assert "2 processes" in told and "s a step" in told and "of memory a rank" in told and "a save of" in told
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_what_the_run_would_die_of_and_leaves_nothing(tiny, tmp_path: Path):
    small = "def small(self, ids, *rest, **more): raise RuntimeError('CUDA error: out of memory')\nmodel.GPT.forward = small\n"
    place = tmp_path / "runs"
    place.mkdir()
    words = tiny(place / "run", "train.device_batch_size=8")
    done = in_a_process("doctor", *words, env=patched(tmp_path / "patch", small))
    assert done.returncode == 2, done.stderr
    assert "FAIL" in done.stdout and "out of memory with micro-batches of 8 rows of 32 tokens" in done.stdout
    assert list(place.iterdir()) == []


def test_doctor_says_when_others_compute(command, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rehearsal, "two_steps", lambda material: ("not tried", None))
    for load, said in ((0.1, False), (50.0 * hardware.cores(), True)):
        monkeypatch.setattr(hardware, "load", lambda load=load: load)
        assert ("other processes compute" in command("doctor", *tiny(tmp_path / "run")).out) == said, load


def test_doctor_names_what_to_fix_and_ends_with_2(command, tiny, tmp_path: Path):
    result = command("doctor", *tiny(tmp_path / "run", "data.path=/nowhere"))
    assert result.code == 2
    assert "FAIL" in result.out and "/nowhere" in result.out


def test_doctor_verifies_the_checkpoints_of_a_run(command, trained: Path, tmp_path: Path):
    assert command("doctor", str(trained)).code == 0
    copy = shutil.copytree(trained, tmp_path / "copy")
    weights = next(copy.glob("checkpoints/step_*/model-*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    result = command("doctor", str(copy))
    assert result.code == 2 and "does not match its hash" in result.out


def test_data_show_and_tokenizer_train_tell_what_they_made(command, tiny, tmp_path: Path):
    assert "400 documents" in command("data", "show", *tiny(tmp_path / "x")).out
    made = json.loads(command("tokenizer", "train", *tiny(tmp_path / "x")).out)
    assert Path(made["path"]).is_file() and made["bytes_per_token"] > 1


def test_completion_scripts_come_from_the_command(command):
    assert "complete" in command("completion", "bash").out
    assert command("__complete", "--", "bash", "picotrain train model=d20", "d20").out == "d20 \n"


def test_a_relative_path_is_saved_as_an_absolute_one(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    assert f"path: {tmp_path / 'texts'}\n" in command("config", "data=files", "data.path=texts").out


def test_a_start_that_a_number_spoils_leaves_nothing_and_the_corrected_command_trains(tmp_path: Path, tiny):
    """Also with the largest seed there is."""
    run_dir = tmp_path / "run"
    for spoilt in ("train.target_flops=1e30", "run.seed=9223372036854775808", "train.max_steps=4611686018427387904"):
        done = in_a_process("train", *tiny(run_dir), "train.max_steps=null", spoilt)
        assert done.returncode == 2 and spoilt.partition("=")[0] in done.stderr and "Traceback" not in done.stderr
        assert not (run_dir / "config.yaml").exists()
    done = in_a_process("train", *tiny(run_dir, "train.max_steps=2", "train.sample_every=1", "run.seed=9223372036854775807"))
    assert done.returncode == 0, done.stderr
    assert len(lines(run_dir, "train")) == 2
