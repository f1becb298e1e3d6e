"""Evaluation bundles: read without trust, a task at a time; fetched by hash, unpacked without leaving the folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Fault, FileServer

from picotrain.errors import DataError
from picotrain.evaluation import fetch as fetching
from picotrain.evaluation.bundle import LanguageModeling, MultipleChoice, Schema, read_bundle, read_examples
from picotrain.evaluation.fetch import fetch, unpack

SHARED = Path(__file__).parents[2] / "shared" / "data" / "eval_bundle"

TASKS = """
icl_tasks:
- {label: choice, dataset_uri: a/choice.jsonl, num_fewshot: [2], icl_task_type: multiple_choice, continuation_delimiter: "\\nAnswer: "}
- {label: pairs, dataset_uri: a/pairs.jsonl, num_fewshot: [0], icl_task_type: schema}
- {label: words, dataset_uri: words.jsonl, num_fewshot: [1], icl_task_type: language_modeling, has_categories: true}
"""
TABLE = 'Eval Task,Task Category,Random baseline\nchoice,x,25\npairs,x,50\nwords,"x, y",0\nother,x,\n'
EXAMPLES = {
    "a/choice.jsonl": [{"query": "q", "choices": ["a", "b"], "gold": 1, "extra": [1]}],
    "a/pairs.jsonl": [{"context_options": ["a", "b"], "continuation": "c", "gold": 0}],
    "words.jsonl": [{"context": "c ", "continuation": "d"}],
}


def write_bundle(folder: Path, tasks: str = TASKS, table: str = TABLE) -> Path:
    for name, examples in EXAMPLES.items():
        path = folder / "eval_data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    (folder / "core.yaml").write_text(tasks)
    (folder / "eval_meta_data.csv").write_text(table)
    return folder


def test_tasks_their_baselines_and_examples_are_read(tmp_path: Path):
    bundle = read_bundle(write_bundle(tmp_path))
    assert [(t.label, t.kind, t.num_fewshot, t.delimiter, t.baseline, t.problem) for t in bundle.tasks] == [
        ("choice", "multiple_choice", 2, "\nAnswer: ", 0.25, ""),
        ("pairs", "schema", 0, " ", 0.5, ""),
        ("words", "language_modeling", 1, " ", 0.0, ""),
    ]
    choice, pairs, words = (read_examples(task)[0] for task in bundle.tasks)
    assert isinstance(choice, MultipleChoice) and (choice.query, choice.options, choice.gold) == ("q", ["a", "b"], 1)
    assert isinstance(pairs, Schema) and (pairs.options, pairs.continuation) == (["a", "b"], "c")
    assert isinstance(words, LanguageModeling) and (words.context, words.continuation) == ("c ", "d")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared evaluation bundle is not here")
def test_the_real_bundle_is_whole_and_its_two_tables_are_known():
    bundle = read_bundle(SHARED)
    assert bundle.baseline_table == "eval_meta_data.csv (v1)"
    counts = {task.label: len(read_examples(task)) for task in bundle.tasks}
    assert len(counts) == 18 and sum(counts.values()) == 74111 + 10042  # hellaswag.jsonl serves two tasks
    newer = read_bundle(SHARED, "eval_meta_data_dclm_v2.csv")
    assert newer.baseline_table == "eval_meta_data_dclm_v2.csv (dclm_v2)"
    changed = {new.label: (old.baseline, round(new.baseline, 9)) for old, new in zip(bundle.tasks, newer.tasks, strict=True) if old != new}
    assert changed == {"commonsense_qa": (0.2, 0.403), "bigbench_language_identification": (0.091, 0.25)}


def test_a_table_of_ones_own_is_named_by_its_hash(tmp_path: Path):
    write_bundle(tmp_path)
    (tmp_path / "mine.csv").write_text(TABLE.replace("choice,x,25", "choice,x,20"))
    bundle = read_bundle(tmp_path, "mine.csv")
    digest = hashlib.sha256((tmp_path / "mine.csv").read_bytes()).hexdigest()
    assert bundle.baseline_table == f"mine.csv (sha256 {digest[:16]})"
    assert bundle.tasks[0].baseline == 0.2


@pytest.mark.parametrize("name", ["../mine.csv", "/etc/passwd", "", ".."])
def test_a_table_outside_the_bundle_is_refused(tmp_path: Path, name: str):
    with pytest.raises(DataError, match="must be the name of a file"):
        read_bundle(write_bundle(tmp_path), name)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"query": "q", "choices": ["a", "b"], "gold"', "EOF"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "gold=2, but there are 2 options"),
        ('{"query": "q", "choices": ["a", "b"], "gold": -1}', "gold"),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', "gold"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "choices"),
        ('{"query": 1, "choices": ["a", "b"], "gold": 0}', "query"),
        ('{"query": "\\ud800", "choices": ["a", "b"], "gold": 0}', "hex escape"),
        ('{"choices": ["a", "b"], "gold": 0}', "query"),
        ("[" * 100000, "recursion"),
        ("[]", "object"),
        ("\x00", "expected value"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path: Path, line: str, says: str):
    task = read_bundle(write_bundle(tmp_path)).tasks[0]
    with open(task.path, "a") as file:
        file.write("\n" + line)
    with pytest.raises(DataError) as error:
        read_examples(task)
    assert f"{task.path}, line 3: " in str(error.value) and says in str(error.value)


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path: Path):
    task = read_bundle(write_bundle(tmp_path)).tasks[2]
    task.path.write_bytes(b'{"context": "a", "continuation": "b"}\n{"context": "\xff", "continuation": "b"}\n')
    with pytest.raises(DataError, match="words.jsonl, line 2"):
        read_examples(task)


def test_a_task_without_examples_or_file_says_so(tmp_path: Path):
    choice, pairs, words = read_bundle(write_bundle(tmp_path)).tasks
    choice.path.write_text("\n\n")
    pairs.path.unlink()
    words.path.unlink()
    os.mkfifo(words.path)
    with pytest.raises(DataError, match="holds no examples"):
        read_examples(choice)
    with pytest.raises(DataError, match="No such file"):
        read_examples(pairs)
    with pytest.raises(DataError, match="cannot be read"):  # and does not wait for a writer
        read_examples(words)


@pytest.mark.parametrize(
    ("entry", "label", "says"),
    [
        ("{label: x, dataset_uri: words.jsonl, num_fewshot: [0], icl_task_type: question_answering}", "x", "unknown icl_task_type"),
        ("{label: words, dataset_uri: words.jsonl, num_fewshot: [0], icl_task_type: schema}", "words (task 4)", "there twice"),
        ("{label: x, dataset_uri: ../../secret, num_fewshot: [0], icl_task_type: schema}", "x", "leaves the folder"),
        ("{label: x, dataset_uri: /etc/passwd, num_fewshot: [0], icl_task_type: schema}", "x", "leaves the folder"),
        ("{label: x, dataset_uri: link.jsonl, num_fewshot: [0], icl_task_type: schema}", "x", "leaves the folder"),
        ("{label: x, dataset_uri: words.jsonl, num_fewshot: [0], icl_task_type: schema}", "x", "no row for it"),
        ("{label: other, dataset_uri: words.jsonl, num_fewshot: [0], icl_task_type: schema}", "other", "line 5"),
        ("{label: x, dataset_uri: words.jsonl, num_fewshot: [-1], icl_task_type: schema}", "x", "num_fewshot"),
        ("{label: x, dataset_uri: words.jsonl, num_fewshot: [], icl_task_type: schema}", "x", "num_fewshot"),
        ("{label: 3, dataset_uri: words.jsonl}", "task 4", "label"),
        ("nonsense", "task 4", "core.yaml, task 4"),
    ],
)
def test_a_bad_task_costs_itself_only(tmp_path: Path, entry: str, label: str, says: str):
    bundle_dir = write_bundle(tmp_path / "bundle", TASKS + f"- {entry}\n")
    (tmp_path / "secret").write_text("{}")
    (bundle_dir / "eval_data" / "link.jsonl").symlink_to(tmp_path / "secret")
    *good, bad = read_bundle(bundle_dir).tasks
    assert [task.problem for task in good] == ["", "", ""]
    assert bad.label == label and says in bad.problem
    with pytest.raises(DataError):
        read_examples(bad)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("core.yaml", None, "No such file"),
        ("core.yaml", b"icl_tasks: []", "no list icl_tasks"),
        ("core.yaml", b"icl_tasks: [", "line 1"),
        ("core.yaml", b"icl_tasks: !!python/object/apply:os.system [true]", "core.yaml"),
        ("core.yaml", b"\xff\xfe", "UTF-8"),
        ("core.yaml", b"a" * (2 << 20), "at most"),
        ("eval_meta_data.csv", None, "No such file"),
        ("eval_meta_data.csv", b"Eval Task,Other\nchoice,1\n", "Random baseline"),
        ("eval_meta_data.csv", b"", "Random baseline"),
    ],
)
def test_a_bundle_without_readable_tasks_or_baselines_is_refused(tmp_path: Path, name: str, content: bytes | None, says: str):
    write_bundle(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_bundle(tmp_path)


# --- by URL ----------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    (tmp_path / "www").mkdir()
    server = FileServer(tmp_path / "www")
    yield server
    server.close()


def zipped(folder: Path, archive: Path) -> str:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder.parent))
    return hashlib.sha256(archive.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["bundle.zip", "bundle.tar.gz"])
def test_a_bundle_is_fetched_once_and_read_from_the_cache(tmp_path: Path, server: FileServer, name: str):
    folder, archive = write_bundle(tmp_path / "eval_bundle"), server.root / name
    if name.endswith("zip"):
        zipped(folder, archive)
    else:
        with tarfile.open(archive, "w:gz") as file:
            file.add(folder, "eval_bundle")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    found = fetch(f"{server.url}/{name}", digest.upper(), tmp_path / "cache")
    assert [task.problem for task in read_bundle(found).tasks] == ["", "", ""]
    assert read_examples(read_bundle(found).tasks[0]) == read_examples(read_bundle(folder).tasks[0])
    assert fetch(f"{server.url}/{name}", digest, tmp_path / "cache") == found
    assert len(server.requests("GET", name)) == 1
    assert [path.name for path in (tmp_path / "cache" / "bundles").iterdir()] == [digest[:16]]


def test_a_broken_transfer_is_tried_again_and_another_file_is_refused(tmp_path: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("picotrain.data.remote.errors.FIRST_PAUSE_S", 0.01)
    digest = zipped(write_bundle(tmp_path / "eval_bundle"), server.root / "b.zip")
    server.faults["b.zip"].extend([Fault(status=503), Fault(after=100)])
    said: list[str] = []
    url = f"http://user:secret@{server.netloc}/data/corpus/b.zip?token=hidden"
    with pytest.raises(DataError, match="expected was") as error:
        fetch(url, "0" * 64, tmp_path / "cache", said.append)
    assert len(server.requests("GET", "b.zip")) == 3
    assert digest in str(error.value)
    assert not any(secret in text for secret in ("secret", "hidden") for text in (*said, str(error.value)))
    assert list((tmp_path / "cache" / "bundles").iterdir()) == []
    with pytest.raises(DataError, match="nothing at"):
        fetch(f"{server.url}/absent.zip", digest, tmp_path / "cache")
    with pytest.raises(DataError, match="64 hex digits"):
        fetch(url, "abc", tmp_path / "cache")


def test_what_is_no_bundle_leaves_nothing_behind(tmp_path: Path, server: FileServer):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    digest = zipped(tmp_path / "other", server.root / "o.zip")
    with pytest.raises(DataError, match="no core.yaml"):
        fetch(f"{server.url}/o.zip", digest, tmp_path / "cache")
    (server.root / "text").write_text("neither zip nor tar")
    with pytest.raises(DataError, match="damaged, or neither zip nor tar"):
        fetch(f"{server.url}/text", hashlib.sha256(b"neither zip nor tar").hexdigest(), tmp_path / "cache")
    assert list((tmp_path / "cache" / "bundles").iterdir()) == []


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for info, data in members:
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def tar_info(name: str, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/tmp/out", "a\\..\\out", "C:out"])
def test_members_that_leave_the_folder_are_refused(tmp_path: Path, name: str):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(name, "x")
    tar_of(tmp_path / "a.tar", (tar_info(name), b"x"))
    for archive in ("a.zip", "a.tar"):
        with pytest.raises(DataError, match="leaves its folder"):
            unpack(tmp_path / archive, tmp_path / f"{archive}.out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, kind: bytes):
    tar_of(tmp_path / "a.tar", (tar_info("link", kind, "/etc/passwd"), b""))
    with pytest.raises(DataError, match="a link or device"):
        unpack(tmp_path / "a.tar", tmp_path / "out")


def test_links_doubles_and_damage_in_a_zip_are_refused(tmp_path: Path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="a link or device"):
        unpack(tmp_path / "link.zip", tmp_path / "1")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("a", "x")
        file.writestr("a", "y")
    with pytest.raises(DataError, match="twice"):
        unpack(tmp_path / "twice.zip", tmp_path / "2")
    with zipfile.ZipFile(tmp_path / "good.zip", "w") as file:
        file.writestr("a", "x" * 1000)
    data = bytearray((tmp_path / "good.zip").read_bytes())
    data[100] ^= 1
    (tmp_path / "bad.zip").write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        unpack(tmp_path / "bad.zip", tmp_path / "3")


def test_a_bomb_is_refused_by_what_it_unpacks_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fetching, "MAX_UNPACKED_BYTES", 5 << 20)
    monkeypatch.setattr(fetching, "MAX_MEMBERS", 10)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name in "abc":
            file.writestr(name, b"\0" * (2 << 20))
    with pytest.raises(DataError, match="unpacks to more than"):
        unpack(tmp_path / "bomb.zip", tmp_path / "1")
    tar_of(tmp_path / "many.tar", *((tar_info(str(i)), b"") for i in range(11)))
    with pytest.raises(DataError, match="more than 10 members"):
        unpack(tmp_path / "many.tar", tmp_path / "2")
