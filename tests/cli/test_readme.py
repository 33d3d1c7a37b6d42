"""What the README tells people to type exists: each command and each of its flags."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from ie.cli.app import app
from typer.testing import CliRunner

README = Path(__file__).parents[2] / "README.md"


def commands() -> list[str]:
    """The indented `ie ...` lines, continuation lines joined, comments cut."""
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^    (ie .*?)(?:\s+#.*)?$", text, re.MULTILINE)


def test_there_are_examples() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("line", commands())
def test_every_flag_exists(line: str) -> None:
    _, command, *rest = shlex.split(line)
    shown = CliRunner().invoke(app, [command, "--help"], prog_name="ie")
    assert shown.exit_code == 0
    for flag in rest:
        if flag.startswith("--"):
            assert re.search(rf"{flag}\b", shown.stdout), flag
