"""metrics.jsonl: whole lines, strict JSON, and a file that a resume can cut back."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from picotrain.errors import RunError
from picotrain.metrics import Cut, MetricsFile, read_metrics


def forbid(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, *records: dict) -> None:
    file = MetricsFile(path)
    for record in records:
        file.write(record)
    file.close()


def test_what_is_written_is_read_back_with_non_finite_numbers_as_null(path: Path) -> None:
    write(path, {"step": 0, "loss": float("nan"), "more": (float("inf"), np.float32("nan"), np.float32(0.5)), "n": np.int64(3)})
    assert json.loads(path.read_text(), parse_constant=forbid) == {"step": 0, "loss": None, "more": [None, None, 0.5], "n": 3}
    assert list(read_metrics(path)) == [{"step": 0, "loss": None, "more": [None, None, 0.5], "n": 3}]


def test_text_with_line_ends_of_any_kind_stays_one_line(path: Path) -> None:
    text = "a\nb\r\nc\u2028d\u2029e\x85f\x0bg 日本 \ud800"
    write(path, {"text": text}, {"step": 1})
    assert len(path.read_text("utf-8").splitlines()) == 2
    assert next(read_metrics(path)) == {"text": text.replace("\ud800", "?")}


def test_a_torn_last_line_is_passed_over_by_readers_and_moved_aside_by_the_next_writer(path: Path) -> None:
    write(path, {"step": 0})
    with path.open("ab") as file:
        file.write(b'{"step": 1, "lo')
    assert list(read_metrics(path)) == [{"step": 0}]
    write(path, {"step": 1})
    assert list(read_metrics(path)) == [{"step": 0}, {"step": 1}]
    (torn,) = read_metrics(path.with_name("metrics.cut.jsonl"))
    assert torn == {"kind": "torn", "text": '{"step": 1, "lo'}


@pytest.mark.parametrize("damage", [b"\x00\x00\x00\n", b'{"step": \n', b"[1, 2]\n", b"\xff\xfe{}\n"])
def test_damage_before_the_end_is_an_error_that_names_the_line(path: Path, damage: bytes) -> None:
    path.write_bytes(b'{"step": 0}\n' + damage + b'{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2 is damaged"):
        list(read_metrics(path))


def test_a_missing_file_is_a_users_error(path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read: No such file"):
        list(read_metrics(path))
    with pytest.raises(RunError, match="cannot be written: No such file"):
        MetricsFile(path.parent / "nowhere" / "metrics.jsonl")


def test_cutting_back_keeps_what_is_cut_off_in_one_file_that_grows(path: Path) -> None:
    file, kept = MetricsFile(path), path.with_name("metrics.cut.jsonl")
    file.write({"step": 0})
    n_bytes = file.size_bytes()
    assert n_bytes == path.stat().st_size
    for attempt in (1, 2, 3):
        file.write({"step": 1, "kind": "train", "attempt": attempt})
        before = kept.stat().st_size if kept.exists() else 0
        cut = file.truncate_to(n_bytes)
        assert cut == Cut(kept.stat().st_size - before, kept)
        assert [line["attempt"] for line in read_metrics(kept)] == list(range(1, attempt + 1))
    assert file.truncate_to(n_bytes) == Cut()
    file.write({"step": 1})
    file.close()
    assert list(read_metrics(path)) == [{"step": 0}, {"step": 1}]
    assert sorted(other.name for other in path.parent.iterdir()) == ["metrics.cut.jsonl", "metrics.jsonl"]


def test_what_only_happened_stays_and_steps_and_measurements_are_cut_with_all_that_follows(path: Path) -> None:
    happened = [{"step": 1, "kind": "checkpoint"}, {"step": 1, "kind": "event", "name": "stopped"}]
    repeated = [{"step": 1, "kind": "val"}, {"step": 1, "kind": "event", "name": "finished"}]
    file = MetricsFile(path)
    file.write({"step": 0, "kind": "train"})
    n_bytes = file.size_bytes()
    for record in happened:
        file.write(record)
    assert file.truncate_to(n_bytes) == Cut()  # as after a clean stop
    for record in repeated:
        file.write(record)
    assert file.truncate_to(n_bytes).cut_bytes > 0
    file.close()
    assert list(read_metrics(path))[1:] == happened
    assert list(read_metrics(path.with_name("metrics.cut.jsonl"))) == repeated


def test_a_kill_between_keeping_and_dropping_keeps_nothing_twice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MetricsFile(path)
    file.write({"step": 0, "kind": "train"})
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            file.truncate_to(0)
    assert file.truncate_to(0).cut_bytes > 0
    file.close()
    assert len(list(read_metrics(path.with_name("metrics.cut.jsonl")))) == 1 and not path.read_bytes()


def test_a_length_inside_a_line_is_refused_and_a_shorter_file_is_reported(path: Path) -> None:
    file = MetricsFile(path)
    file.write({"step": 0})
    size = file.size_bytes()
    with pytest.raises(RunError, match="byte 5 does not end a line"):
        file.truncate_to(5)
    assert file.truncate_to(size + 7) == Cut(missing_bytes=7)
    assert path.stat().st_size == size
    file.close()


@pytest.mark.parametrize("fault", ["error", "short"])
def test_lines_that_find_no_space_wait_and_leave_no_half_line(path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = MetricsFile(path)
    file.write({"step": 0})
    real = os.write

    def full(fd: int, line: bytes) -> int:
        if fault == "short":
            return real(fd, line[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        file.write({"step": 1})
        file.write({"step": 2})
        assert file.waiting_lines == 2
        assert list(read_metrics(path)) == [{"step": 0}]
        assert path.read_bytes().endswith(b"\n")
        with pytest.raises(RunError, match="2 lines cannot be written"):
            file.size_bytes()
    file.write({"step": 3})
    assert file.waiting_lines == 0
    file.close()
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 3]
