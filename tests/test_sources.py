"""Where corpora and tokenizers come from: the standard library, files, a stand-in for the Hub; made once, then known."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from picotrain.config.schema import DataConfig, TokenizerConfig
from picotrain.data import sources
from picotrain.data.amounts import pystdlib_text_bytes
from picotrain.data.corpus import Corpus, default_lanes, default_unit_bytes, sample_texts, units
from picotrain.data.hub import retries_said
from picotrain.data.sources import known, resolve
from picotrain.data.tokenizers import check_rows, known_tokenizer, obtain_tokenizer
from picotrain.errors import DataError, TokenizerError
from picotrain.tokenizer import load_tokenizer, train_tokenizer

SENTENCES = [f"Sentence {i} of the {word} says {i * i}." for i in range(100) for word in ("river", "café", "日本", "function")]


def shards(root: Path, count: int = 3, pattern: str = "shard_{:05d}.parquet") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pq.write_table(pa.table({"text": [f"{index}: {text}" for text in SENTENCES]}), root / pattern.format(index), row_group_size=50)
    return root


def files(path: Path, **more: Any) -> DataConfig:
    return DataConfig(kind="files", name="mine", path=str(path), **more)


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Corpus, list[str]]:
    """The cache, the corpus of this interpreter's library, and what was said while it was made."""
    cache, said = tmp_path_factory.mktemp("cache"), []
    data = DataConfig(kind="pystdlib", name="pystdlib")
    assert known(data, cache) is None
    return cache, resolve(data, cache, said.append), said


def test_the_standard_library_gives_every_lane_units(stdlib: tuple[Path, Corpus, list[str]]) -> None:
    cache, corpus, said = stdlib
    found = units(corpus.shards, default_unit_bytes(512))
    assert min(unit.text_bytes for unit in found) >= 1 << 20
    if pystdlib_text_bytes() > 25e6:  # some distributions leave the tests out
        assert default_lanes(len(found)) >= 16
    assert 0.9 < (corpus.text_bytes + corpus.val.text_bytes) / pystdlib_text_bytes() < 1.1
    assert corpus.root.parent == cache / "corpora"
    assert corpus.root.name.startswith(f"pystdlib-{sys.version_info.major}.{sys.version_info.minor}.")
    assert said[0].startswith("preparing pystdlib from")


def test_the_standard_library_is_all_there_and_nothing_installed(stdlib: tuple[Path, Corpus, list[str]]) -> None:
    corpus = stdlib[1]
    paths = [name for shard in (*corpus.shards, corpus.val) for name in pq.read_table(corpus.root / shard.name)["source"].to_pylist()]
    assert {"os.py", "json/decoder.py"} <= set(paths)
    assert len(paths) == len(set(paths))
    assert not any("site-packages" in path or "__pycache__" in path for path in paths)


def test_a_made_corpus_is_known_without_work(stdlib: tuple[Path, Corpus, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, corpus, _ = stdlib
    monkeypatch.setattr(sources, "identify", lambda files: pytest.fail("input was read"))
    data = DataConfig(kind="pystdlib", name="pystdlib")
    assert known(data, cache) == resolve(data, cache) == corpus


def test_a_folder_of_shards_is_used_as_it_is(tmp_path: Path) -> None:
    root = shards(tmp_path / "corpus")
    root.chmod(0o555)
    try:
        corpus = resolve(files(root), tmp_path / "cache")
        assert corpus.root == root
        assert (corpus.name, len(corpus.shards), corpus.val.name) == ("mine", 2, "shard_00002.parquet")
        assert len(list(root.iterdir())) == 3
        assert known(files(root), tmp_path / "cache") == corpus
        assert resolve(files(root, val_shard="shard_00000.parquet"), tmp_path / "cache").val.name == "shard_00000.parquet"
    finally:
        root.chmod(0o755)


def test_other_files_are_prepared_once_and_again_when_they_change(tmp_path: Path) -> None:
    text, cache = tmp_path / "text", tmp_path / "cache"
    text.mkdir()
    for index, sentence in enumerate(SENTENCES[:50]):
        (text / f"{index}.txt").write_text(sentence)
    assert known(files(text), cache) is None
    assert not cache.exists()
    first = resolve(files(text), cache)
    assert first.documents + first.val.rows == 50
    assert known(files(text), cache) == first
    os.utime(text / "0.txt", (1, 1))
    assert known(files(text), cache) is None
    assert resolve(files(text), cache) == first  # the same content
    (text / "0.txt").write_text("changed")
    second = resolve(files(text), cache)
    assert second.root != first.root
    assert first.val.rows  # a run may still read the old one
    assert (first.root / first.val.name).exists()


def test_a_glob_and_a_single_shard_are_prepared(tmp_path: Path) -> None:
    root, cache = shards(tmp_path / "corpus"), tmp_path / "cache"
    both = resolve(files(root / "shard_0000[01].parquet"), cache)
    assert both.documents + both.val.rows == 2 * len(SENTENCES)
    one = resolve(files(root / "shard_00000.parquet"), cache)
    assert one.documents + one.val.rows == len(SENTENCES)


def test_a_path_that_is_not_there_is_named_also_by_known(tmp_path: Path) -> None:
    for function in (resolve, known):
        with pytest.raises(DataError, match=r"there is no .*nowhere"):
            function(files(tmp_path / "nowhere"), tmp_path)


# --- tokenizers ----------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return resolve(files(shards(tmp_path / "corpus")), tmp_path / "cache")


def test_a_tokenizer_is_trained_once_on_the_training_split(corpus: Corpus, tmp_path: Path) -> None:
    section, cache, said = TokenizerConfig(vocab_size=400), tmp_path / "cache", []
    assert known_tokenizer(section, corpus, cache) is None
    path, meta = obtain_tokenizer(section, corpus, cache, said.append)
    assert said[0].startswith("training a tokenizer of 400 tokens on")
    train_tokenizer(sample_texts(corpus, section.train_bytes), 400, tmp_path / "same.json")
    assert path.read_bytes() == (tmp_path / "same.json").read_bytes()
    said.clear()
    assert obtain_tokenizer(section, corpus, cache, said.append) == (path, meta)
    assert known_tokenizer(section, corpus, cache) == meta
    assert said == []
    other = obtain_tokenizer(TokenizerConfig(vocab_size=401), corpus, cache)[0]
    assert other != path


def test_bytes_per_token_are_measured(corpus: Corpus, tmp_path: Path) -> None:
    path, meta = obtain_tokenizer(TokenizerConfig(vocab_size=400), corpus, tmp_path / "cache")
    texts = list(sample_texts(corpus, 10**9))
    tokenizer = load_tokenizer(path)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert meta["bytes_per_token"] == pytest.approx(sum(len(text.encode()) for text in texts) / tokens)
    assert meta["tokenizer"] == tokenizer.fingerprint


def test_a_given_tokenizer_is_used_and_its_vocabulary_checked(corpus: Corpus, tmp_path: Path) -> None:
    cache, given = tmp_path / "cache", tmp_path / "given" / "tokenizer.json"
    train_tokenizer(SENTENCES, 350, given)
    for path in (given, given.parent):
        assert obtain_tokenizer(TokenizerConfig(vocab_size=350, path=str(path)), corpus, cache)[0] == given
    with pytest.raises(TokenizerError, match=r"has 350 tokens and tokenizer\.vocab_size is 400; set tokenizer\.vocab_size=350"):
        obtain_tokenizer(TokenizerConfig(vocab_size=400, path=str(given)), corpus, cache)
    with pytest.raises(TokenizerError, match=r"no readable tokenizer .*missing\.json"):
        obtain_tokenizer(TokenizerConfig(path=str(tmp_path / "missing.json")), corpus, cache)


def test_a_vocabulary_that_the_text_cannot_fill_leaves_nothing_behind(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"set tokenizer\.vocab_size=\d+ or less"):
        obtain_tokenizer(TokenizerConfig(vocab_size=30_000), corpus, tmp_path / "cache")
    assert known_tokenizer(TokenizerConfig(vocab_size=30_000), corpus, tmp_path / "cache") is None
    assert not list((tmp_path / "cache" / "tokenizers").rglob("*.json"))


def test_text_for_a_row_on_both_sides_is_required(corpus: Corpus, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(obtain_tokenizer(TokenizerConfig(vocab_size=400), corpus, tmp_path / "cache")[0])
    check_rows(corpus, tokenizer, 128, 1 << 20)
    with pytest.raises(DataError, match="fills a row of 100001 tokens"):
        check_rows(corpus, tokenizer, 100_000, 1 << 20)
    pq.write_table(pa.table({"text": ["short"]}), corpus.root / "shard_00002.parquet")
    short = resolve(files(corpus.root), tmp_path / "cache")
    with pytest.raises(DataError, match=r"shard_00002\.parquet \(1 validation documents.*no row of 129 tokens"):
        check_rows(short, tokenizer, 128, 1 << 20)


# --- the Hub -------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks a Hub for when it fetches one file of a data set: HEAD with an ETag, GET with ranges."""

    root: Path
    requests: list[tuple[str, str, str | None]]
    break_once: set[str]  # files whose first GET ends in the middle
    repo = "someone/corpus"
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        start = self.headers.get("Range")
        self.requests.append((self.command, self.path, start))
        prefix = f"/datasets/{self.repo}/resolve/main/"
        file = self.root / self.path.removeprefix(prefix).split("?")[0]
        if not self.path.startswith(prefix) or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if self.path.startswith(prefix) else "RepoNotFound")
            self.send_header("X-Error-Message", "not there")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        offset = int(start.removeprefix("bytes=").split("-")[0]) if start else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - offset))
        if start:
            self.send_header("Content-Range", f"bytes {offset}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body and file.name in self.break_once:
            self.break_once.remove(file.name)
            self.wfile.write(data[offset : offset + len(data) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(data[offset:])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[type[Hub]]:
    """A Hub on the loopback with a data set of six shards."""
    handler = type("LocalHub", (Hub,), {"root": shards(tmp_path / "remote", 6), "requests": [], "break_once": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


HUB: dict[str, Any] = {
    "kind": "hub",
    "name": "hubby",
    "repo_id": "someone/corpus",
    "file_pattern": "shard_{index:05d}.parquet",
    "max_shards": 6,
}


def download(endpoint: str, cache: Path, offline: str = "0", **more: Any) -> dict[str, Any]:
    """`resolve` in a process of its own: huggingface_hub reads its environment once, at import."""
    code = (
        "import json, sys; from pathlib import Path\n"
        "from picotrain.config.schema import DataConfig; from picotrain.data.sources import known, resolve\n"
        "from picotrain.errors import DataError\n"
        "data, cache, said = DataConfig(**json.loads(sys.argv[1])), Path(sys.argv[2]), []\n"
        "try:\n"
        "    before = known(data, cache) is not None\n"
        "    print(json.dumps({'corpus': resolve(data, cache, said.append).to_json(), 'said': said, 'known': before}))\n"
        "except DataError as error:\n"
        "    print(json.dumps({'error': str(error)}))\n"
    )
    names = ("http_proxy", "https_proxy", "all_proxy", "hf_token", "hf_hub_offline")
    environment = {key: value for key, value in os.environ.items() if key.lower() not in names}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache / "hf"), "HF_HUB_OFFLINE": offline, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", code, json.dumps(HUB | more), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_hub_shards_are_fetched_once_with_the_pinned_validation_shard(hub: type[Hub], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = download(hub.url, cache, num_shards=2)
    corpus = Corpus.from_json(first["corpus"])
    assert [shard.name for shard in corpus.shards] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert corpus.val.name == "shard_00005.parquet"
    assert corpus.origin is not None
    assert corpus.origin["repo_id"] == "someone/corpus"
    assert not first["known"]
    assert len([line for line in first["said"] if line.startswith("shard ")]) == 3
    fetched = {path.rsplit("/", 1)[1] for method, path, _ in hub.requests if method == "GET"}
    assert fetched == {"shard_00000.parquet", "shard_00001.parquet", "shard_00005.parquet"}

    hub.requests.clear()
    again = download("http://127.0.0.1:9", cache, num_shards=2)  # nobody listens there: nothing may be asked
    assert Corpus.from_json(again["corpus"]) == corpus
    assert again["known"]
    assert again["said"] == []

    more = Corpus.from_json(download(hub.url, cache, num_shards=3)["corpus"])
    assert {path.rsplit("/", 1)[1] for method, path, _ in hub.requests if method == "GET"} == {"shard_00002.parquet"}
    assert more.val == corpus.val
    assert Corpus.from_json(download(hub.url, cache, num_shards=2)["corpus"]) == corpus  # not what happens to be there


def test_a_hub_that_is_not_reached_is_said_in_a_line_a_retry_however_many_threads_try(capfd: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.utils import http_backoff

    said: list[str] = []

    def attempt(number: int) -> None:
        with contextlib.suppress(Exception):
            http_backoff("HEAD", f"http://127.0.0.1:9/shard_{number}", max_retries=2, base_wait_time=0.2)

    with retries_said(said.append), ThreadPoolExecutor(4) as pool:
        list(pool.map(attempt, range(4)))
    assert len(said) == 2 and all("refused" in line and "\n" not in line for line in said)
    assert "try 2 of 3 in 0.2 s" in said[0] and "try 3 of 3 in 0.4 s" in said[1]
    assert capfd.readouterr() == ("", "")


def test_a_named_validation_shard_is_not_trained_on(hub: type[Hub], tmp_path: Path) -> None:
    corpus = Corpus.from_json(download(hub.url, tmp_path / "cache", num_shards=2, val_shard="shard_00001.parquet")["corpus"])
    assert [shard.name for shard in corpus.shards] == ["shard_00000.parquet", "shard_00002.parquet"]
    assert corpus.val.name == "shard_00001.parquet"


def test_a_broken_download_goes_on(hub: type[Hub], tmp_path: Path) -> None:
    hub.break_once.add("shard_00001.parquet")
    corpus = download(hub.url, tmp_path / "cache", num_shards=2)
    if "error" in corpus:  # some versions of huggingface_hub leave the retry to the next call
        corpus = download(hub.url, tmp_path / "cache", num_shards=2)
    names = [shard["name"] for shard in corpus["corpus"]["shards"]]
    remote = tmp_path / "remote"
    assert all((Path(corpus["corpus"]["root"]) / name).read_bytes() == (remote / name).read_bytes() for name in names)


def test_shards_in_a_folder_of_the_data_set_are_found(hub: type[Hub], tmp_path: Path) -> None:
    shards(tmp_path / "remote" / "sample" / "10BT", 3, "{:03d}_00000.parquet")
    result = download(hub.url, tmp_path / "cache", num_shards=1, max_shards=3, file_pattern="sample/10BT/{index:03d}_00000.parquet")
    corpus = Corpus.from_json(result["corpus"])
    assert ([shard.name for shard in corpus.shards], corpus.val.name) == (["000_00000.parquet"], "002_00000.parquet")


@pytest.mark.parametrize("offline", ["1", pytest.param("0", marks=pytest.mark.slow)])  # 0: after retries that take 20 s
def test_without_a_network_the_error_says_what_works(tmp_path: Path, offline: str) -> None:
    error = download("http://127.0.0.1:9", tmp_path / "cache", offline, num_shards=1)["error"]
    assert "someone/corpus cannot be downloaded" in error
    assert "data=pystdlib, or data=files data.path=" in error
    assert "\n" not in error


def test_what_the_hub_does_not_have_is_named(hub: type[Hub], tmp_path: Path) -> None:
    error = download(hub.url, tmp_path / "cache", num_shards=1, repo_id="no/such")["error"]
    assert "the Hub has no data set no/such" in error
    error = download(hub.url, tmp_path / "cache", num_shards=1, max_shards=9)["error"]
    assert "someone/corpus has no file shard_00008.parquet; see data.file_pattern" in error


def test_shards_that_are_spread_over_folders_are_refused(tmp_path: Path) -> None:
    data = DataConfig(**(HUB | {"num_shards": 1, "file_pattern": "{index}/shard_{index}.parquet"}))
    with pytest.raises(DataError, match=r"data\.file_pattern=.*: the shards must stand in one folder"):
        known(data, tmp_path)
