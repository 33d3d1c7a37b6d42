"""Each hostile file is refused as said: the right exit code, one sentence, no traceback, nothing on the disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from ie.cli.app import app
from typer.main import get_command

from tests.patch.hostile import KINDS, write_all

COMMAND = get_command(app)  # made once: a runner would make all commands anew for each of two hundred calls


class Said(NamedTuple):
    code: object
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("hostile")
    return {**write_all(place), "good": place / "good.safetensors"}


@pytest.fixture
def ie(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*args: object) -> Said:
        with pytest.raises(SystemExit) as end:
            COMMAND([*map(str, args)], prog_name="ie")
        return Said(end.value.code, *capsys.readouterr())

    return run


def test_there_are_many() -> None:
    assert len(KINDS) >= 40
    document = Path(__file__).parents[2] / "docs" / "patch-format.md"
    assert f"writes {len(KINDS)} files" in document.read_text(encoding="utf-8")


def test_the_good_one_is_taken(ie: Callable[..., Said], folder: dict[str, Path], tmp_path: Path) -> None:
    result = ie("apply-patch", folder["good"], "--out", tmp_path / "out", "--json")
    assert result.code == 3, result.stderr  # constant factors are an update, but no edit
    assert json.loads(result.stdout)["patches"][0]["took"] is False
    assert (tmp_path / "out").is_file()


@pytest.mark.parametrize("name", KINDS)
def test_it_is_refused_as_said(name: str, ie: Callable[..., Said], folder: dict[str, Path], tmp_path: Path) -> None:
    kind, path = KINDS[name], folder[name]
    before = sorted(os.listdir(path.parent))
    outputs = ("--out", tmp_path / "out", "--merge", tmp_path / "merged", "--peft", tmp_path / "adapter")
    result = ie("apply-patch", path, *outputs)
    assert result.code == kind.code, result.stderr
    first, *rest = result.stderr.splitlines()
    assert first.startswith("error: ") and kind.said in first
    assert "Traceback" not in result.stderr and len(rest) <= 1
    assert result.stdout == ""
    assert not list(tmp_path.iterdir()) and sorted(os.listdir(path.parent)) == before


@pytest.mark.parametrize("name", KINDS)
def test_inspect_neither_crashes_nor_steers_the_terminal(
    name: str, ie: Callable[..., Said], folder: dict[str, Path]
) -> None:
    result = ie("inspect", folder[name])
    if KINDS[name].seen:
        assert result.code == 2, result.stdout
        assert result.stdout == "" and result.stderr.startswith("error: ")
    else:  # what only the values or the base show
        assert result.code == 0, result.stderr
    assert "\x1b" not in result.stdout + result.stderr
