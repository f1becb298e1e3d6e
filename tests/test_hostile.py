"""Hostile run directories: no code of theirs runs, nothing outside is written, nothing hangs, and the end is a message."""

from __future__ import annotations

import base64
import json
import os
import pickle
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from conftest import picotrain
from safetensors.torch import load_file, save_file

from picotrain import checkpoint, optim, report
from picotrain import run as runs
from picotrain.config import load as load_config
from picotrain.errors import CheckpointError, PicotrainError
from picotrain.metrics import MetricsFile, read_metrics
from picotrain.models.gpt.module import GPT
from picotrain.shape import Rates
from picotrain.state import TrainState

MODEL = "model-00001-of-00001.safetensors"
OPTIMIZER = "optimizer-00001-of-00001.safetensors"
Damage = Callable[[Path], object]


class Payload:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture(scope="module")
def healthy(tiny: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps of which two are done."""
    run_dir = tmp_path_factory.mktemp("healthy") / "run"
    done = picotrain("train", *tiny(run_dir, "train.max_steps=4", "train.eval_every=0", "train.save_every=2"))
    assert done.returncode == 0, done.stderr
    shutil.rmtree(run_dir / "checkpoints/step_00000004")
    (run_dir / "summary.json").unlink()
    return run_dir


@pytest.fixture
def run_dir(healthy: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy to do harm to. Afterwards: nothing new beside it, no canary, the secret as it was, no gigabytes in memory."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("keep me\n")
    copy = tmp_path / "run"
    shutil.copytree(healthy, copy)
    used_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(60)  # a read that waits for ever would wait through pytest-timeout's message, too
    yield copy
    signal.alarm(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "run"]
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("secret.txt", "keep me\n")]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used_kb < 400_000


def step(run_dir: Path) -> Path:
    return run_dir / "checkpoints/step_00000002"


def seal(folder: Path) -> None:
    """Make the manifest fit the files again, as an attacker would."""
    names = [path.name for path in sorted(folder.iterdir()) if path.name not in ("manifest.json", "metrics.json")]
    files = {n: {"bytes": (folder / n).stat().st_size, "xxh3_64": xxhash.xxh3_64((folder / n).read_bytes()).hexdigest()} for n in names}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def change(path: Path, *place: str, to: Any) -> None:
    """Put a value at a place of a JSON file."""
    tree = json.loads(path.read_text())
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = to
    path.write_text(json.dumps(tree))


def load_checkpoint(run_dir: Path) -> None:
    """What a resume does with a checkpoint."""
    material = runs.read_material(run_dir)
    model = GPT(material.config.model, material.plan.vocab_size, material.plan.seq_len, torch.float32)
    optimizer = optim.build(material.config.optimizer, model, Rates(0.1, 0.1, 0.1, 0.0))
    checkpoint.load(checkpoint.find(run_dir / "checkpoints", "last"), TrainState(model, optimizer))


def refused(action: Callable[[Path], object], run_dir: Path, *words: str) -> str:
    """Run a reader; it has to end in an error of ours, in one line that says these words."""
    with pytest.raises(PicotrainError) as caught:
        action(run_dir)
    message = str(caught.value)
    assert len(message) < 1000 and len(message.splitlines()) <= 2 + message.startswith("the config has"), message
    for word in words:
        assert word in message
    return message


def header(text: str, body: bytes = b"", claim: int | None = None) -> bytes:
    """A safetensors file with this header."""
    return struct.pack("<Q", len(text) if claim is None else claim) + text.encode() + body


# Checkpoints: tensors ----------------------------------------------------------------------------------------


def one(dtype: str, shape: list[int], offsets: list[int], body: bytes = bytes(64)) -> bytes:
    return header(json.dumps({"embed.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}), body)


OVERLAP = {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in ("embed.weight", "head.weight")}
TENSOR_FILES = {
    "empty": b"",
    "header of an exabyte": header("{}", claim=2**60),
    "header longer than the file": header("{}", claim=400),
    "header claims terabytes": one("F32", [2**40], [0, 2**42]),
    "shape that overflows": one("F32", [2**40, 2**40], [0, 64]),
    "offsets beyond the file": one("F32", [1000], [0, 4000]),
    "negative offsets": one("F32", [4], [-16, 0]),
    "offsets in the wrong order": one("F32", [4], [16, 0]),
    "overlapping tensors": header(json.dumps(OVERLAP), bytes(8)),
    "unknown type": one("PYOBJ", [4], [0, 16], bytes(16)),
    "type that torch lacks": one("F4", [32], [0, 16], bytes(16)),
    "header that is no JSON": header("{{{{", bytes(8)),
    "deeply nested header": header('{"a":' * 10_000 + "1" + "}" * 10_000),
    "header that is a list": header("[1, 2, 3]"),
}


@pytest.mark.parametrize("part", ["model", "optimizer"])
@pytest.mark.parametrize("content", TENSOR_FILES.values(), ids=TENSOR_FILES.keys())
def test_a_malformed_safetensors_file_is_refused(run_dir: Path, content: bytes, part: str):
    file = MODEL if part == "model" else OPTIMIZER
    (step(run_dir) / file).write_bytes(content)
    seal(step(run_dir))
    refused(load_checkpoint, run_dir, f"{part}.safetensors.index.json" if b'"F4"' in content else file)


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER, "state.json", "model.safetensors.index.json", "manifest.json", "../../plan.json",
                                  "../../data.json", "../../tokenizer.json", "../../config.yaml"])  # fmt: skip
def test_a_pickle_in_place_of_any_file_is_not_loaded(run_dir: Path, file: str):
    canary = run_dir / "canary"
    (step(run_dir) / file).resolve().write_bytes(pickle.dumps(Payload(canary)))
    if file != "manifest.json":
        seal(step(run_dir))
    refused(load_checkpoint, run_dir)
    assert not canary.exists()


def tensors(file: str, edit: Callable[[dict[str, torch.Tensor]], object], listed: bool = True) -> Damage:
    """Rewrite a safetensors file and, if `listed`, its index."""

    def damage(folder: Path) -> None:
        found = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
        edit(found)
        save_file(found, folder / file)
        if listed:
            change(folder / f"{file.split('-')[0]}.safetensors.index.json", "weight_map", to=dict.fromkeys(found, file))

    return damage


OTHER_TENSORS = {
    "another shape": (tensors(MODEL, lambda t: t.update({"embed.weight": torch.zeros(3, 3)})), "embed.weight has shape"),
    "another type": (tensors(MODEL, lambda t: t.update({"embed.weight": t["embed.weight"].to(torch.complex64)})), "complex64"),
    "one missing": (tensors(MODEL, lambda t: t.pop("embed.weight")), "embed.weight on one side"),
    "one too many": (tensors(MODEL, lambda t: t.update(extra=torch.zeros(1))), "extra on one side"),
    "one that the index lacks": (tensors(MODEL, lambda t: t.update(extra=torch.zeros(1)), listed=False), "does not list"),
    "moments of another shape": (tensors(OPTIMIZER, lambda t: t.update({"exp_avg.embed.weight": torch.zeros(2)})), "does not fit"),
    "moments that are integers": (tensors(OPTIMIZER, lambda t: t.update({"exp_avg.embed.weight": torch.zeros(2).long()})), "does not fit"),
    "a moment missing": (tensors(OPTIMIZER, lambda t: t.pop("exp_avg_sq.head.weight")), "exp_avg_sq on one side"),
    "a foreign moment": (
        tensors(OPTIMIZER, lambda t: t.update({"__class__.head.weight": torch.zeros_like(t["exp_avg.head.weight"])})),
        "__class__ on one side",
    ),
    "of no parameter": (tensors(OPTIMIZER, lambda t: t.update({"exp_avg.nothing": torch.zeros(1)})), "belongs to no parameter"),
}


@pytest.mark.parametrize(("damage", "words"), OTHER_TENSORS.values(), ids=OTHER_TENSORS.keys())
def test_tensors_that_are_not_the_models_are_refused_by_name(run_dir: Path, damage: Damage, words: str):
    damage(step(run_dir))
    seal(step(run_dir))
    refused(load_checkpoint, run_dir, words)


# Checkpoints: JSON -------------------------------------------------------------------------------------------

LANES = ("dataloader_state_dict", "lanes")
STATES: dict[str, tuple[tuple[str, ...], Any]] = {
    "step is text": (("step",), "2"),
    "step is negative": (("step",), -1),
    "step is huge": (("step",), 10**400),
    "step is a fraction": (("step",), 2.5),
    "lanes are a number": (LANES, 7),
    "a cursor is negative": (LANES, [[[-2, 0, 0, 0]]]),
    "a cursor is huge": (LANES, [[[10**30, 0, 0, 0]]]),
    "a cursor is short": (LANES, [[[1, 2]]]),
    "a cursor is text": (LANES, [[["0", 0, 0, 0]]]),
    "no lanes": (LANES, []),
    "lanes of different sources": (LANES, [[[0, 0, 0, 0]], []]),
    "no loader": (("dataloader_state_dict",), {}),
    "row is null": (("dataloader_state_dict", "row"), None),
    "lanes_count is huge": (("dataloader_state_dict", "lanes_count"), 2**62),
    "rng is no text": (("rng", "torch"), 5),
    "rng is not base64": (("rng", "torch"), "!!!"),
    "rng is too short": (("rng", "torch"), base64.b64encode(b"abc").decode()),
    "rng is nonsense": (("rng", "torch"), base64.b64encode(bytes([255] * 5056)).decode()),
    "no rng": (("rng",), []),
    "metrics_bytes is negative": (("metrics_bytes",), -5),
    "metrics_bytes is huge": (("metrics_bytes",), 2**70),
    "loop_state is a list": (("loop_state",), [1]),
    "loop_state has a stranger": (("loop_state", "__class__"), "os.system"),
    "smoother is text": (("loop_state", "smoother"), {"mean": "0"}),
    "time is NaN": (("loop_state", "total_training_time_s"), float("nan")),
    "time is infinite": (("loop_state", "total_training_time_s"), float("inf")),
}


@pytest.mark.parametrize(("place", "value"), STATES.values(), ids=STATES.keys())
def test_a_wrong_value_in_state_json_is_refused_with_its_place(run_dir: Path, place: tuple[str, ...], value: Any):
    file = step(run_dir) / "state.json"
    change(file, *place, to=value)
    seal(step(run_dir))
    message = refused(load_checkpoint, run_dir, "state.json")
    finite = not isinstance(value, float) or value == 2.5
    assert place[0] in message or not finite


def nested(levels: int = 10_000) -> str:
    return '{"a":' * levels + "[]" + "}" * levels


TEXTS = {"deeply nested": nested(), "nested lists": "[" * 100_000, "a list": "[1]", "null": "null", "text": '"x"', "nothing": "",
         "zeros": "\0" * 100, "long number":
         '{"step": ' + "9" * 10_000 + "}", "NaN": '{"step": NaN}', "a lone surrogate": '{"\ud800": 1}'}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("file", ["state.json", "manifest.json", "model.safetensors.index.json", "../../plan.json", "../../data.json",
                                  "../../tokenizer.json"])  # fmt: skip
def test_json_that_is_none_or_of_another_kind_is_refused(run_dir: Path, file: str, text: str):
    (step(run_dir) / file).resolve().write_bytes(text.encode(errors="surrogatepass"))
    if file != "manifest.json":
        seal(step(run_dir))
        refused(load_checkpoint, run_dir, Path(file).name)
    else:
        assert not checkpoint.is_whole(step(run_dir))
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            checkpoint.verify(step(run_dir))


ESCAPES = ["../../outside/secret.txt", "/etc/passwd", "..", ".", "", ".hidden", "a/b", "a\0b", "sub/../x", "../step_00000002/" + MODEL]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_leads_elsewhere_is_refused_in_the_index_and_in_the_manifest(run_dir: Path, name: str):
    folder = step(run_dir)
    change(folder / "model.safetensors.index.json", "weight_map", "embed.weight", to=name)
    seal(folder)
    refused(load_checkpoint, run_dir, "weight_map.embed.weight", "plain name of a file")
    shutil.copyfile(folder / "manifest.json", folder / "manifest.json.bak")
    change(folder / "manifest.json", "files", name, to={"bytes": 0, "xxh3_64": "0"})
    assert not checkpoint.is_whole(folder)
    with pytest.raises(CheckpointError, match="plain name of a file"):
        checkpoint.verify(folder)


MANIFESTS = {
    "no files": {},
    "empty files": {"files": {}},
    "a list": {"files": [MODEL]},
    "text": {"files": {MODEL: "x"}},
    "sizes as text": {"files": {MODEL: {"bytes": "1", "xxh3_64": "0"}}},
    "negative size": {"files": {MODEL: {"bytes": -1, "xxh3_64": "0"}}},
    "no hash": {"files": {MODEL: {"bytes": 1}}},
    "hash is null": {"files": {MODEL: {"bytes": 1, "xxh3_64": None}}},
}


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_manifest_of_another_kind_is_no_checkpoint(run_dir: Path, manifest: Any):
    (step(run_dir) / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.complete(run_dir / "checkpoints") == []
    said: list[str] = []
    assert checkpoint.newest(run_dir / "checkpoints", said.append) is None
    assert len(said) == 1 and "manifest.json" in said[0] and "files" in said[0]


def test_a_file_that_the_manifest_does_not_list_is_not_read(run_dir: Path):
    folder = step(run_dir)
    for file in (MODEL, "state.json", "model.safetensors.index.json"):
        files = json.loads((folder / "manifest.json").read_text())["files"]
        change(folder / "manifest.json", "files", to={name: entry for name, entry in files.items() if name != file})
        refused(load_checkpoint, run_dir, file, "manifest.json")
        seal(folder)
    load_checkpoint(run_dir)


# Things that are no files ------------------------------------------------------------------------------------

RUN_FILES = ["config.yaml", "plan.json", "data.json", "tokenizer.json", "metrics.jsonl", "checkpoints/latest", "checkpoints/best",
             f"checkpoints/step_00000002/{MODEL}", "checkpoints/step_00000002/state.json", "checkpoints/step_00000002/manifest.json",
             "checkpoints/step_00000002", "attempts", ".report.md.tmp"]  # fmt: skip


@pytest.mark.parametrize("file", RUN_FILES)
def test_a_symlink_out_of_the_run_is_refused_before_anything_is_written(run_dir: Path, file: str):
    path = run_dir / file
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(
        run_dir.parent / "outside" if file in ("attempts", "checkpoints/step_00000002") else run_dir.parent / "outside/secret.txt"
    )
    refused(runs.require_run, run_dir, str(path), "symlink")
    assert checkpoint.complete(run_dir / "checkpoints") == [] or not file.startswith("checkpoints/step")
    if file.startswith("checkpoints/step"):
        with pytest.raises(CheckpointError):
            checkpoint.verify(step(run_dir))
    if file == "metrics.jsonl":
        with pytest.raises(PicotrainError, match="metrics.jsonl"):
            MetricsFile(path)


@pytest.mark.parametrize("file", [file for file in RUN_FILES if "." in file or "latest" in file or "best" in file])
def test_a_fifo_in_place_of_a_file_makes_nobody_wait(run_dir: Path, file: str):
    path = run_dir / file
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    refused(load_checkpoint, run_dir)
    for read in (lambda: checkpoint.newest(run_dir / "checkpoints", lambda said: None),
                 lambda: checkpoint.find(run_dir / "checkpoints", "best"),
                 lambda: list(read_metrics(run_dir / "metrics.jsonl")),
                 lambda: MetricsFile(run_dir / "metrics.jsonl").close(),
                 lambda: report.read_run(run_dir),
                 lambda: load_config(run_dir / "config.yaml")):  # fmt: skip
        try:
            read()
        except PicotrainError as error:
            assert str(error)


@pytest.mark.parametrize(
    "text", ["../../outside\n", "/etc\n", "step_99999999\n", "\0\0", "\udcff\udcfe", "x" * 5000, "", "step_00000002/../.."]
)
def test_a_pointer_to_elsewhere_is_no_checkpoint(run_dir: Path, text: str):
    for name in ("latest", "best"):
        (run_dir / "checkpoints" / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match="no best"):
        checkpoint.find(run_dir / "checkpoints", "best")
    assert checkpoint.newest(run_dir / "checkpoints", pytest.fail) == step(run_dir)
    assert report.summarise(report.read_run(run_dir))["best_checkpoint"] is None


@pytest.mark.parametrize("name", ["step_x", "step_-0000001", "step_²", "step_" + "9" * 30, "step_", "step_00000003.tmp"])
def test_a_folder_with_an_odd_name_is_no_checkpoint(run_dir: Path, name: str):
    shutil.copytree(step(run_dir), run_dir / "checkpoints" / name)
    assert checkpoint.complete(run_dir / "checkpoints") == [step(run_dir)]
    assert len(report.read_run(run_dir).checkpoints) == 1


# config.yaml, plan.json, data.json, tokenizer.json -----------------------------------------------------------

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
CONFIGS: dict[str, Callable[[str], str]] = {
    "a python tag": lambda text: text + "evil: !!python/object/apply:os.system ['touch canary']\n",
    "a python name": lambda text: text.replace("kind: adamw", "kind: !!python/name:os.system"),
    "a python path as kind": lambda text: text.replace("kind: adamw", "kind: os.system"),
    "billion laughs": lambda text: LAUGHS + text,
    "an interpolation": lambda text: text.replace("log_every: 10", "log_every: ${oc.env:HOME}"),
    "an unknown key": lambda text: text.replace("optimizer:\n", "optimizer:\n  _target_: os.system\n"),
    "an unknown section": lambda text: text + "hydra:\n  run: {dir: /}\n",
    "no schema version": lambda text: text.replace("schema_version", "version"),
    "nested lists": lambda text: text + "x: " + "[" * 20_000,
    "two megabytes": lambda text: text + "# " + "x" * 2_000_000,
    "binary": lambda text: "\0\1\2",
    "many keys": lambda text: text + "".join(f"k{i}: 1\n" for i in range(3_000)),
}


@pytest.mark.parametrize("edit", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_that_is_more_than_data_is_refused(run_dir: Path, edit: Callable[[str], str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(run_dir.parent)  # where a command's canary would be seen
    file = run_dir / "config.yaml"
    changed = edit(file.read_text())
    assert changed != file.read_text()
    file.write_text(changed)
    with pytest.raises(PicotrainError):
        runs.read_material(run_dir)
    report.write_report(run_dir)  # which shows what can be shown
    assert (run_dir / "report.md").stat().st_size < 5_000_000


PLANS: dict[str, Any] = {"num_steps": -1, "lanes": 0, "vocab_size": 10**12, "seq_len": 10**9, "total_batch_size": 10**400,
                         "dp_size": "many",
                         "matrix_lr": float("nan"), "epochs": float("inf"), "parameters": {"total": -1}, "notes": [{}], "unit_bytes": -5,
                         "device": None, "stranger": 1, "grad_accum_steps": 0,
                         "bytes_per_token": 0.0}  # fmt: skip


@pytest.mark.parametrize("key", PLANS)
def test_a_plan_that_no_plan_can_be_is_refused_by_its_key(run_dir: Path, key: str):
    change(run_dir / "plan.json", key, to=PLANS[key])
    message = refused(runs.read_material, run_dir, "plan.json")
    assert key in message or "is no JSON" in message or "cannot be read" in message


NAMES = ["../outside/secret.txt", "/etc/passwd", "../run/shard.parquet", "/tmp/x.parquet", "..", "", "a/b.parquet", 5, None, "x\0.parquet"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["val", "shards"])
def test_a_shard_that_stands_elsewhere_is_refused(run_dir: Path, name: Any, which: str):
    change(
        run_dir / "data.json",
        "corpus",
        *(("val", "name") if which == "val" else ("shards",)),
        to=name if which == "val" else [{"name": name}],
    )
    refused(runs.read_material, run_dir, "data.json", which)


CORPORA: dict[str, Any] = {"shards": 5, "val": None, "root": 7, "remote": ["file:///", "all"], "name": [], "origin": "x",
                           "fingerprint": "f",
                           "sources": [{"weight": 0}]}  # fmt: skip


@pytest.mark.parametrize("key", CORPORA)
def test_a_corpus_of_other_types_is_refused_or_another_one(run_dir: Path, key: str):
    change(run_dir / "data.json", "corpus", key, to=CORPORA[key])
    if key == "fingerprint":  # a resume compares it with the corpus
        assert runs._read_data(run_dir)[1]["corpus"] == "f"
    else:
        refused(runs.read_material, run_dir, "data.json is damaged")


def added(**entry: Any) -> Callable[[dict[str, Any]], object]:
    return lambda tree: tree["added_tokens"].append({"content": "<|x|>", "special": True, **entry})


TOKENIZERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "an id of a trillion": added(id=10**12),
    "an id that is text": added(id="0"),
    "an id that is negative": added(id=-1),
    "no id": added(),
    "a token without text": added(id=300, content=None),
    "no specials": lambda tree: tree.update(added_tokens=[]),
    "specials of another kind": lambda tree: tree.update(added_tokens=["<|bos|>"]),
    "a vocabulary id of billions": lambda tree: tree["model"]["vocab"].update(zzz=4_000_000_000),
    "no vocabulary": lambda tree: tree["model"].update(vocab={}, merges=[]),
    "no model": lambda tree: tree.pop("model"),
}


@pytest.mark.parametrize("edit", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_a_tokenizer_that_claims_too_much_or_too_little_is_refused(run_dir: Path, edit: Callable[[dict[str, Any]], object]):
    file = run_dir / "tokenizer.json"
    tree = json.loads(file.read_text())
    edit(tree)
    file.write_text(json.dumps(tree))
    refused(runs.read_material, run_dir, "tokenizer.json")


# metrics.jsonl -----------------------------------------------------------------------------------------------

LINES = {
    "binary": bytes(range(256)) * 10 + b"\n",
    "zeros": b"\0" * 1000 + b"\n",
    "deeply nested": nested().encode() + b"\n",
    "50 MB": b'{"step": 1, "text": "' + b"x" * 50_000_000 + b'"}\n',
    "50 MB without an end": b"x" * 50_000_000,
    "NaN": b'{"step": NaN}\n',
    "a list": b"[]\n",
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES.keys())
def test_a_damaged_line_is_named_and_the_report_shows_what_came_before(run_dir: Path, line: bytes):
    file = run_dir / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + line + whole)
    count = len(whole.splitlines())
    refused(lambda _: list(read_metrics(file)), run_dir, f"line {count + 1} is damaged")
    assert report.write_report(run_dir)["steps_done"] == 4
    assert f"line {count + 1} is damaged" in (run_dir / "report.md").read_text()


def test_a_torn_last_line_is_passed_over(run_dir: Path):
    file = run_dir / "metrics.jsonl"
    records = list(read_metrics(file))
    file.write_bytes(file.read_bytes() + b'{"step": 9, "kin')
    assert list(read_metrics(file)) == records


# The commands ------------------------------------------------------------------------------------------------


def pickled(run_dir: Path) -> None:
    (step(run_dir) / MODEL).write_bytes(pickle.dumps(Payload(run_dir.parent / "canary")))
    seal(step(run_dir))


def linked(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "metrics.jsonl").symlink_to(run_dir.parent / "outside/secret.txt")


def tagged(run_dir: Path) -> None:
    with (run_dir / "config.yaml").open("a") as file:
        file.write(f"evil: !!python/object/apply:os.system ['touch {run_dir.parent}/canary']\n")


def impossible(run_dir: Path) -> None:
    change(run_dir / "plan.json", "total_batch_size", to=-256)


def elsewhere(run_dir: Path) -> None:
    change(run_dir / "data.json", "corpus", "val", "name", to="../../outside/x.parquet")


def piped(run_dir: Path) -> None:
    (step(run_dir) / "state.json").unlink()
    os.mkfifo(step(run_dir) / "state.json")


COMMANDS = [
    ("eval", pickled, "safetensors"),
    ("resume", linked, "symlink"),
    ("resume", tagged, "python/object"),
    ("resume", impossible, "plan.json"),
    ("sample", elsewhere, "data.json"),
    ("doctor", piped, "state.json"),
]


@pytest.mark.parametrize(("command", "damage", "word"), COMMANDS, ids=[f"{c}-{d.__name__}" for c, d, _ in COMMANDS])
def test_a_command_ends_with_code_2_and_one_message(run_dir: Path, command: str, damage: Damage, word: str):
    damage(run_dir)
    before = {path: path.lstat().st_mtime_ns for path in run_dir.rglob("*")}
    done = picotrain(command, str(run_dir))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert word in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) <= 3
    written = {path for path in run_dir.rglob("*") if before.get(path) != path.lstat().st_mtime_ns}
    assert {path.name for path in written} <= {".lock", run_dir.name}
