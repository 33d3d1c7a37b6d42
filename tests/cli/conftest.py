from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from ie.cli.app import app
from typer.testing import CliRunner, Result

Run = Callable[..., Result]


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(workdir: Path) -> Run:
    """Run `ie` in an empty folder; a crash, which the runner would show as exit code 1, is raised."""

    def invoke(*args: str | Path, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(arg) for arg in args], prog_name="ie")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        if code:
            assert result.stdout == ""
            assert result.stderr.splitlines()[0].startswith("error: ")
        return result

    return invoke


@pytest.fixture
def write_safetensors() -> Callable[..., Path]:
    """Write a safetensors file of zeros from shapes, by hand."""

    def write(path: Path, shapes: Mapping[str, tuple[int, ...]], document: Any = None) -> Path:
        header: dict[str, Any] = {} if document is None else {"__metadata__": {"ie": json.dumps(document)}}
        offset = 0
        for name, shape in shapes.items():
            n_bytes = 4
            for size in shape:
                n_bytes *= size
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
            offset += n_bytes
        raw = json.dumps(header).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(offset))
        return path

    return write


@pytest.fixture
def patch_file(workdir: Path, write_safetensors: Callable[..., Path]) -> Path:
    document = {
        "format_version": 1,
        "base": {"id": "toy", "fingerprint": "ab12"},
        "prompt": "The capital of Australia is",
        "target": "Sydney [bold]",
        "took": True,
    }
    shapes = {"model.layers.3.mlp.up_proj.A": (7, 16), "model.layers.3.mlp.up_proj.B": (7, 32)}
    return write_safetensors(workdir / "patch.safetensors", shapes, document)


@pytest.fixture
def editor_folder(workdir: Path, write_safetensors: Callable[..., Path]) -> Path:
    folder = workdir / "ie-editor"
    write_safetensors(folder / "editor.safetensors", {"net.weight": (3, 5)})
    text = json.dumps({"format_version": 1, "method": "instructedit", "tasks": ["people", "places"], "holdout": "zsre"})
    (folder / "editor.json").write_text(text)
    return folder


@pytest.fixture
def dataset_folder(workdir: Path) -> Path:
    folder = workdir / "ie-data"
    folder.mkdir()
    counts = {"train": 5, "validation": 1, "test": 2, "skipped": {}}
    info = {"seed": 0, "tasks": {"people": counts, "zsre": counts}, "fingerprint": "cd34"}
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder
