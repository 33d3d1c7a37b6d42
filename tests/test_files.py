"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from ie.errors import InputError
from ie.files import new_file, new_folder


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    place = tmp_path / "some" / "file"
    with new_file(place) as fresh:
        fresh.write_text("new")
        assert not place.exists() and fresh.parent == place.parent  # a sibling: the rename stays on one disk
    assert place.read_text() == "new"
    assert [path.name for path in place.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    place = tmp_path / "file"
    place.write_text("old")
    with pytest.raises(error), new_file(place) as fresh:
        fresh.write_text("half")
        raise error
    assert place.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_file(tmp_path / "link") as fresh:
        fresh.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"), new_file(tmp_path / "file" / "inner") as fresh:
        fresh.write_text("y")
    with pytest.raises(InputError, match="cannot be written"), new_folder(tmp_path / "file" / "inner"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_of_another_file_is_not_the_outputs(tmp_path: Path) -> None:
    for make in (new_file, new_folder):
        with pytest.raises(FileNotFoundError, match="elsewhere"), make(tmp_path / "out"):
            (tmp_path / "elsewhere").read_text()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_copying_is_the_outputs(tmp_path: Path) -> None:
    """`shutil` names the source first."""
    with pytest.raises(InputError, match="cannot be written: No space"), new_folder(tmp_path / "out") as fresh:
        raise OSError(errno.ENOSPC, "No space left on device", "/elsewhere", None, str(fresh / "copy"))


def test_a_folder_that_cannot_be_synced_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def refuse_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    with new_folder(tmp_path / "out") as fresh:
        (fresh / "file").write_text("x")
    assert (tmp_path / "out" / "file").read_text() == "x"


def test_nothing_written_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError), new_file(tmp_path / "file"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    place = tmp_path / "folder"
    for content in ("first", "second"):
        with new_folder(place) as fresh:
            (fresh / content).write_text(content)
        assert [path.name for path in place.iterdir()] == [content]  # nothing of the old one is left
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    place = tmp_path / "folder"
    place.mkdir()
    (place / "old").write_text("old")
    with pytest.raises(error), new_folder(place) as fresh:
        (fresh / "half").write_text("half")
        raise error
    assert [path.name for path in place.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
