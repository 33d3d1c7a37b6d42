from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import ie

ROOT = Path(__file__).parents[2]


def test_all_is_sorted_and_listed() -> None:
    assert ie.__all__ == sorted(ie.__all__)
    assert set(ie.__all__) <= set(dir(ie))


def test_each_public_name_can_be_imported() -> None:
    for name in ie.__all__:
        assert getattr(ie, name) is not None


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ie.nonsense  # noqa: B018


def test_each_package_is_declared() -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {file.parent for file in (ROOT / "ie").rglob("*.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert found | {"ie.cli", "ie.templates"} == declared


def test_constraints_name_exact_versions_and_no_place() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 and not set("/@+") & set(line) for line in lines)
