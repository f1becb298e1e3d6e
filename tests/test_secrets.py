"""What is secret stays out of everything a run writes or prints."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from conftest import picotrain

SECRETS = {
    "HF_TOKEN": "hf_plantedAAAAAAAAAAAAAAAAAAAAAAAA",
    "AWS_SECRET_ACCESS_KEY": "plantedBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBB",
    "AWS_SESSION_TOKEN": "plantedCCCCCCCCCCCCCCCCCCCCCCCC",
    "WANDB_API_KEY": "plantedDDDDDDDDDDDDDDDDDDDDDDDDDDDDDDDDDDDD",
    "OPENAI_API_KEY": "sk-plantedEEEEEEEEEEEEEEEEEEEEEEEE",
    "PIP_INDEX_URL": "https://user:plantedFFFFFFFFFFFF@pypi.example.org/simple",
    "HTTPS_PROXY": "http://user:plantedGGGGGGGGGGGG@proxy.example.org:3128",
}
PLANTED = re.compile(rb"planted([A-Z])\1{9}")
URL_SECRET = "plantedHHHHHHHHHHHH"


def found_in(folder: Path) -> list[str]:
    """Files and names below a folder that hold a planted secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if PLANTED.search(path.read_bytes()) or PLANTED.search(os.fsencode(path))]


def test_planted_secrets_are_in_no_file_of_a_run_and_in_no_output(tiny: Callable[..., list[str]], cache: Path, tmp_path: Path):
    environment = os.environ | SECRETS | {"HF_HOME": str(tmp_path / "hf")}
    own_cache, run_dir = tmp_path / "cache", tmp_path / "run"
    overrides = tiny(run_dir, "train.max_steps=2", "train.eval_every=1", "train.sample_every=1", "train.save_every=1")
    steps = [
        ("train", *overrides, f"run.cache_dir={own_cache}"),
        ("resume", str(run_dir), "train.max_steps=3"),
        ("report", str(run_dir)),
    ]
    for words in steps:
        done = picotrain(*words, env=environment)
        assert done.returncode == 0, done.stderr
        assert not PLANTED.search((done.stdout + done.stderr).encode())
    assert (run_dir / "attempts/0002").is_dir() and (run_dir / "report.md").is_file()
    assert found_in(run_dir) == found_in(own_cache) == []

    (run_dir / "plan.json").write_text("{")
    shutil.rmtree(own_cache)
    done = picotrain("resume", str(run_dir), env=environment)
    assert done.returncode == 2
    assert not PLANTED.search((done.stdout + done.stderr).encode())
    assert found_in(run_dir) == []


def test_a_secret_in_an_url_is_refused_and_not_repeated(tiny: Callable[..., list[str]], tmp_path: Path):
    run_dir = tmp_path / "run"
    for key in ("data.path", "tokenizer.path"):
        words = [word for word in tiny(run_dir) if not word.startswith(f"{key}=")]
        done = picotrain("train", *words, f"{key}=https://user:{URL_SECRET}@example.org/corpus")
        assert done.returncode == 2, key
        assert not PLANTED.search((done.stdout + done.stderr).encode()), key
        assert not run_dir.exists() or not found_in(run_dir), key
