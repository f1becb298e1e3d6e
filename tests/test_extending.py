"""docs/extending.md: the package that the page builds, typed in as it stands there, installed, and trained with."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import picotrain
from safetensors import safe_open

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text("utf-8")
SMALL = "train.total_batch_size=256 train.eval_tokens=512 data.documents=200 hardware.threads=1 sampling.max_tokens=2 run.name=mine"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with the page's one in it."""
    root = tmp_path_factory.mktemp("extras")
    for name, text in re.findall(r"(?ms)^```\w+\n# (\S+)\n(.*?)^```", PAGE):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "picotrain_extras" / "__init__.py").touch()
    words = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(root / "site"), str(root)]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return root / "site"


def with_site(*words: str, cwd: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    return picotrain(*words, cwd=cwd, env=os.environ | ({"PYTHONPATH": str(site)} if site else {}))


def shown() -> list[str]:
    """The words of the page's `picotrain train`."""
    text = re.search(r"(?ms)^\$ picotrain (train .*?)^```", PAGE)
    assert text
    return shlex.split(text[1].replace("\\\n", " "))


@pytest.fixture(scope="module")
def run(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    done = with_site(*shown(), *SMALL.split(), cwd=folder, site=site)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "mine"


def lines(run: Path, kind: str) -> list[dict]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["kind"] == kind]


def test_the_pages_parts_train(run: Path):
    steps = lines(run, "train")
    assert [line["step"] for line in steps] == [0, 1, 2, 3]
    rates = [line["lr"] for line in steps]
    assert rates[1] / rates[0] == pytest.approx(2**-0.5), "the page's schedule"
    assert [line.split(",")[0] for line in (run / "losses.csv").read_text().splitlines()] == ["0", "1", "2", "3"], "its tracker"
    with safe_open(next((run / "checkpoints" / "step_00000004").glob("optimizer*.safetensors")), "pt") as tensors:
        kept = {name.partition(".")[0] for name in tensors.keys()}  # noqa: SIM118  a file, no dict
    assert kept == {"moment"}, "its optimizer"
    plan = json.loads((run / "plan.json").read_text())
    weights = sum(path.stat().st_size for path in (run / "checkpoints" / "step_00000004").glob("*.safetensors"))
    assert plan["checkpoint_bytes"] == pytest.approx(weights, rel=0.01), "what its sections say of sizes"
    assert "+" in lines(run, "sample")[-1]["samples"][0]["text"] or plan["text_bytes"] < 10**6, "its data"


def test_the_pages_evaluation_is_measured_at_its_cadence_and_at_the_end(run: Path):
    found = lines(run, "accuracy")
    assert [line["step"] for line in found] == [2, 4] and all(0 <= line["top1"] <= 1 for line in found)


def test_a_resume_finds_the_same_parts(run: Path, site: Path):
    words = ["resume", str(run), "train.max_steps=6"]
    done = with_site(*words, cwd=run.parent, site=site)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in lines(run, "train")] == list(range(6))


def test_without_the_package_each_part_is_named(run: Path):
    done = with_site("plan", *shown()[1:], cwd=run.parent)
    assert done.returncode == 2
    assert all(word in done.stderr for word in ("optimizer", "lion", "parallel_d2", "sums")), done.stderr
    again = with_site("resume", str(run), "train.max_steps=8", cwd=run.parent)
    assert again.returncode == 2 and "optimizer.kind" in again.stderr and "model.kind" in again.stderr, again.stderr


def test_a_part_that_cannot_be_used_is_said(tmp_path: Path):
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    entries = "[picotrain.optimizers]\nbroken = broken_part:Lion\nnone = json:JSONDecoder\n[picotrain.conf]\nabsent = not.there\n"
    (info / "entry_points.txt").write_text(entries)
    (tmp_path / "broken_part.py").write_text("import a_package_that_is_not_there\n")
    words = {"broken": "a_package_that_is_not_there", "none": "no Optimizer"}
    for kind, told in words.items():
        done = with_site("plan", "model=d2", "hardware=cpu", f"optimizer.kind={kind}", cwd=tmp_path, site=tmp_path)
        assert (done.returncode, done.stderr.count("problem")) == (2, 1) and told in done.stderr, done.stderr
