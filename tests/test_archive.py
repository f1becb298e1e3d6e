"""An archive of a run, against real stores: S3 (moto) that dies and comes back, a local folder, one that cannot be written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import lines, losses, picotrain, start

from picotrain import checkpoint
from picotrain.checkpoint.archive import FAILED, WORKS, Archive, check, mirror, probe, restore
from picotrain.checkpoint.archive.remote import Remote
from picotrain.checkpoint.folder import describe, write_json
from picotrain.data.remote.errors import sorted_error
from picotrain.errors import CheckpointError, RunError

Open = Callable[..., Archive]


class Server:
    """moto's S3 on one port: what is in its buckets survives a stop."""

    def __init__(self) -> None:
        self.port = 0
        self.start()

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of an S3 that has an empty bucket named `bucket`."""
    import botocore.session

    settings = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    settings |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_server.port}", "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1"}
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket="bucket")
    for key in keys(client, ""):
        client.delete_object(Bucket="bucket", Key=key)
    yield client
    client.close()


def keys(client: Any, prefix: str = "run/") -> set[str]:
    found = client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", ())
    return {item["Key"].removeprefix(prefix) for item in found}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(mirror, "LONGEST_PAUSE_S", 0.2)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def opened(said: list[str]) -> Iterator[Open]:
    """Starts archives that pass only when woken; closes those that a test has left open."""
    archives: list[Archive] = []

    def opened(url: str, run_dir: Path, **options: Any) -> Archive:
        options = {"interval_s": 600.0, "min_age_s": 0.0, "keep_last": None, "say": said.append} | options
        archives.append(Archive(url, run_dir, **options))
        archives[-1].start()
        return archives[-1]

    yield opened
    for archive in archives:
        archive.close(0.0 if archive.last_error else 5.0)


def add_checkpoint(run_dir: Path, step: int, val_bpb: float | None = None, files: int = 3) -> Path:
    """A whole checkpoint as far as files go."""
    path = checkpoint.step_dir(run_dir / "checkpoints", step)
    path.mkdir(parents=True)
    for i in range(files):
        (path / f"model-{i}.safetensors").write_bytes(f"weights {i} of step {step}".encode() * 50)
    (path / "state.json").write_text(json.dumps({"step": step}))
    write_json(path / "manifest.json", {"files": {file.name: describe(file) for file in sorted(path.iterdir())}})
    checkpoint.write_pointer(path.parent, "latest", path)
    if val_bpb is not None:
        checkpoint.record_metrics(path.parent, step, {"val_bpb": val_bpb})
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run's files with two checkpoints; the best is the first."""
    folder = tmp_path / "run"
    (folder / "attempts/0001").mkdir(parents=True)
    for name in ("config.yaml", "plan.json", "report.md", "loss.png", "attempts/0001/config.yaml"):
        (folder / name).write_text(f"this is {name}\n")
    (folder / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    add_checkpoint(folder, 4, val_bpb=1.0)
    add_checkpoint(folder, 8, val_bpb=2.0)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """What is in a folder, without what belongs to one place only."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name not in ("archive.json", ".lock")}


def wait_for(condition: Callable[[], Any], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def passes(archive: Archive) -> None:
    """Wait until one whole pass has begun and ended."""
    last = archive.last_success
    wait_for(lambda: archive.last_success is not None)
    time.sleep(0.02)
    last = archive.last_success
    archive.wake()
    wait_for(lambda: archive.last_success != last)


@pytest.mark.parametrize("kind", ["file://", "folder", "s3", "memory"])
def test_an_archive_has_what_the_run_has(kind: str, run_dir: Path, tmp_path: Path, opened: Open, s3: Any) -> None:
    url = {"file://": f"file://{tmp_path}/there/run", "folder": f"{tmp_path}/there/run", "s3": "s3://bucket/run", "memory": "memory://all"}[
        kind
    ]
    archive = opened(url, run_dir)
    assert archive.close(20)
    assert archive.files == len(files(run_dir)) and archive.bytes == sum(map(len, files(run_dir).values()))
    assert archive.last_success is not None and archive.last_error is None
    if kind in ("file://", "folder"):
        assert files(tmp_path / "there/run") == files(run_dir)
    restored = restore(url, tmp_path / "restored", lambda _: None)
    newest_alone = {name: data for name, data in files(run_dir).items() if "step_00000004" not in name and name != "checkpoints/best"}
    assert files(restored) == newest_alone


def test_what_belongs_to_this_place_or_is_unfinished_is_not_mirrored(run_dir: Path, tmp_path: Path, opened: Open) -> None:
    before = files(run_dir)
    secret = tmp_path / "secret.json"
    secret.write_text("secret")
    (run_dir / "report.html").symlink_to(secret)
    (run_dir / "eval").symlink_to(tmp_path)
    shutil.copytree(run_dir / "checkpoints/step_00000008", tmp_path / "outside")
    (run_dir / "checkpoints/step_00000012").symlink_to(tmp_path / "outside")
    shutil.copytree(tmp_path / "outside", run_dir / "checkpoints/step_00000013")
    (run_dir / "checkpoints/step_00000013/manifest.json").unlink()
    (run_dir / "checkpoints/step_00000013/manifest.json").symlink_to(tmp_path / "outside/manifest.json")
    for name in (".lock", ".config.yaml.tmp", "checkpoints/.tmp-step_00000016/state.json", "checkpoints/step_00000020/state.json"):
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_text("{}")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "torn')
    assert opened(f"file://{tmp_path}/there", run_dir).close(10)
    assert files(tmp_path / "there") == before


def test_a_young_file_waits_but_a_checkpoint_and_the_metrics_do_not(run_dir: Path, tmp_path: Path, opened: Open) -> None:
    for path in run_dir.rglob("*"):
        os.utime(path, (time.time() - 100,) * 2)
    archive, there = opened(f"file://{tmp_path}/there", run_dir, min_age_s=50.0), tmp_path / "there"
    passes(archive)
    (run_dir / "report.md").write_text("half")
    (run_dir / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n')
    add_checkpoint(run_dir, 12)
    passes(archive)
    assert (there / "report.md").read_text() == "this is report.md\n"
    assert (there / "metrics.jsonl").read_text().count("\n") == 3
    assert checkpoint.find(there / "checkpoints", "last").name == "step_00000012"
    assert archive.close(10)
    assert (there / "report.md").read_text() == "half"


def test_what_is_there_already_is_not_sent_again(run_dir: Path, tmp_path: Path, opened: Open) -> None:
    url = f"file://{tmp_path}/there"
    archive = opened(url, run_dir)
    passes(archive)
    sent = archive.files
    passes(archive)
    assert archive.files == sent
    (run_dir / "plan.json").write_text("this is plan.jsoN\n")  # as many bytes as before
    assert archive.close(10) and archive.files == sent + 1
    again = opened(url, run_dir)  # as a new process knows nothing of what was sent
    assert again.close(10) and again.files == 1  # metrics.jsonl
    (run_dir / "plan.json").write_text("this is plan.jsoX\n")
    again = opened(url, run_dir)
    assert again.close(10) and again.files == 2
    assert files(tmp_path / "there") == files(run_dir)


def hook(monkeypatch: pytest.MonkeyPatch, method: str, before: Callable[[str], None]) -> list[str]:
    """Call `before(name)` ahead of every put or delete; the list of their names."""
    names: list[str] = []
    original = getattr(Remote, method)

    def hooked(self: Remote, name: str, *args: Any) -> None:
        names.append(name)
        before(name)
        original(self, name, *args)

    monkeypatch.setattr(Remote, method, hooked)
    return names


def test_a_checkpoint_of_the_same_step_but_other_content_replaces_the_one_there(
    run_dir: Path, tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = opened(f"file://{tmp_path}/there", run_dir)
    passes(archive)
    path = run_dir / "checkpoints/step_00000008"
    shutil.rmtree(path)
    (add_checkpoint(run_dir, 8) / "state.json").write_text('{"step": 9}')  # the same length
    write_json(path / "manifest.json", {"files": {file.name: describe(file) for file in path.iterdir() if file.name != "manifest.json"}})
    there, mixed = tmp_path / "there/checkpoints/step_00000008", []
    hook(monkeypatch, "put", lambda name: mixed.append(name) if "step_00000008/" in name and (there / "manifest.json").exists() else None)
    assert archive.close(10)
    assert set(mixed) <= {"checkpoints/step_00000008/metrics.json"}  # files of both never stand there under one manifest
    checkpoint.verify(there)
    assert (there / "state.json").read_text() == '{"step": 9}'


def test_a_store_that_dies_half_way_and_comes_back_gets_the_rest(
    run_dir: Path, tmp_path: Path, opened: Open, s3: Any, s3_server: Server, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    died = threading.Event()

    def die(name: str) -> None:
        if name == "checkpoints/step_00000008/model-2.safetensors" and not died.is_set():
            s3_server.stop()
            died.set()

    puts = hook(monkeypatch, "put", die)
    archive = opened("s3://bucket/run", run_dir)
    wait_for(lambda: died.is_set() and archive.last_error)
    time.sleep(0.3)  # several attempts
    assert len(said) == 1 and "the run goes on" in said[0] and "s3://bucket/run" in said[0]
    s3_server.start()
    assert not [name for name in keys(s3) if name.endswith("manifest.json")]  # nothing looks whole
    wait_for(lambda: archive.last_success)
    assert "works again" in said[1] and len(said) == 2 and archive.last_error is None
    assert keys(s3) == {*files(run_dir), "archive.json"}
    assert puts.count("checkpoints/step_00000008/model-1.safetensors") == 1  # what had arrived was not sent again


def test_a_checkpoint_that_vanishes_while_it_is_sent_leaves_nothing(
    run_dir: Path, opened: Open, s3: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(name: str) -> None:
        if name == "checkpoints/step_00000008/model-1.safetensors":
            shutil.rmtree(run_dir / "checkpoints/step_00000008")

    hook(monkeypatch, "put", vanish)
    assert opened("s3://bucket/run", run_dir).close(20)
    assert not said
    assert keys(s3) - {"archive.json", "checkpoints/latest"} == set(files(run_dir)) - {"checkpoints/latest"}
    assert s3.get_object(Bucket="bucket", Key="run/checkpoints/latest")["Body"].read() == b"step_00000004\n"


@pytest.mark.parametrize("mistake", ["no bucket", "no credentials", "no access", "read-only", "a file is in the way"])
def test_what_a_user_has_to_mend_ends_the_start(
    mistake: str, run_dir: Path, tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, wanted = "s3://bucket/run", "access is refused"
    if mistake == "no bucket":
        url, wanted = "s3://no-such-bucket/run", "there is nothing at"
    elif mistake == "no credentials":
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        wanted = "there are no credentials"
    elif mistake == "no access":
        monkeypatch.setattr(Remote, "_call", lambda *_, **__: (_ for _ in ()).throw(sorted_error(PermissionError("Forbidden"), url, "403")))
    elif mistake == "read-only":
        url = "file:///sys/picotrain/archive"  # not even root may
    else:
        (tmp_path / "there").write_text("a file")
        url, wanted = f"{tmp_path}/there/run", "cannot be used"
    archive = Archive(url, run_dir, interval_s=600, min_age_s=0, keep_last=None, say=lambda _: None)
    with pytest.raises(RunError, match=wanted):
        archive.start()
    assert not archive.close(0.1)
    with pytest.raises(RunError):  # the same before there is a run, or in doctor
        probe(url, tmp_path / "new")


def test_a_store_that_is_down_at_the_start_is_tried_and_costs_nothing(
    run_dir: Path, opened: Open, s3: Any, s3_server: Server, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "START_S", 0.5)
    s3_server.stop()
    try:
        check("s3://bucket/run", run_dir)  # no mistake of the user's
        archive = opened("s3://bucket/run", run_dir)
        wait_for(lambda: archive.last_error)
        time.sleep(0.3)
        assert len([line for line in said if "the run goes on" in line]) == 1
        began = time.monotonic()
        assert not archive.flush(60, hurry=lambda: 0.3)  # a signal came
        assert time.monotonic() - began < 5
        assert "lacks the end of the run" in said[-1] and str(run_dir) in said[-1]
        assert [note.name for note in archive.poll()] == [FAILED, FAILED] and archive.last_success is None
    finally:
        s3_server.start()
    assert archive.flush(20) and [note.name for note in archive.poll()] == [WORKS]
    assert keys(s3) == {*files(run_dir), "archive.json"}


def test_a_probe_leaves_nothing_and_knows_whose_archive_it_is(run_dir: Path, tmp_path: Path, opened: Open, s3: Any) -> None:
    for url in (f"file://{tmp_path}/a/b", f"{tmp_path}/c", "s3://bucket/probed"):
        assert "holds no run yet" in probe(url, run_dir)
        check(url, run_dir)
    assert not (tmp_path / "a").exists() and not (tmp_path / "c").exists() and not keys(s3, "")
    assert opened("s3://bucket/run", run_dir).close(10)
    assert "holds this run" in probe("s3://bucket/run", run_dir)
    for look in (probe, check):
        with pytest.raises(RunError, match="is that of another run"):
            look("s3://bucket/run", tmp_path / "new")
    assert keys(s3) == {*files(run_dir), "archive.json"}


def test_a_store_that_never_answers_holds_up_neither_start_nor_end(
    run_dir: Path, opened: Open, s3: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "START_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        began = time.monotonic()
        assert not opened("s3://bucket/run", run_dir).close(0.3)
        assert time.monotonic() - began < 4
    assert "not done within" in said[-1]


def test_the_newest_and_the_best_are_kept_and_a_manifest_goes_first(
    run_dir: Path, tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there/checkpoints"
    archive = opened(f"file://{tmp_path}/there", run_dir, keep_last=2)
    deleted = hook(monkeypatch, "delete", lambda name: None)
    for step in (12, 16, 20):
        add_checkpoint(run_dir, step, val_bpb=3.0)
        passes(archive)
    assert [path.name for path in checkpoint.complete(there)] == ["step_00000004", "step_00000016", "step_00000020"]
    assert sorted(path.name for path in there.iterdir() if path.is_dir()) == ["step_00000004", "step_00000016", "step_00000020"]
    assert (there / "best").read_text() == "step_00000004\n" and (there / "latest").read_text() == "step_00000020\n"
    assert deleted[0] == "checkpoints/step_00000008/manifest.json"
    shutil.rmtree(run_dir / "checkpoints")  # what is gone here stays there
    passes(archive)
    assert len(checkpoint.complete(there)) == 3


def test_a_delete_that_breaks_off_leaves_nothing_that_looks_whole(
    run_dir: Path, tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, there = f"file://{tmp_path}/there", tmp_path / "there/checkpoints"
    assert opened(url, run_dir).close(10)

    def break_off(name: str) -> None:
        if not name.endswith("manifest.json"):
            raise OSError("the machine is gone")

    with monkeypatch.context() as patched:
        hook(patched, "delete", break_off)
        checkpoint.record_metrics(run_dir / "checkpoints", 8, {"val_bpb": 0.5})
        assert not opened(url, run_dir, keep_last=1).close(0.5)
    assert (there / "step_00000004").is_dir() and [path.name for path in checkpoint.complete(there)] == ["step_00000008"]
    assert opened(url, run_dir, keep_last=1).close(10)
    assert not (there / "step_00000004").exists()


def test_what_a_broken_transfer_has_left_is_removed(run_dir: Path, opened: Open, s3: Any) -> None:
    s3.put_object(Bucket="bucket", Key="run/checkpoints/step_00000002/state.json", Body=b"half")
    assert opened("s3://bucket/run", run_dir).close(10)
    assert not [name for name in keys(s3) if "step_00000002" in name]


def test_another_run_is_refused_and_not_touched(run_dir: Path, tmp_path: Path, opened: Open) -> None:
    url = f"file://{tmp_path}/there"
    assert opened(url, run_dir).close(10)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("another")
    with pytest.raises(RunError, match=r"is that of another run \(run: pid \d+ on .*another archive.url would be right"):
        opened(url, other)
    assert files(tmp_path / "there") == files(run_dir)
    (tmp_path / "there/archive.json").unlink()
    with pytest.raises(RunError, match="holds a run without archive.json"):
        opened(url, other)


def test_the_same_run_started_elsewhere_takes_over(run_dir: Path, tmp_path: Path, opened: Open, said: list[str]) -> None:
    url = f"file://{tmp_path}/there"
    first = opened(url, run_dir)
    passes(first)
    restored = restore(url, tmp_path / "restored", lambda _: None)
    add_checkpoint(restored, 12)
    second = opened(url, restored)
    passes(second)
    first.wake()
    wait_for(lambda: first.last_error)
    assert "was started elsewhere too" in said[0] and len(said) == 1
    add_checkpoint(run_dir, 16)
    assert not first.close(5) and len(said) == 1
    assert second.close(5)
    assert checkpoint.find(tmp_path / "there/checkpoints", "last").name == "step_00000012"


def test_a_restored_run_does_not_forget_the_best_one(run_dir: Path, tmp_path: Path, opened: Open) -> None:
    url, there = f"file://{tmp_path}/there", tmp_path / "there/checkpoints"
    assert opened(url, run_dir).close(10)
    restored = restore(url, tmp_path / "restored", lambda _: None)
    assert not (restored / "checkpoints/best").exists()  # it is not here
    add_checkpoint(restored, 12, val_bpb=1.5)  # the best that this machine knows
    assert (restored / "checkpoints/best").read_text() == "step_00000012\n"
    assert opened(url, restored, keep_last=1).close(10)
    assert [path.name for path in checkpoint.complete(there)] == ["step_00000004", "step_00000012"]
    assert (there / "best").read_text() == "step_00000004\n"


def test_a_run_that_begins_anew_is_told_that_the_archive_is_ahead(run_dir: Path, tmp_path: Path, opened: Open, said: list[str]) -> None:
    url, there = f"file://{tmp_path}/there", tmp_path / "there/checkpoints"
    assert opened(url, run_dir).close(10) and not said
    shutil.rmtree(run_dir / "checkpoints")
    add_checkpoint(run_dir, 2)
    archive = opened(url, run_dir, keep_last=1)
    passes(archive)
    assert len(said) == 1 and "has step_00000008, which is newer" in said[0]
    assert {"step_00000002", "step_00000008"} <= {path.name for path in checkpoint.complete(there)}


@pytest.mark.parametrize("module", ["paramiko", "s3fs"])
def test_a_missing_package_is_named_and_no_credentials_are(module: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import _registry

    scheme, wanted = {"paramiko": ("sftp", "paramiko"), "s3fs": ("s3", "pip install 'picotrain[s3]'")}[module]
    for name in (module, "fsspec.implementations.sftp"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(_registry, scheme, raising=False)
    with pytest.raises(RunError, match="needs another package") as caught:
        Archive(f"{scheme}://anna:open-sesame@host/x", run_dir, interval_s=1, min_age_s=0, keep_last=None, say=print)
    assert wanted in str(caught.value) and "anna" not in str(caught.value) and "sesame" not in str(caught.value)


@pytest.mark.parametrize("url", ["nothing://anna:open-sesame@b/x", "https://anna:open-sesame@h/x", "ftp://anna:open-sesame@127.0.0.1:9/x"])
def test_a_url_that_cannot_be_an_archive_is_refused_without_its_credentials(url: str, run_dir: Path, tmp_path: Path) -> None:
    for attempt in (
        lambda: Archive(url, run_dir, interval_s=1, min_age_s=0, keep_last=None, say=print),
        lambda: restore(url, tmp_path / "restored", print),
    ):
        with pytest.raises(RunError, match=r"archive \w+://\*\*\*@") as caught:
            attempt()
        assert "anna" not in str(caught.value) and "sesame" not in str(caught.value)
    assert not (tmp_path / "restored").exists()


def test_restore_refuses_names_that_leave_the_folder(run_dir: Path, tmp_path: Path, opened: Open, s3: Any) -> None:
    assert opened("s3://bucket/run", run_dir).close(10)
    for key in ("run/../evil", "run//etc/evil", "run/attempts/../../evil", "run/attempts\\..\\evil"):
        s3.put_object(Bucket="bucket", Key=key, Body=b"evil")
        with pytest.raises(RunError, match="names files outside of its folder"):
            restore("s3://bucket/run", tmp_path / "a/restored", print)
        assert not (tmp_path / "a/restored").exists() and not list(tmp_path.rglob("*evil*"))
        s3.delete_object(Bucket="bucket", Key=key)


def test_restore_refuses_a_manifest_that_leaves_the_folder(run_dir: Path, tmp_path: Path, opened: Open, said: list[str]) -> None:
    there = tmp_path / "there"
    assert opened(f"file://{there}", run_dir).close(10)
    manifest = there / "checkpoints/step_00000008/manifest.json"
    described = json.loads(manifest.read_text())
    described["files"]["../../../evil"] = describe(there / "config.yaml")
    manifest.write_text(json.dumps(described))
    restored = restore(f"file://{there}", tmp_path / "restored", said.append)
    assert "names no files, or files outside it" in said[0]
    assert [path.name for path in checkpoint.complete(restored / "checkpoints")] == ["step_00000004"]
    assert (restored / "checkpoints/best").read_text() == "step_00000004\n"


def test_restore_wants_an_empty_folder_and_begins_anew_after_an_interruption(run_dir: Path, tmp_path: Path, opened: Open) -> None:
    url, folder = f"file://{tmp_path}/there", tmp_path / "restored"
    assert opened(url, run_dir).close(10)
    folder.mkdir()
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(RunError, match="is not empty; name another folder"):
        restore(url, folder, print)
    assert files(folder) == {"mine.txt": b"precious"}
    (folder / "mine.txt").unlink()
    (folder / ".restoring/checkpoints").mkdir(parents=True)
    (folder / ".restoring/config.yaml").write_text("half")
    (folder / ".lock").write_text("")
    restore(url, folder, lambda _: None)
    assert (folder / "config.yaml").read_text() == "this is config.yaml\n" and not (folder / ".restoring").exists()


def test_restore_says_where_there_is_nothing_and_when_nothing_is_whole(run_dir: Path, tmp_path: Path, opened: Open, s3: Any) -> None:
    with pytest.raises(RunError, match="there is no archived run at"):
        restore(f"file://{tmp_path}/nowhere", tmp_path / "restored", print)
    with pytest.raises(RunError, match="there is nothing at s3://no-such-bucket/x"):
        restore("s3://no-such-bucket/x", tmp_path / "restored", print)
    there = tmp_path / "there"
    assert opened(f"file://{there}", run_dir).close(10)
    for path in checkpoint.complete(there / "checkpoints"):
        (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of its checkpoints is whole"):
        restore(f"file://{there}", tmp_path / "restored", lambda _: None)
    assert not (tmp_path / "restored").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., list[str]]) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    done = picotrain("train", *tiny(run_dir, "train.save_every=4", "train.max_steps=8"))
    assert done.returncode == 0, done.stderr
    return run_dir


def test_a_run_goes_on_from_its_archive_as_if_it_had_never_moved(
    trained: Path, tmp_path: Path, opened: Open, s3: Any, said: list[str]
) -> None:
    stayed = tmp_path / "stayed"
    shutil.copytree(trained, stayed)
    assert opened("s3://bucket/run", trained).close(30)
    newest = checkpoint.find(trained / "checkpoints", "last").name
    weights = next(name for name in keys(s3) if newest in name and name.endswith(".safetensors"))
    body = bytearray(s3.get_object(Bucket="bucket", Key=f"run/{weights}")["Body"].read())
    body[-1] ^= 1  # the size stays, the hash does not
    s3.put_object(Bucket="bucket", Key=f"run/{weights}", Body=bytes(body))

    moved = restore("s3://bucket/run", tmp_path / "moved", said.append)
    assert any("WARNING" in line and newest in line and "falling back" in line for line in said)
    assert checkpoint.read_state(checkpoint.find(moved / "checkpoints", "last"))["step"] == 4
    for process in [start("resume", str(folder), "train.max_steps=12") for folder in (moved, stayed)]:
        assert process.communicate(timeout=120)[1] is None and process.returncode == 0
    assert len(losses(moved)) == 12 and losses(moved) == losses(stayed)


@pytest.fixture
def blocked(tmp_path: Path) -> Path:
    """A folder that takes a run's files, but no checkpoint."""
    folder = tmp_path / "archive"
    folder.mkdir()
    (folder / "checkpoints").write_text("a file where a folder is to be")
    return folder


def trouble(run_dir: Path) -> list[str]:
    return [event["name"] for event in lines(run_dir, "event") if event["name"] in (FAILED, WORKS)]


def test_an_archive_that_lacks_the_end_is_an_exit_code_and_stands_in_the_run(blocked: Path, tmp_path: Path, tiny: Any) -> None:
    run = tmp_path / "run"
    words = tiny(run, f"archive.url={blocked}", "archive.close_s=0.5", "train.save_every=6")
    done = picotrain("train", *words)
    assert done.returncode == 5 and "Traceback" not in done.stderr and "picotrain resume" in done.stderr.splitlines()[-1], done.stderr
    assert len(losses(run)) == 12
    assert trouble(run)[-1] == FAILED and trouble(run).count(FAILED) <= 3  # at the first save, at the end, perhaps another reason
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and "lacks the end" in summary["archive_trouble"]
    assert "lacks the end" in (run / "report.md").read_text()

    (blocked / "checkpoints").unlink()
    done = picotrain("resume", str(run))
    assert done.returncode == 0, done.stderr
    assert trouble(run)[-1] == WORKS and json.loads((run / "summary.json").read_text())["archive_trouble"] is None
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    there = files(blocked)
    assert {name: data for name, data in files(run).items() if name in there} == there
    assert "checkpoints/latest" in there and there["metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()


def test_a_signal_shortens_the_wait_for_an_archive_whoever_started_the_ranks(blocked: Path, tmp_path: Path, tiny: Any) -> None:
    run = tmp_path / "run"
    words = [f"archive.url={blocked}", "launch.grace_s=4", "hardware.nproc_per_node=2", "train.max_steps=2"]
    process = start("train", *tiny(run, *words))
    wait_for((run / "summary.json").exists, 120)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 5 and time.monotonic() - began < 30, out
    assert "a signal makes it shorter" in out and "Traceback" not in out
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"


def test_an_archive_that_cannot_be_is_said_before_a_run_is_made(tmp_path: Path, tiny: Any, s3: Any) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    run = tmp_path / "runs/mine"
    urls = ["s3://no-such-bucket/x", str(run), f"file://{run}/there", f"{link}/runs/mine/there", f"{link}/runs"]
    for url in urls:
        done = picotrain("train", *tiny(run, f"archive.url={url}"))
        assert done.returncode == 2 and "archive" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr, (url, done.stderr)
        assert not run.exists(), url


def test_what_a_strangers_config_reads_and_sends_is_said_before(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from picotrain.cli import checks

    moved, archive = tmp_path / "moved", tmp_path / "sent"
    shutil.copytree(trained, moved)
    bundle = tmp_path / "bundle"
    config = (moved / "config.yaml").read_text().replace("  url: null", f"  url: {archive}").replace("bundle: null", f"bundle: {bundle}")
    (moved / "config.yaml").write_text(config)
    corpus = next(line.partition(": ")[2] for line in config.splitlines() if line.startswith("  path: /"))
    for words in (["resume", str(moved)], ["train", "--config", str(moved / "config.yaml"), f"run.dir={tmp_path / 'new'}"]):
        err = picotrain(*words).stderr
        assert err.index(f"reads text from {corpus} (data.path)") < err.index("error" if "error" in err else "everything")
        assert f"to {archive} (archive.url)" in err and f"reads CORE tasks from {bundle} (evaluation.core.bundle)" in err
    said = picotrain("resume", str(moved), "archive.url=null").stderr
    assert "(data.path)" in said and "(archive.url)" not in said  # what was typed is known
    with pytest.raises(RunError, match="bundle"):
        checks.check(moved, "last", None, checks.Options())
    err = capfd.readouterr().err
    assert f"reads text from {corpus} (data.json)" in err and f"CORE tasks from {bundle}" in err


def test_a_run_mirrors_itself_and_goes_on_from_its_url_on_an_empty_machine(tmp_path: Path, tiny: Any) -> None:
    straight, run, moved = tmp_path / "straight", tmp_path / "run", tmp_path / "moved"
    url = f"file://{tmp_path}/archive/run"
    assert picotrain("train", *tiny(straight)).returncode == 0
    done = picotrain("train", *tiny(run, "train.max_steps=6", f"archive.url={url}"))
    assert done.returncode == 0, done.stderr
    assert "train.save_every=1000" in done.stderr  # -1 would leave nothing to mirror
    shutil.rmtree(run)
    done = picotrain("resume", url, f"run.dir={moved}", "train.max_steps=12")
    assert done.returncode == 0, done.stderr
    assert losses(moved) == losses(straight)
    again = picotrain("resume", url, f"run.dir={moved}", "train.max_steps=14")
    assert again.returncode == 2 and "Traceback" not in again.stderr  # the folder is not empty
