"""One config for every command: what is decided, from what, and that it stands as `train` writes it."""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import lines, picotrain, sentence

from picotrain import hardware, planning, worker
from picotrain import run as runs
from picotrain.cli import main
from picotrain.config import Config, classify_change, compose, diff, dump, load
from picotrain.data import amounts, sources
from picotrain.data.mixture import Mixture
from picotrain.errors import ConfigError, PicotrainError
from picotrain.hardware import Machine
from picotrain.planning import repeats
from picotrain.tokenizer import load_tokenizer, train_tokenizer

GPUS = Machine("cuda", "NVIDIA H100 80GB HBM3", 8, 79 * 2**30, 9.0, True, 16)


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "detect", lambda: GPUS)
    monkeypatch.setattr("picotrain.parallel.unusable_gpus", lambda *gpu: ("", ""))


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "detect", hardware.cpu)


def resolved(*words: str, say: Callable[[str], None] = lambda text: None) -> Config:
    return runs.resolve(compose(words), say)


def prose(path: Path, n_bytes: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    text = " ".join(sentence(rng) for _ in range(n_bytes // 30))
    path.write_bytes(text.encode()[:n_bytes].decode(errors="ignore").encode())
    return path


# The same config everywhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["model=d2"],
        ["model=d2", "archive.url=there"],
        ["model=d20", "hardware=8xh100"],
        ["model=d2", "train.max_steps=5", "data.on_bad_shard=skip", "data.lanes=8"],
        ["data=climbmix", "train.target_tokens=1e9"],
        ["data=fineweb_edu", "data.num_shards=7"],
        ["data=mixture", "data.mixture=[{source: climbmix, weight: 3}, {source: pystdlib, at_end: stop}]"],
        ["cadence=smoke", "run.name=x"],
        ["experiment=speedrun"],
        ["experiment=cpu_d4", "model=d6"],
    ],
    ids=" ".join,
)
def test_config_prints_to_the_byte_what_train_writes(
    words, gpus, corpus_dir: Path, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Of train, only the work is left out: making the corpus, the processes."""
    corpus = Mixture.of(sources.scan(corpus_dir, "made-up"))
    train_tokenizer(["a few words"], 257, tmp_path / "tokenizer.json")
    material = corpus, load_tokenizer(tmp_path / "tokenizer.json")

    def gather(config, say):
        return runs.Material(config, planning.make(config, config.run.name), *material)

    monkeypatch.setattr(runs, "gather", gather)
    monkeypatch.setattr(worker, "run", lambda *args: 0)
    monkeypatch.setattr("picotrain.launch.agent.run_workers", lambda *args, **more: 0)

    def command(name: str) -> str:
        monkeypatch.setattr(sys, "argv", ["picotrain", name, *words])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert not ended.value.code, captured.err
        return captured.out

    printed = command("config")
    command("train")
    (written,) = (tmp_path / "runs").glob("*/config.yaml")
    assert written.read_text() == printed
    saved = load(written)
    assert dump(runs.resolve(saved)) == printed, "and what is resolved stays as it is"
    assert saved.data.kind != "auto" and saved.data.num_shards if saved.data.kind == "hub" else not saved.data.num_shards
    assert saved.train.save_every == (1000 if "archive.url=there" in words else compose(words).train.save_every)


def test_what_was_typed_beside_data_auto_stays(cpu):
    data = resolved(
        "model=d2", "train.max_steps=5", "data.on_bad_shard=skip", "data.cache_bytes=5", "data.num_shards=3", "data.lanes=2"
    ).data
    assert (data.kind, data.on_bad_shard, data.cache_bytes, data.lanes, data.num_shards) == ("pystdlib", "skip", 5, 2, None)


def test_data_auto_downloads_only_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch):
    long = ["model=d12"]
    for machine, name in ((GPUS, "climbmix"), (hardware.cpu(), "pystdlib")):
        monkeypatch.setattr(hardware, "detect", lambda machine=machine: machine)
        said: list[str] = []
        assert resolved(*long, say=said.append).data.name == name
        assert len(said) == 1 and f"data=auto is {name}" in said[0]
        warned = any("passes over the corpus" in note for note in runs.preview(resolved(*long)).notes)
        assert warned == (name == "pystdlib")


# Shards follow from the horizon --------------------------------------------------------------------------------


def test_the_shards_are_what_less_than_an_epoch_needs():
    for words in (
        ["model=d20"],
        ["experiment=speedrun"],
        ["train.max_steps=10"],
        ["train.target_tokens=2e10", "tokenizer.vocab_size=65536"],
    ):
        config = resolved("hardware=8xh100", "data=climbmix", *words)
        plan = runs.preview(config)
        assert plan.epochs is not None and plan.epochs < 1
        assert config.data.num_shards == 1 or plan.epochs > 0.6, "nor many times too many"
    assert resolved("data=climbmix", "train.target_tokens=1e13").data.num_shards == 6542, "all there are"
    assert resolved("data=climbmix", "train.num_train_epochs=2").data.num_shards == 6542
    assert resolved("data=climbmix", "model=d20", "data.num_shards=8").data.num_shards == 8


def test_a_source_of_a_mixture_gets_what_it_may_have_to_give():
    def shards(*entries: str) -> list[int | None]:
        mixture = resolved("model=d20", "data=mixture", f"data.mixture=[{', '.join(entries)}]").data.mixture
        return [entry.num_shards for entry in mixture]

    whole = resolved("model=d20", "data=climbmix").data.num_shards
    assert whole
    half = shards("{source: climbmix}", "{source: pystdlib}")
    assert half[0] == pytest.approx(whole / 2, abs=1) and half[1] is None
    assert shards("{source: climbmix}", "{source: pystdlib, at_end: stop}") == [whole, None], "alone, once the library was read"
    assert shards("{source: climbmix, num_shards: 5}", "{source: fineweb_edu, weight: 3}") == [5, pytest.approx(whole * 3 / 4, abs=1)]


@pytest.mark.parametrize(
    ("data", "more"),
    [
        (["data=climbmix"], []),
        (["data=mixture", "data.mixture=[{source: climbmix}, {source: pystdlib}]"], []),
        (["data=auto"], ["hardware.name=x"]),
    ],
    ids=["hub", "mixture", "auto"],
)
def test_a_longer_horizon_keeps_the_shards_of_the_run_that_is_there(data, more, gpus, tmp_path: Path):
    def words(steps: int, name: str = "x") -> list[str]:
        return ["model=d12", *data, *more, f"run.name={name}", f"train.max_steps={steps}"]

    first = resolved(*words(100))
    folder = Path(first.run.dir or "")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(first))
    longer = resolved(*words(100_000))
    assert {classify_change(key) for key, _, _ in diff(first, longer)} == {"announced"}
    assert resolved(*words(100_000, "y")).data != first.data, "a new run gets what it needs"
    if data == ["data=climbmix"]:
        assert resolved(*words(100_000), "data.num_shards=9").data.num_shards == 9, "what is typed is meant"


def test_a_data_set_of_ones_own_needs_a_number_or_a_figure():
    own = ["data=climbmix", "data.repo_id=me/mine", "data.shard_text_bytes=null"]
    with pytest.raises(ConfigError, match=r"data\.num_shards: must be given.*data\.shard_text_bytes"):
        compose(own)
    assert compose([*own, "data.num_shards=3"]).data.num_shards == 3
    small = resolved("data=climbmix", "data.repo_id=me/mine", "data.shard_text_bytes=1000000", "train.target_tokens=1e7").data.num_shards
    assert small and 40 < small < 60


# How much text there is, before it is prepared -----------------------------------------------------------------


def json_lines(path: Path) -> Path:
    rng = random.Random(1)
    path.write_text(
        "".join(json.dumps({"text": " ".join(sentence(rng) for _ in range(40))}, ensure_ascii=False) + "\n" for _ in range(300))
    )
    return path


def nested_parquet(path: Path) -> Path:
    (path / "inner").mkdir(parents=True)
    rng = random.Random(2)
    texts = [" ".join(sentence(rng) for _ in range(40)) for _ in range(300)]
    pq.write_table(pa.table({"text": texts}), path / "inner" / "a.parquet", compression="zstd", row_group_size=100, use_dictionary=False)
    return path


@pytest.mark.parametrize("kind", ["file", "folder", "lines", "parquet"])
def test_the_estimate_is_near_what_is_there_once_it_is_prepared(kind: str, tmp_path: Path, cache: Path):
    if kind == "file":
        path = prose(tmp_path / "one.txt", 3_000_000)
    elif kind == "folder":
        path = [prose(tmp_path / f"texts/{i}.md", 20_000 + 100 * i).parent for i in range(40)][-1]
    else:
        path = json_lines(tmp_path / "lines.jsonl") if kind == "lines" else nested_parquet(tmp_path / "tables")
    config = resolved("data=files", f"data.path={path}")
    (guess,) = amounts.estimate(config.data, cache)
    assert guess.estimated and guess.text_bytes
    corpus = sources.resolve(config.data, cache)
    assert guess.text_bytes == pytest.approx(corpus.text_bytes, rel=0.15)
    assert amounts.estimate(config.data, cache) == [amounts.Amount(config.data.name, corpus.text_bytes)]


def test_compressed_files_count_by_a_ratio_that_is_said(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(tmp_path / "b.jsonl").read_bytes()))
    plan = runs.preview(resolved("data=files", f"data.path={tmp_path / 'a.jsonl.gz'}"))
    assert plan.text_bytes == pytest.approx(4 * 0.95 * (tmp_path / "a.jsonl.gz").stat().st_size, rel=0.01)
    assert any("compressed" in note and "4 times" in note for note in plan.notes)


def test_epochs_as_a_horizon_have_steps_in_a_plan_that_are_called_an_estimate(tmp_path: Path):
    words = ["data=files", f"data.path={prose(tmp_path / 'one.txt', 2_000_000)}", "train.total_batch_size=8192", "train.num_train_epochs=3"]
    plan = runs.preview(resolved(*words))
    assert plan.num_steps == pytest.approx(3 * 0.95 * 2_000_000 / plan.bytes_per_token / 8192, rel=0.02)
    assert plan.text_estimate and any("number of steps are estimates" in note for note in plan.notes)
    assert runs.preview(resolved("data=climbmix", "train.num_train_epochs=0.5")).num_steps > 1000


# Too many passes -----------------------------------------------------------------------------------------------


def test_too_many_passes_are_warned_of_before_train_does_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = prose(tmp_path / "shakespeare.txt", 1_100_000)
    config = resolved(
        "model=d6", "hardware=cpu", "data=files", f"data.path={text}", "train.target_tokens=524288000", "train.total_batch_size=8192"
    )
    plan = runs.preview(config)
    (warning,) = repeats.warnings(plan)
    right = int(4 * plan.num_steps / (plan.epochs or 0))
    assert f"train.max_steps={right} " in warning and f"{right * 8192:,} tokens" in warning and "More text" in warning
    assert warning in plan.notes
    said: list[str] = []

    def gather(config, say):
        raise PicotrainError("as far as here")

    monkeypatch.setattr(runs, "gather", gather)
    with pytest.raises(PicotrainError, match="as far as here"):
        runs.open_run(config, [], said.append)
    assert said == [warning]
    enough = runs.preview(
        resolved("model=d6", "data=files", f"data.path={text}", "train.total_batch_size=8192", f"train.max_steps={right}")
    )
    assert not repeats.warnings(enough) and (enough.epochs or 0) > 3.9


def test_each_source_of_a_mixture_has_its_warning_and_one_that_leaves_has_none(tmp_path: Path):
    paths = [prose(tmp_path / f"{name}.txt", n) for name, n in (("small", 30_000), ("large", 3_000_000), ("leaves", 30_000))]
    entries = f"{{source: {paths[0]}}}, {{source: {paths[1]}, weight: 8}}, {{source: {paths[2]}, at_end: stop}}"
    plan = runs.preview(resolved("data=mixture", f"data.mixture=[{entries}]", "train.total_batch_size=8192", "train.target_tokens=2e6"))
    (warning,) = repeats.warnings(plan)
    assert "small.txt" in warning and "smaller weight" in warning
    assert plan.sources["leaves.txt"] == 1.0 and plan.sources["large.txt"] < 4 < plan.sources["small.txt"]
    read = {"small.txt": 0.95 * 3e4, "large.txt": 0.95 * 3e6, "leaves.txt": 0.95 * 3e4}
    assert sum(n * read[name] for name, n in plan.sources.items()) == pytest.approx(plan.total_tokens * plan.bytes_per_token, rel=0.01)


# The tokenizer that tokenizer.path names -----------------------------------------------------------------------


def test_plan_reads_the_tokenizer_and_measures_it_on_the_text(tmp_path: Path):
    text = prose(tmp_path / "one.txt", 400_000)
    train_tokenizer([text.read_text()], 400, tmp_path / "tokenizer.json")
    words = ["data=files", f"data.path={text}", "train.max_steps=3", f"tokenizer.path={tmp_path / 'tokenizer.json'}"]
    plan = runs.preview(resolved(*words, "tokenizer.vocab_size=400"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert plan.bytes_per_token == pytest.approx(400_000 / len(tokenizer.encode(text.read_text())), rel=0.02)
    assert not any("bytes per token is an estimate" in note for note in plan.notes)
    with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size: is 32,768, but .* has 400 tokens .*tokenizer\.vocab_size=400"):
        runs.preview(resolved(*words))
    for bad, content in (("none.json", None), ("bad.json", "{}")):
        if content:
            (tmp_path / bad).write_text(content)
        with pytest.raises(ConfigError, match=rf"tokenizer\.path: .*{bad}"):
            runs.preview(resolved(*words[:-1], f"tokenizer.path={tmp_path / bad}"))
    with pytest.raises(ConfigError) as caught:
        runs.open_run(resolved(*words, "train.total_batch_size=5000", "hardware=cpu"), [], print)
    assert {problem.path for problem in caught.value.problems} == {"tokenizer.vocab_size", "train.total_batch_size"}


# Licences ------------------------------------------------------------------------------------------------------


def test_whose_text_it_is_is_said_before_it_is_downloaded(monkeypatch: pytest.MonkeyPatch):
    config = resolved(
        "model=d2", "hardware=cpu", "data=mixture", "data.mixture=[{source: climbmix}, {source: fineweb_edu}, {source: pystdlib}]"
    )
    licences = runs.preview(config).licences
    assert "CC BY-NC 4.0" in licences["climbmix"] and "ODC-By" in licences["fineweb_edu"] and "PSF" in licences["pystdlib"]
    said: list[str] = []

    def gather(data, cache, say):
        raise PicotrainError("as far as here")

    monkeypatch.setattr(sources, "gather", gather)
    with pytest.raises(PicotrainError, match="as far as here"):
        runs.open_run(config, [], said.append)
    assert all(any(name in text and licence in text for text in said) for name, licence in licences.items())


# state.json ----------------------------------------------------------------------------------------------------


def test_loop_state_has_its_three_names_and_older_ones_are_read(tiny, tmp_path: Path):
    run_dir = tmp_path / "run"
    assert picotrain("train", *tiny(run_dir, "train.max_steps=4", "train.save_every=2", "train.eval_every=2")).returncode == 0
    for step in (2, 4):
        loop = json.loads((run_dir / f"checkpoints/step_{step:08d}/state.json").read_text())["loop_state"]
        last = lines(run_dir, "train")[step - 1]
        assert loop["smooth_train_loss"] == pytest.approx(last["smooth_loss"], rel=1e-12)
        assert loop["total_training_time"] == pytest.approx(last["total_training_time_s"], abs=1e-3)
    assert loop["min_val_bpb"] == min(line["val_bpb"] for line in lines(run_dir, "val")[:2])  # the last save comes before its validation

    from pydantic import TypeAdapter

    from picotrain.state import LoopState

    older = {"min_val_bpb": 1.5, "total_training_time_s": 7.5, "smoother": {"mean": 1.0, "count": 3}}
    read = TypeAdapter(LoopState).validate_python(older)
    assert (read.min_val_bpb, read.total_training_time, read.smooth_train_loss) == (1.5, 7.5, None)
