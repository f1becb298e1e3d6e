"""Any file that is read back, changed anywhere: it is accepted and means the same, or it is refused in words. Never another exception."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from conftest import picotrain
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from picotrain import checkpoint, optim, report
from picotrain import run as runs
from picotrain.config import load as load_config
from picotrain.data.corpus import scan
from picotrain.errors import PicotrainError
from picotrain.metrics import MetricsFile, read_metrics
from picotrain.models.gpt.module import GPT
from picotrain.report.content import render
from picotrain.shape import Rates
from picotrain.state import TrainState

STEP = "checkpoints/step_00000002"
FILES = [
    "plan.json", "data.json", "metrics.jsonl", "environment.json", "summary.json", "overrides.txt", "config.yaml", f"{STEP}/state.json",
    f"{STEP}/manifest.json", f"{STEP}/metrics.json", f"{STEP}/model.safetensors.index.json", "checkpoints/latest", "checkpoints/best",
    "corpus/data.json", "corpus/origin.json",
]  # fmt: skip
JSON_FILES = [file for file in FILES if file.endswith(".json")]
FEW = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["../x", -1, 2**63, 10**400, "\ud800", "[]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def original(tiny: Callable[..., list[str]], corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, measured, with a small corpus beside its files."""
    run_dir = tmp_path_factory.mktemp("fuzz") / "run"
    done = picotrain("train", *tiny(run_dir, "train.max_steps=2", "train.eval_every=1", "train.sample_every=2", "train.save_every=2"))
    assert done.returncode == 0, done.stderr
    shutil.copytree(corpus_dir, run_dir / "corpus")
    scan(run_dir / "corpus", "corpus")
    shards = {path.name: {"bytes": path.stat().st_size, "xxh3": "0"} for path in (run_dir / "corpus").glob("*.parquet")}
    (run_dir / "corpus/origin.json").write_text(json.dumps({"name": "corpus", "documents": 3, "shards": shards}))
    return run_dir


@pytest.fixture(scope="module")
def run_dir(original: Path) -> Iterator[Path]:
    copy = original.with_name("copy")
    shutil.copytree(original, copy)
    yield copy


def model_of(run_dir: Path) -> TrainState:
    material = runs.read_material(run_dir)
    model = GPT(material.config.model, material.plan.vocab_size, material.plan.seq_len, torch.float32)
    return TrainState(model, optim.build(material.config.optimizer, model, Rates(0.1, 0.1, 0.1, 0.0)))


@pytest.fixture(scope="module")
def blank(original: Path) -> TrainState:
    return model_of(original)


def seal(folder: Path, file: str) -> None:
    """Make the manifest fit one changed file."""
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / file).read_bytes()
    manifest["files"][file] = {"bytes": len(data), "xxh3_64": xxhash.xxh3_64(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def readers_of(run_dir: Path, blank: TrainState, file: str) -> list[Callable[[], Any]]:
    """Everything that reads a file, but for the picture in the report, which is slow to draw."""
    root = run_dir / "checkpoints"

    def cut_metrics() -> None:
        metrics = MetricsFile(run_dir / "metrics.jsonl")
        metrics.truncate_to(0)
        metrics.close()

    def show() -> None:
        run = report.read_run(run_dir)
        summary = report.summarise(run)
        assert render(run, summary, {}) and json.dumps(summary)
        report.console_summary(summary, io.StringIO())

    if file.startswith("corpus/"):
        return [lambda: scan(run_dir / "corpus", "corpus")]
    if file.startswith("checkpoints/"):
        named = [lambda: checkpoint.newest(root, lambda said: None), lambda: checkpoint.find(root, "best")]
        return [*named, lambda: checkpoint.load(run_dir / STEP, blank), lambda: checkpoint.record_metrics(root, 2, {"val_bpb": 1.0}), show]
    own: dict[str, list[Callable[[], Any]]] = {
        "plan.json": [lambda: runs.read_plan(run_dir)],
        "data.json": [lambda: runs._read_data(run_dir)],
        "config.yaml": [lambda: load_config(run_dir / "config.yaml")],
        "summary.json": [lambda: runs.is_finished(run_dir, 2)],
        "metrics.jsonl": [lambda: list(read_metrics(run_dir / "metrics.jsonl")), show, cut_metrics],
    }
    return [*own.get(file, []), show]


def read(run_dir: Path, blank: TrainState, file: str) -> list[str]:
    """What the readers of a file refused, in words. Anything but a PicotrainError comes out as it is."""
    refused = []
    for reader in readers_of(run_dir, blank, file):
        try:
            reader()
        except PicotrainError as error:
            assert str(error)
            refused.append(str(error))
    return refused


def put_back(original: Path, run_dir: Path) -> None:
    """Undo whatever an example and the readers have changed."""
    for name in FILES:
        shutil.copyfile(original / name, run_dir / name)
    for kept in run_dir.glob("metrics.cut*"):
        kept.unlink()


def try_bytes(original: Path, run_dir: Path, blank: TrainState, file: str, data: bytes) -> list[str]:
    put_back(original, run_dir)
    (run_dir / file).write_bytes(data)
    folder, name = (run_dir / file).parent, Path(file).name
    if folder.name.startswith("step_") and name not in ("manifest.json", "metrics.json"):
        seal(folder, name)
    return read(run_dir, blank, file)


def places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is a value in a JSON tree."""
    yield place
    for key, inner in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(inner, (*place, key))


def with_value(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return tree


def test_the_readers_accept_what_is_whole(original: Path, run_dir: Path, blank: TrainState):
    put_back(original, run_dir)
    assert [refused for file in FILES for refused in read(run_dir, blank, file)] == []
    assert report.write_report(run_dir)["steps_done"] == 0  # the lines were cut off meanwhile


@pytest.mark.parametrize("file", JSON_FILES)
def test_any_value_in_place_of_any_value(original: Path, run_dir: Path, blank: TrainState, file: str):
    text = (original / file).read_text()
    there = list(places(json.loads(text)))

    @FEW
    @given(st.sampled_from(there), VALUES)
    def check(place: tuple[Any, ...], value: Any) -> None:
        try_bytes(original, run_dir, blank, file, json.dumps(with_value(json.loads(text), place, value)).encode())

    check()


def test_any_value_in_place_of_any_value_in_a_line_of_metrics(original: Path, run_dir: Path, blank: TrainState):
    records = list(read_metrics(original / "metrics.jsonl"))
    there = list(places(records))[1:]

    @settings(FEW, max_examples=60)
    @given(st.sampled_from(there), VALUES)
    def check(place: tuple[Any, ...], value: Any) -> None:
        changed = with_value(json.loads(json.dumps(records)), place, value)
        data = "".join(json.dumps(record) + "\n" for record in changed).encode()
        put_back(original, run_dir)
        (run_dir / "metrics.jsonl").write_bytes(data)
        read(run_dir, blank, "metrics.jsonl")

    check()


@pytest.mark.parametrize("file", FILES)
def test_a_file_cut_or_flipped_anywhere(original: Path, run_dir: Path, blank: TrainState, file: str):
    whole = (original / file).read_bytes()

    @settings(FEW, max_examples=12)
    @given(st.integers(0, len(whole)), st.lists(st.tuples(st.integers(0, max(0, len(whole) - 1)), st.integers(1, 255)), max_size=3))
    @example(0, [])
    @example(len(whole) - 1, [])
    def check(length: int, flips: list[tuple[int, int]]) -> None:
        data = bytearray(whole)
        for place, mask in flips:
            data[place] ^= mask
        try_bytes(original, run_dir, blank, file, bytes(data if flips else data[:length]))

    check()


@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=10), max_size=3), min_size=1, max_size=5), st.data())
@settings(FEW, max_examples=50)
def test_metrics_cut_anywhere_yield_exactly_the_whole_lines_before(tmp_path: Path, records: list[dict[str, Any]], data: st.DataObject):
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    file = MetricsFile(path)
    for record in records:
        file.write(record)
    file.close()
    whole = path.read_bytes()
    everything = list(read_metrics(path))
    length = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:length])
    assert list(read_metrics(path)) == everything[: whole[:length].count(b"\n")]
    MetricsFile(path).close()  # the next writer moves the torn line aside
    assert path.read_bytes() == whole[: whole[:length].rfind(b"\n") + 1]
