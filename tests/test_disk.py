"""Files are written whole or not at all, and nothing that somebody else has put there is followed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from picotrain import disk


@pytest.mark.parametrize("shared", [False, True])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path, shared: bool):
    path = tmp_path / "a.json"
    disk.write_whole(path, "before", shared=shared)

    def fail(temporary: Path, name: Path) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        disk.write_whole(path, "after", fail, shared)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a.json"]


def test_a_temporary_file_that_a_kill_left_is_written_over(tmp_path: Path):
    (tmp_path / ".a.json.tmp").write_text("half of something longer than what comes")
    disk.write_whole(tmp_path / "a.json", "whole")
    assert (tmp_path / "a.json").read_text() == "whole" and os.listdir(tmp_path) == ["a.json"]


def test_a_link_in_the_place_of_the_temporary_file_is_neither_followed_nor_removed(tmp_path: Path):
    (tmp_path / ".a.json.tmp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        disk.write_whole(tmp_path / "a.json", "whole")
    assert os.listdir(tmp_path) == [".a.json.tmp"]


def test_json_holds_names_that_are_no_unicode(tmp_path: Path):
    disk.write_json(tmp_path / "a.json", {"name": os.fsdecode(b"caf\xe9")})
    assert disk.read_json(tmp_path / "a.json") == {"name": os.fsdecode(b"caf\xe9")}
    with pytest.raises(ValueError):
        disk.write_json(tmp_path / "b.json", float("nan"))
    assert os.listdir(tmp_path) == ["a.json"]
