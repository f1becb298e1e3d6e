"""Shards behind a URL, against real servers on the loopback: what is fetched, how often, and what becomes of failures."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from servers import Fault, FileServer

from picotrain.data.corpus import Shard, read_footer
from picotrain.data.remote import RemoteFiles, errors, fetch, files, is_url, list_shards, manifest, read_shards, store
from picotrain.errors import DataError

NAMES = [f"shard_{index:05d}.parquet" for index in range(4)]


def write_shard(path: Path, seed: int, kilobytes: int = 300) -> None:
    """A shard whose text does not compress, in a few row groups."""
    rng = random.Random(seed)
    texts = [rng.randbytes(512).hex() for _ in range(kilobytes)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, compression="none", use_dictionary=False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    root = tmp_path / "served"
    root.mkdir()
    for seed, name in enumerate(NAMES):
        write_shard(root / name, seed)
    (root / "README.md").write_text("not a shard")
    server = FileServer(root)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds."""
    monkeypatch.setattr(errors, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(errors, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(store, "STALL_S", 0.4)
    monkeypatch.setattr(manifest, "TAIL_BYTES", 4096)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., RemoteFiles]]:
    """Makes RemoteFiles that are closed at the end, with what they said in `.said`."""
    made: list[RemoteFiles] = []

    def make(url: str, cap: int | None = None, **options: Any) -> RemoteFiles:
        said: list[str] = []
        made.append(RemoteFiles(url, tmp_path / "here", cap, say=said.append, **options))
        made[-1].said = said  # type: ignore[attr-defined]
        return made[-1]

    yield make
    for one in made:
        one.close()


def footers(server: FileServer) -> list[Shard]:
    return [read_footer(server.root / name) for name in NAMES]


def fetched(remote: RemoteFiles, shard: Shard) -> bytes:
    with remote.hold(shard) as path:
        return path.read_bytes()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_what_is_a_url() -> None:
    for url in (
        "https://h/x",
        "http://h",
        "s3://bucket/x",
        "gs://b",
        "hf://datasets/a/b",
        "file:///x",
        "memory://x",
        "nothing://x",
        "S3://b",
    ):
        assert is_url(url), url
    for path in ("/a/b", "a/b", "C:\\x", "s3:/x", "~/x", "./http://x", "/mirror/http://x", ""):
        assert not is_url(path), path


# --- listing and footers -------------------------------------------------------------------------


def test_a_listing_holds_the_shards_of_the_folder_sorted(server: FileServer, tmp_path: Path) -> None:
    shutil.copy(server.root / NAMES[0], server.root / "a 100% é.parquet")
    (server.root / "deeper").mkdir()
    listed = list_shards(server.url)
    assert [file.name for file in listed] == ["a 100% é.parquet", *NAMES]
    assert all(file.version.startswith("listing:") for file in listed)  # date and size stand beside each name
    assert len(server.seen) == 1
    assert len(server.seen) == 1
    assert read_shards(server.url, listed[:1], tmp_path, print)[0].fingerprint == read_footer(server.root / NAMES[0]).fingerprint


def test_an_empty_listing_and_a_missing_folder_are_named(server: FileServer) -> None:
    for name in NAMES:
        (server.root / name).unlink()
    with pytest.raises(DataError, match=f"{server.url} lists no \\*.parquet file; a corpus is a folder"):
        list_shards(server.url)
    with pytest.raises(DataError, match="there is nothing at http://.*/data/other .*404"):
        list_shards(server.url.replace("corpus", "other"))
    assert len(server.seen) == 2


def test_footers_are_read_by_their_ends_and_remembered(server: FileServer, tmp_path: Path) -> None:
    listed = list_shards(server.url)
    said: list[str] = []
    assert read_shards(server.url, listed, tmp_path / "cache", said.append) == footers(server)
    assert all(seen.status == 206 for seen in server.requests("GET") if seen.name)
    assert said == [f"reading the footers of 4 shards of {server.url}"]
    server.seen.clear()
    assert read_shards(server.url, list_shards(server.url), tmp_path / "cache", said.append) == footers(server)
    assert [seen.target for seen in server.seen] == ["/data/corpus/"]  # a second start needs the listing alone
    assert not [path for path in (tmp_path / "cache" / "manifests").iterdir() if path.is_dir()]

    write_shard(server.root / NAMES[1], 99, kilobytes=200)
    server.seen.clear()
    assert read_shards(server.url, list_shards(server.url), tmp_path / "cache", said.append) == footers(server)
    assert {seen.name for seen in server.seen if seen.name} == {NAMES[1]}  # its date and size changed in the listing


def test_a_footer_larger_than_the_first_look_is_read_whole(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "TAIL_BYTES", 100)
    assert read_shards(server.url, list_shards(server.url), tmp_path, print) == footers(server)


@pytest.mark.parametrize("head", [True, False])
def test_without_ranges_files_are_read_whole(server: FileServer, tmp_path: Path, head: bool) -> None:
    server.ranges, server.head = False, head
    assert read_shards(server.url, list_shards(server.url), tmp_path, print) == footers(server)
    assert {seen.status for seen in server.requests("GET")} == {200}


def test_what_is_no_shard_is_named_by_its_url(server: FileServer, tmp_path: Path) -> None:
    (server.root / NAMES[2]).write_bytes(b"x" * 20_000)
    with pytest.raises(DataError, match=f"^{server.url}/{NAMES[2]} is no readable Parquet file: it does not end in a Parquet footer"):
        read_shards(server.url, list_shards(server.url), tmp_path, print)
    pq.write_table(pa.table({"words": ["x"]}), server.root / NAMES[2])
    with pytest.raises(DataError, match=f"^{server.url}/{NAMES[2]} has no `text` column; its columns are words"):
        read_shards(server.url, list_shards(server.url), tmp_path, print)


def test_footers_survive_a_server_with_hiccups(server: FileServer, tmp_path: Path) -> None:
    server.faults[""].append(Fault(503))
    for name in NAMES:
        server.faults[name] += [Fault(503), Fault(after=10), Fault(429, {"Retry-After": "0"})]
    assert read_shards(server.url, list_shards(server.url), tmp_path, lambda _: None) == footers(server)


# --- one shard -----------------------------------------------------------------------------------


def test_a_shard_is_fetched_once_and_then_read_without_a_request(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    remote, shard = opened(server.url), footers(server)[0]
    assert fetched(remote, shard) == (server.root / NAMES[0]).read_bytes()
    assert [seen.status for seen in server.requests("GET", NAMES[0])] == [200]
    assert sorted(path.name for path in remote.folder.iterdir()) == [NAMES[0]]
    server.seen.clear()
    assert fetched(remote, shard) == fetched(opened(server.url), shard)
    assert server.seen == []


FAULTS = {
    "reset": [Fault(after=100_000, stalled_s=0.1)],
    "closed": [Fault(after=100_000, how="closed", stalled_s=0.1)],
    "503": [Fault(503), Fault(500), Fault(502)],
    "429": [Fault(429, {"Retry-After": "0"})],
    "stall": [Fault(after=100_000, stalled_s=5)],
    "header says less": [Fault(claim=-1000)],
    "many": [Fault(after=20_000, stalled_s=0.05) for count in range(12)],  # more than the attempts, but each brings something
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_faults_that_pass_are_survived(server: FileServer, opened: Callable[..., RemoteFiles], faults: list[Fault]) -> None:
    server.faults[NAMES[0]] += faults
    remote = opened(server.url)
    assert fetched(remote, footers(server)[0]) == (server.root / NAMES[0]).read_bytes()
    assert not server.faults[NAMES[0]]
    assert any("trying again in" in line and NAMES[0] in line for line in remote.said)  # type: ignore[attr-defined]


def test_a_header_that_says_more_than_there_is_harms_nothing(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    server.faults[NAMES[0]].append(Fault(claim=1000))
    assert fetched(opened(server.url), footers(server)[0]) == (server.root / NAMES[0]).read_bytes()


def test_a_broken_transfer_goes_on_where_it_was(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    server.faults[NAMES[0]].append(Fault(after=100_000, how="closed", stalled_s=0.1))
    shard = footers(server)[0]
    fetched(opened(server.url), shard)
    assert [(seen.range, seen.status) for seen in server.requests("GET", NAMES[0])] == [
        (None, 200),
        (f"bytes=100000-{shard.bytes - 1}", 206),
    ]


def test_a_server_without_ranges_is_asked_from_the_start(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    server.ranges = False
    server.faults[NAMES[0]].append(Fault(after=100_000, how="closed", stalled_s=0.1))
    assert fetched(opened(server.url), footers(server)[0]) == (server.root / NAMES[0]).read_bytes()
    assert [seen.status for seen in server.requests("GET", NAMES[0])] == [200, 200]


def test_parts_of_two_versions_are_never_joined(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    path = server.root / NAMES[0]
    good, shard = path.read_bytes(), footers(server)[0]
    path.write_bytes(b"\0" * len(good))
    server.faults[NAMES[0]].append(Fault(after=100_000, how="closed", stalled_s=0.1))
    threading.Timer(0.1, path.write_bytes, [good]).start()
    server.faults[NAMES[0]].append(Fault(503, {"Retry-After": "1"}))
    assert fetched(opened(server.url), shard) == good
    assert [seen.status for seen in server.requests("GET", NAMES[0])][-1] == 200


def test_what_never_works_says_so_with_the_attempts(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    server.always[NAMES[0]] = Fault(503)
    with pytest.raises(DataError, match=f"{server.url}/{NAMES[0]} cannot be fetched: 503.*; 6 attempts failed; try again later"):
        fetched(opened(server.url), footers(server)[0])
    assert len(server.requests("GET", NAMES[0])) == 6


def test_404_and_403_are_not_tried_again(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    shards = footers(server)
    (server.root / NAMES[0]).unlink()
    with pytest.raises(DataError, match=f"there is nothing at {server.url}/{NAMES[0]} .*404"):
        fetched(opened(server.url), shards[0])
    server.always[NAMES[1]] = Fault(403)
    with pytest.raises(DataError, match=f"{server.url}/{NAMES[1]}: access is refused .*403.*credentials"):
        fetched(opened(server.url), shards[1])
    assert len(server.requests("GET", NAMES[1])) == 1


def test_an_unknown_host_and_a_closed_port_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no-such-host.invalid"):
        list_shards("http://no-such-host.invalid/x")
    said: list[str] = []
    with pytest.raises(DataError, match="http://127.0.0.1:9/x cannot be fetched: .*6 attempts failed"):
        list_shards("http://127.0.0.1:9/x", said.append)
    assert [line.rpartition(", ")[2] for line in said] == [f"try {number} of 6" for number in range(2, 7)]  # a line each


@pytest.mark.parametrize("etags", [True, False])
def test_a_file_that_changed_behind_its_name_is_refused(server: FileServer, opened: Callable[..., RemoteFiles], etags: bool) -> None:
    server.etags = etags
    shards = footers(server)
    write_shard(server.root / NAMES[0], 77)  # as long as before
    remote = opened(server.url)
    with pytest.raises(DataError, match=f"{NAMES[0]} cannot be fetched: its footer has the fingerprint .*{shards[0].fingerprint} was exp"):
        fetched(remote, shards[0])
    write_shard(server.root / NAMES[1], 78, kilobytes=100)
    message = f"it has [0-9,]+ bytes, and {shards[1].bytes:,} were expected; .*remove manifests/[0-9a-f]+.json"
    with pytest.raises(DataError, match=message):
        fetched(remote, shards[1])
    assert list(remote.folder.iterdir()) == []


@pytest.mark.parametrize("right", [True, False])
def test_the_hashes_of_a_prepared_corpus_are_checked(server: FileServer, opened: Callable[..., RemoteFiles], right: bool) -> None:
    path, shard = server.root / NAMES[0], footers(server)[0]
    digest = xxhash.xxh3_64(path.read_bytes()).hexdigest()
    (server.root / "origin.json").write_text(json.dumps({"shards": {NAMES[0]: {"bytes": shard.bytes, "xxh3_64": digest}}}))
    if right:
        assert fetched(opened(server.url), shard)
        return
    data = bytearray(path.read_bytes())
    data[1000] ^= 1  # size and footer stay as they are
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"its content has the xxh3_64 [0-9a-f]+, and {digest} was expected"):
        fetched(opened(server.url), shard)


def test_a_damaged_or_outdated_file_in_the_cache_is_fetched_again(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    remote, shard = opened(server.url), footers(server)[0]
    write_shard(remote.folder / NAMES[0], 5)
    assert fetched(remote, shard) == (server.root / NAMES[0]).read_bytes()
    (remote.folder / NAMES[0]).write_bytes(b"short")
    assert fetched(remote, shard) == (server.root / NAMES[0]).read_bytes()


def test_credentials_work_and_are_never_told(server: FileServer, opened: Callable[..., RemoteFiles], tmp_path: Path) -> None:
    server.authorization = "Basic YW5uYTpvcGVuLXNlc2FtZQ=="
    url = server.url.replace("http://", "http://anna:open-sesame@") + "?token=s3cr3t"
    said: list[str] = []
    shards = read_shards(url, list_shards(url), tmp_path / "cache", said.append)
    remote = opened(url)
    assert fetched(remote, shards[0]) == (server.root / NAMES[0]).read_bytes()
    assert all(seen.target.endswith("?token=s3cr3t") for seen in server.seen)
    server.always[NAMES[1]] = Fault(503)
    with pytest.raises(DataError) as never:
        fetched(remote, shards[1])
    server.authorization = "Basic other"
    with pytest.raises(DataError, match="access is refused") as refused:
        fetched(remote, shards[2])
    with pytest.raises(DataError) as unlisted:
        list_shards(url + "-s3cr3t")
    with pytest.raises(DataError, match=r"http://\*\*\*@.*\?token=\*\*\*") as nowhere:
        list_shards("http://anna:open-sesame@127.0.0.1:9/x?token=s3cr3t")
    messages = [str(error.value) for error in (never, refused, unlisted, nowhere)] + said + remote.said  # type: ignore[attr-defined]
    messages += [path.read_text() + str(path) for path in (tmp_path / "cache" / "manifests").iterdir()]
    for message in messages:
        assert not any(secret in message for secret in ("anna", "sesame", "s3cr3t")), message


@pytest.mark.parametrize(("url", "command"), [("https://h/x", "picotrain[http]"), ("s3://bbb/x", "picotrain[s3]"), ("gs://b/x", "gcsfs")])
def test_a_missing_package_is_named_with_its_command(url: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec.registry  # noqa: F401

    for module in ("aiohttp", "s3fs", "gcsfs", "fsspec.implementations.http"):
        monkeypatch.setitem(sys.modules, module, None)
    for protocol in ("http", "https", "s3", "gs"):  # those that an earlier test imported
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="needs another package: pip install '?" + command.replace("[", "\\[")):
        list_shards(url)


# --- ahead of need -------------------------------------------------------------------------------


def test_shards_are_fetched_ahead_in_the_background(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    remote, shards = opened(server.url), footers(server)
    remote.prefetch(shards[:3])
    until(lambda: all((remote.folder / name).exists() for name in NAMES[:3]))
    server.seen.clear()
    for shard in shards[:3]:
        fetched(remote, shard)
    assert server.seen == []
    assert remote.said == []  # type: ignore[attr-defined]  # nobody had to wait
    assert not (remote.folder / NAMES[3]).exists()


def test_a_held_shard_that_is_under_way_is_waited_for(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    server.delay_s = 0.01
    remote, shards = opened(server.url), footers(server)
    remote.prefetch(shards[:1])
    until(lambda: bool(server.requests("GET", NAMES[0])))
    fetched(remote, shards[0])
    assert len(server.requests("GET", NAMES[0])) == 1


def test_an_error_ahead_of_need_surfaces_when_the_shard_is_held(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    remote, shards = opened(server.url), footers(server)
    server.always[NAMES[0]] = Fault(403)
    remote.prefetch(shards[:2])
    until(lambda: (remote.folder / NAMES[1]).exists())
    until(lambda: len(server.requests("GET", NAMES[0])) == 1)
    with pytest.raises(DataError, match="access is refused"):
        fetched(remote, shards[0])
    time.sleep(0.2)
    assert len(server.requests("GET", NAMES[0])) == 2  # the background leaves it alone for a while
    del server.always[NAMES[0]]
    assert fetched(remote, shards[0])


def test_close_ends_transfers_at_once_and_a_later_hold_goes_on(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    server.delay_s = 0.2
    remote, shards = opened(server.url), footers(server)
    remote.prefetch(shards)
    until(lambda: bool(server.requests("GET", NAMES[0])))
    caught: list[DataError] = []

    def hold() -> None:
        try:
            fetched(remote, shards[0])
        except DataError as error:
            caught.append(error)

    waiting = threading.Thread(target=hold)
    waiting.start()
    time.sleep(0.5)
    began = time.monotonic()
    remote.close()
    waiting.join()
    assert time.monotonic() - began < 1.0
    assert "given up" in str(caught[0])
    assert not [thread for thread in threading.enumerate() if thread.name == "picotrain-fetch"]
    server.delay_s = 0.0
    assert fetched(remote, shards[0]) == (server.root / NAMES[0]).read_bytes()
    assert server.requests("GET", NAMES[0])[-1].status == 206


# --- a shared folder -----------------------------------------------------------------------------


def hold_all(url: str, folder: Path, shards: list[Shard], results: Any) -> None:
    remote = RemoteFiles(url, folder, None, say=lambda _: None)
    remote.prefetch(shards)
    try:
        results.put([hashlib.sha1(fetched(remote, shard)).hexdigest() for shard in shards])
    finally:
        remote.close()


def test_two_processes_fetch_a_shard_once(server: FileServer, tmp_path: Path) -> None:
    server.delay_s = 0.02
    context = multiprocessing.get_context("spawn")
    results, shards = context.Queue(), footers(server)
    both = [context.Process(target=hold_all, args=(server.url, tmp_path / "here", shards, results)) for _ in range(2)]
    for process in both:
        process.start()
    right = [hashlib.sha1((server.root / name).read_bytes()).hexdigest() for name in NAMES]
    assert [results.get(timeout=60) for _ in both] == [right, right]
    for process in both:
        process.join()
    assert [len(server.requests("GET", name)) for name in NAMES] == [1, 1, 1, 1]


KILLED = """
import json, sys
from pathlib import Path
from picotrain.data.corpus import Shard
from picotrain.data.remote import RemoteFiles
with RemoteFiles(sys.argv[1], Path(sys.argv[2]), None, say=print).hold(Shard.from_json(json.loads(sys.argv[3]))):
    pass
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_a_killed_process_had_is_kept(
    server: FileServer, opened: Callable[..., RemoteFiles], tmp_path: Path, how: signal.Signals
) -> None:
    server.delay_s = 0.05
    shard, folder = footers(server)[0], tmp_path / "here"
    command = [sys.executable, "-c", KILLED, server.url, str(folder), json.dumps(shard.to_json())]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: any(path.stat().st_size > 30_000 for path in folder.glob("*.partial.*")), 30)
    process.send_signal(how)
    process.wait(timeout=10)
    server.delay_s = 0.0
    assert fetched(opened(server.url), shard) == (server.root / NAMES[0]).read_bytes()
    last = server.requests("GET", NAMES[0])[-1]
    assert last.status == 206
    assert int((last.range or "").removeprefix("bytes=").split("-")[0]) > 30_000
    assert [path.name for path in folder.iterdir()] == [NAMES[0]]


# --- room ----------------------------------------------------------------------------------------


def test_the_least_recently_used_shard_makes_room(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    shards = footers(server)
    remote = opened(server.url, cap=int(2.5 * shards[0].bytes))
    for index in (0, 1, 0, 2):  # 1 is the one that was not used for longest
        fetched(remote, shards[index])
    assert sorted(path.name for path in remote.folder.iterdir()) == [NAMES[0], NAMES[2]]


def test_held_shards_stay_even_above_the_cap(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    shards = footers(server)
    remote, other = (opened(server.url, cap=int(1.5 * shards[0].bytes)) for _ in range(2))
    with other.hold(shards[0]) as first, remote.hold(shards[1]) as second, remote.hold(shards[2]) as third:
        assert [first.exists(), second.exists(), third.exists()] == [True] * 3
    assert len([line for line in remote.said if "above data.cache_bytes" in line]) == 1  # type: ignore[attr-defined]
    fetched(remote, shards[3])
    assert [path.name for path in remote.folder.iterdir()] == [NAMES[3]]


def test_fetching_ahead_stops_at_the_cap_and_goes_on_when_there_is_room(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    shards = footers(server)
    remote = opened(server.url, cap=int(2.5 * shards[0].bytes))
    with remote.hold(shards[0]):
        remote.prefetch(shards[1:])
        until(lambda: (remote.folder / NAMES[1]).exists() or (remote.folder / NAMES[2]).exists())
        time.sleep(0.3)
        assert len(list(remote.folder.glob("*.parquet"))) == 2
        assert len(server.requests("GET")) == 2 + 1  # two shards and origin.json
    until(lambda: len(server.requests("GET")) == 3 + 1 and len(list(remote.folder.iterdir())) == 2)
    assert not (remote.folder / NAMES[0]).exists()


def test_forgotten_parts_go_first(server: FileServer, opened: Callable[..., RemoteFiles]) -> None:
    shards = footers(server)
    remote = opened(server.url, cap=int(2.5 * shards[0].bytes))
    (remote.folder / f"{NAMES[3]}.partial.01234567").write_bytes(b"x" * shards[0].bytes)
    fetched(remote, shards[0])
    fetched(remote, shards[1])
    assert sorted(path.name for path in remote.folder.iterdir()) == NAMES[:2]


FULL = r"the disk of .* is full: shard_00000.parquet needs [0-9,]+ more bytes .*data.cache_bytes.*PICOTRAIN_CACHE"


def test_a_full_disk_is_told_with_what_is_needed(server: FileServer, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here; the next test simulates one")
    try:
        remote = RemoteFiles(server.url, small, None, say=lambda _: None)
        with pytest.raises(DataError, match=FULL):
            fetched(remote, footers(server)[0])
        remote.close()
    finally:
        subprocess.run(["umount", small], check=True)
    assert server.requests("GET", NAMES[0]) == []  # found before anything was transferred


def test_a_disk_that_fills_up_on_the_way_keeps_what_has_arrived(
    server: FileServer, opened: Callable[..., RemoteFiles], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.delay_s = 0.001
    shard = footers(server)[0]

    class Full:
        """A file on a disk with 100,000 bytes left."""

        def __init__(self, file: Any):
            self.file = file

        def write(self, data: bytes) -> int:
            if self.file.tell() > 100_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def filling(path: Path, mode: str) -> Any:
        file = open(path, mode)  # noqa: SIM115  # closed by who asked for it
        return Full(file) if mode == "ab" else file

    remote = opened(server.url)
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "open", filling, raising=False)
        with pytest.raises(DataError, match=FULL):
            fetched(remote, shard)
    assert fetched(remote, shard) == (server.root / NAMES[0]).read_bytes()
    assert server.requests("GET", NAMES[0])[-1].status == 206


# --- other stores --------------------------------------------------------------------------------


def test_a_folder_by_its_file_url(server: FileServer, opened: Callable[..., RemoteFiles], tmp_path: Path) -> None:
    url = server.root.as_uri()
    listed = list_shards(url)
    assert [(file.name, file.bytes) for file in listed] == [(shard.name, shard.bytes) for shard in footers(server)]
    shards = read_shards(url, listed, tmp_path / "cache", lambda _: None)
    assert shards == footers(server)
    assert fetched(opened(url), shards[1]) == (server.root / NAMES[1]).read_bytes()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The endpoint of an S3 server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket with the shards below `corpus/`; the client for it."""
    import botocore.session

    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    for key, value in (keys | {"AWS_ENDPOINT_URL": s3, "AWS_EC2_METADATA_DISABLED": "true"}).items():
        monkeypatch.setenv(key, value)
    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket="bucket")
    for name in NAMES:
        client.put_object(Bucket="bucket", Key=f"corpus/{name}", Body=(server.root / name).read_bytes())
    yield client
    client.close()


def test_shards_in_s3(bucket: Any, server: FileServer, opened: Callable[..., RemoteFiles], tmp_path: Path) -> None:
    url = "s3://bucket/corpus"
    listed = list_shards(url + "/")
    assert [(file.name, file.bytes) for file in listed] == [(shard.name, shard.bytes) for shard in footers(server)]
    assert len({file.version for file in listed}) == 4
    shards = read_shards(url, listed, tmp_path / "cache", lambda _: None)
    assert shards == footers(server)
    remote = opened(url)
    remote.prefetch(shards)
    assert [fetched(remote, shard) for shard in shards] == [(server.root / name).read_bytes() for name in NAMES]

    remote.close()
    shutil.rmtree(remote.folder)
    bucket.delete_object(Bucket="bucket", Key=f"corpus/{NAMES[1]}")
    with pytest.raises(DataError, match=f"there is nothing at {url}/{NAMES[1]}"):
        fetched(opened(url), shards[1])
    with pytest.raises(DataError, match="there is nothing at s3://no-such-bucket/x"):
        list_shards("s3://no-such-bucket/x")


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_a_wrong_transfer_is_noticed_by_the_hash_that_a_store_tells(
    server: FileServer, opened: Callable[..., RemoteFiles], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Google tells an MD5, the Hub a SHA-256."""
    digest, info, read = hashlib.new(kind, (server.root / NAMES[0]).read_bytes()), store.Store.info, store.Store.read
    flips = iter([1, 2, 0])

    def flipped(self: store.Store, name: str, *span: Any) -> Iterator[bytes]:
        data = bytearray(b"".join(read(self, name, *span)))
        data[5000] ^= next(flips)
        yield bytes(data)

    monkeypatch.setattr(store.Store, "info", lambda self, name: info(self, name)._replace(digest=f"{kind}:{digest.hexdigest()}"))
    monkeypatch.setattr(store.Store, "read", flipped)
    remote = opened(server.root.as_uri())
    assert fetched(remote, footers(server)[0]) == (server.root / NAMES[0]).read_bytes()
    assert len([line for line in remote.said if f"its content has the {kind}" in line]) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("http", [True, False])
def test_a_file_that_is_replaced_while_it_is_read_is_read_again(
    server: FileServer, opened: Callable[..., RemoteFiles], monkeypatch: pytest.MonkeyPatch, http: bool
) -> None:
    shard, path, read = footers(server)[0], server.root / NAMES[0], store.Store.read
    before = path.read_bytes()
    after = bytearray(before)
    after[1000] ^= 1  # size and footer stay as they are

    def replaced(self: store.Store, *span: Any) -> Iterator[bytes]:
        for block in read(self, *span):
            yield block
            if path.read_bytes() != after:
                path.write_bytes(after)

    monkeypatch.setattr(store, "BLOCK_BYTES", 50_000)
    monkeypatch.setattr(store.Store, "read", replaced)
    assert fetched(opened(server.url if http else server.root.as_uri()), shard) == after


def test_no_module_of_a_protocol_is_imported_for_local_paths() -> None:
    code = "import sys; from picotrain.data.remote import is_url; assert not is_url('/x')"
    code += "; print('fsspec' in sys.modules, 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"


assert files.REST_S > 1  # the tests above count on it
