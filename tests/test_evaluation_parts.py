"""Evaluations of other packages: measured at their own cadence, on rows of the validation text, at no cost to the training."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from conftest import lines, losses, picotrain

from picotrain import checkpoint
from picotrain.contracts import EVALUATED_ROWS

MODULE = """
import torch
from picotrain.contracts import Evaluation

class Probe(Evaluation):
    kind: str = "probe"
    factor: float = 1.0

    def measure(self, model, rows, parallel):
        torch.rand(100)  # must change nothing of the training
        loss = model(rows[:, :-1], rows[:, 1:])
        return {"loss": loss * self.factor, "rows": len(rows), "ids": rows.shape[1], "training": model.training or loss.requires_grad}

class Asking(Evaluation):
    kind: str = "asking"
    threshold: float

class Broken(Evaluation):
    kind: str = "broken"

    def measure(self, model, rows, parallel):
        model.train()
        raise ValueError("no such circuit")

class Named(Evaluation):
    kind: str = "val"
"""
ENTRIES = "[picotrain.evaluations]\nprobe = probes:Probe\nasking = probes:Asking\nbroken = probes:Broken\nval = probes:Named\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which a package with evaluations is installed."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "probes.py").write_text(MODULE)
    (info := folder / "probes-1.0.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: probes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def test_an_evaluation_of_a_package_is_measured_at_its_cadence_and_at_the_end_and_changes_no_loss(tmp_path: Path, tiny, site):
    plain, run = tmp_path / "plain", tmp_path / "run"
    more = ("train.max_steps=5", "train.eval_every=0", "train.save_every=4", "train.eval_tokens=32768")
    assert picotrain("train", *tiny(plain, *more)).returncode == 0
    parts = ("evaluation.probe.every=2", "evaluation.probe.factor=2", "evaluation.broken.every=4", "train.sample_every=5")
    done = picotrain("train", *tiny(run, *more, *parts), env=site)
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(plain)

    found = lines(run, "probe")
    assert [line["step"] for line in found] == [2, 4, 5]
    assert all((line["rows"], line["ids"], line["training"]) == (EVALUATED_ROWS, 33, 0) for line in found)
    assert 0 < found[-1]["loss"] < found[0]["loss"]
    assert done.stdout.count("probe  loss ") == 3
    assert checkpoint.read_metrics(run / "checkpoints" / "step_00000004")["probe"]["loss"] == found[1]["loss"]
    kinds = [line["kind"] for line in lines(run) if line["step"] == 5]
    assert kinds.index("probe") < kinds.index("sample")

    failed = [event for event in lines(run, "event") if event["name"] == "evaluation_failed"]
    assert [event["step"] for event in failed] == [4, 5] and all("broken: ValueError: no such circuit" in e["message"] for e in failed)
    assert (run / "report.md").exists()

    again = picotrain("resume", str(run), "train.max_steps=6", "evaluation.probe.every=6", env=site)
    assert again.returncode == 0, again.stderr
    assert [line["step"] for line in lines(run, "probe")] == [2, 4, 6]  # what followed the last save is measured anew


@pytest.mark.slow
def test_config_and_plan_take_its_keys_and_name_what_is_wrong_with_them(tmp_path: Path, tiny, site):
    words = tiny(tmp_path / "run", "evaluation.probe.every=100")
    shown = picotrain("config", *words, env=site)
    assert yaml.safe_load(shown.stdout)["evaluation"]["probe"] == {"kind": "probe", "every": 100, "factor": 1.0}, shown.stderr
    assert json.loads(picotrain("plan", "--json", *words, env=site).stdout)["num_steps"] == 12
    wrong = {"probe.evry=1": "evaluation.probe.every", "val.every=1": "metrics.jsonl", "asking.every=1": "evaluation.asking.threshold"}
    for word, told in wrong.items():
        refused = picotrain("plan", *tiny(tmp_path / "run", f"evaluation.{word}"), env=site)
        assert refused.returncode == 2 and told in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
    absent = picotrain("plan", *words)
    assert absent.returncode == 2 and "evaluation.probe.every" in absent.stderr
