from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_patch(run: Any, patch_file: Path) -> None:
    shown = json.loads(run("inspect", patch_file, "--json").stdout)
    assert shown["kind"] == "patch"
    assert shown["bytes"] == patch_file.stat().st_size
    assert shown["rank"] == 7
    assert shown["took"] is True
    assert shown["base"]["id"] == "toy"
    assert shown["modules"] == {
        "model.layers.3.mlp.up_proj": {"rank": 7, "norm": None, "dtype": "F32", "A": [7, 16], "B": [7, 32]}
    }


def test_patch_for_people(run: Any, patch_file: Path) -> None:
    text = run("inspect", patch_file).stdout
    assert "model.layers.3.mlp.up_proj" in text
    assert "7 x 16" in text
    assert "Sydney [bold]" in text  # no markup is read from a file
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_editor(run: Any, editor_folder: Path) -> None:
    shown = json.loads(run("inspect", editor_folder, "--json").stdout)
    assert shown["kind"] == "editor"
    assert shown["tasks"] == ["people", "places"]
    assert (shown["n_tensors"], shown["n_values"]) == (1, 15)
    assert "people, places" in run("inspect", editor_folder).stdout


def test_dataset(run: Any, dataset_folder: Path) -> None:
    shown = json.loads(run("inspect", dataset_folder, "--json").stdout)
    assert shown["kind"] == "dataset"
    assert shown["tasks"]["people"]["train"] == 5
    assert "people" in run("inspect", dataset_folder).stdout


def test_weights_are_no_patch(run: Any, workdir: Path, write_safetensors: Callable[..., Path]) -> None:
    write_safetensors(workdir / "model.safetensors", {"w": (2, 2)})
    assert "is no patch" in run("inspect", "model.safetensors", code=2).stderr


def test_a_document_that_is_no_object(run: Any, workdir: Path, write_safetensors: Callable[..., Path]) -> None:
    write_safetensors(workdir / "odd.safetensors", {"w": (2, 2)}, document=[1])
    assert "not a JSON object" in run("inspect", "odd.safetensors", code=2).stderr


@pytest.mark.parametrize("content", [b"", b"hello", b"# text that is longer than eight bytes\n"])
def test_other_files(content: bytes, run: Any, workdir: Path) -> None:
    Path("file").write_bytes(content)
    assert "cannot be read as safetensors" in run("inspect", "file", code=2).stderr


def test_other_folders(run: Any, workdir: Path) -> None:
    Path("model").mkdir()
    assert "neither an editor nor a dataset" in run("inspect", "model", code=2).stderr
    Path("model/config.json").write_text("{}")
    assert "is a model folder" in run("inspect", "model", code=2).stderr


def test_an_editor_without_weights(run: Any, editor_folder: Path) -> None:
    (editor_folder / "editor.safetensors").unlink()
    assert "has no editor.safetensors" in run("inspect", editor_folder, code=2).stderr


@pytest.mark.parametrize("text", ["{}", '{"tasks": ["people"]}', '{"tasks": {"people": 3}}', "[]", "{"])
def test_a_broken_dataset(text: str, run: Any, dataset_folder: Path) -> None:
    (dataset_folder / "dataset.json").write_text(text)
    assert "dataset.json" in run("inspect", dataset_folder, code=2).stderr


def test_an_editor_whose_tasks_are_no_list(run: Any, editor_folder: Path) -> None:
    (editor_folder / "editor.json").write_text('{"tasks": 3}')
    assert "`tasks` is no list" in run("inspect", editor_folder, code=2).stderr


def test_tensors_that_are_no_factors(run: Any, workdir: Path, write_safetensors: Callable[..., Path]) -> None:
    write_safetensors(workdir / "odd.safetensors", {"w": (2, 2)}, document={})
    assert "is no valid patch" in run("inspect", "odd.safetensors", code=2).stderr
    assert "is no valid patch" in run("apply-patch", "odd.safetensors", code=2).stderr
