"""What looks like a URL is never taken for a path, wherever a config or a command line names a place."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import picotrain

from picotrain import run as runs
from picotrain.config import compose, places
from picotrain.errors import ConfigError

# What was typed, and what the message has to suggest.
WRONG = {
    "s4://bucket/x": "s3://bucket/x",
    "htps://host/x": "https://host/x",
    "aws://bucket/x": "s3://bucket/x",
    "gcp://bucket/x": "gs://bucket/x",
    "S3://bucket/x": "s3://bucket/x",
    "s3:/bucket/x": "s3://bucket/x",
    "s3:bucket/x": "s3://bucket/x",
    "s3//bucket/x": "s3://bucket/x",
    "http:/host/x": "http://host/x",
    "file:relative": "file:///",
    "file://relative": "file:///",
    "file:/root/x": "file:///root/x",
    "file://localhost/root/x": "file:///root/x",
    "file://": "file:///",
    "s3://": "s3://BUCKET",
    "s3:///x": "s3://BUCKET/x",
    "https:///x": "https://HOST/x",
    "me@host:folder/x": "sftp://me@host/folder/x",
    "host:/folder/x": "sftp://host/folder/x",
    "simplecache::s3://bucket/x": "s3://bucket/x",
    "zip://x": "folder",
    "nothing://x": "installed are",
}
RIGHT = [
    "s3://bucket/x",
    "gs://b",
    "hf://datasets/me/x",
    "file:///x",
    "memory://x",
    "sftp://host/x",
    "/x",
    "runs/x",
    "~/x",
    "a b",
    "2024:01",
    "",
]
RIGHT += ["./s3:x", "/mirror/http://x", "notes:12"]


@pytest.mark.parametrize(("text", "right"), WRONG.items())
def test_half_a_url_and_an_unknown_protocol_are_refused_with_the_nearest(
    text: str, right: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for use in ("read", "write"):
        found = places.flaw(text, use)
        assert found and right in found[1], found
    with pytest.raises(ConfigError) as error:
        compose([f"archive.url={text}", "data=files", f"data.path={text}", f"run.dir={text}", f"evaluation.core.bundle={text}"])
    assert {"archive.url", "data.path", "run.dir", "evaluation.core.bundle"} <= {problem.path for problem in error.value.problems}


def test_urls_and_paths_that_can_be_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [text for text in RIGHT if places.flaw(text, "read")] == []
    assert places.flaw("https://host/x", "read") is None and places.flaw("https://host/x", "write")
    (tmp_path / "s3:mine").mkdir()
    assert places.flaw("s3:mine", "local") is None  # it is there


def test_a_url_where_a_path_is_wanted_is_refused_with_all_else_and_without_its_password() -> None:
    words = ["run.dir=s3://b/x", "run.cache_dir=file:///x", "tokenizer.path=https://me:hunter2@h/x", "train.seqlen=3"]
    mixture = "data.mixture=[{source: pystdlib}, {source: 's4://b/x'}]"
    with pytest.raises(ConfigError) as error:
        compose([*words, "data=mixture", mixture])
    wanted = {"run.dir", "run.cache_dir", "tokenizer.path", "train.seqlen", "data.mixture[1].source"}
    assert {problem.path for problem in error.value.problems} == wanted
    assert "hunter2" not in str(error.value)


def test_a_cache_folder_in_the_environment_is_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICOTRAIN_CACHE", "s3://bucket/cache")
    with pytest.raises(ConfigError, match="PICOTRAIN_CACHE"):
        runs.resolve(compose(["model=d2"]))


COMMANDS = [
    ["train", "archive.url=s4://bucket/x"],
    ["resume", "s4://bucket/x"],
    ["resume", "s3:/bucket/x"],
    ["resume", "file:///nowhere/x", "run.dir=s3://bucket/x"],
    ["data", "inspect", "s3:bucket/x"],
    ["data", "verify", "S3://bucket/x"],
    ["data", "prepare", "texts", "--out", "s3://bucket/x"],
    ["eval", "s3://bucket/x"],
    ["compare", "s3://bucket/x", "s3:bucket/x"],
    ["doctor", "s3://bucket/x"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_no_command_makes_a_folder_of_a_url(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = picotrain(*words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "URL" in done.stderr or "protocol" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", [".", "runs", "runs/x", "runs/x/there", "link/x", "link", "file://{here}/runs/x/there", "{here}/link/x/a/b"]
)
def test_an_archive_and_its_run_do_not_lie_in_one_another(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to("runs")
    with pytest.raises(ConfigError, match="archive.url"):
        runs.resolve(compose(["model=d2", "data=pystdlib", "run.dir=runs/x", f"archive.url={url.format(here=tmp_path)}"]))
    runs.resolve(compose(["model=d2", "data=pystdlib", "run.dir=runs/x", "archive.url=runs/y"]))


def test_a_missing_package_is_a_problem_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_installed", lambda package: package != "gcsfs")
    tree = compose(["model=d2", "archive.url=gs://bucket/x", "data=files", "data.path=s3://bucket/y"]).model_dump()
    (problem,) = places.missing_packages(tree)
    assert problem.path == "archive.url" and problem.hint == "pip install gcsfs"
