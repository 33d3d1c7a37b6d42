"""`ie inspect`: what a patch, an editor or a dataset is, from its header alone (no torch)."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer

from ie.errors import InputError

from .files import read_dataset_info, read_editor_info
from .options import Debug, Json, Quiet
from .render import reporting

__all__ = ["describe", "inspect"]

_EXPECTED = "expected a patch, an adapter, an editor or a dataset"


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A patch, a LoRA adapter, an editor or a dataset.")],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Say what a patch, an editor or a dataset is."""
    with reporting(json=json, quiet=quiet, debug=debug, logs=False) as render:
        result = describe(path)
        if render.as_json:
            render.result(result)
            return
        from .tables import inspect_view

        render.result(result, *inspect_view(result))


def describe(path: Path) -> dict[str, Any]:
    """Return what the file or folder says about itself; `kind` says what it is."""
    if not path.exists():
        raise InputError(f"there is nothing at {path}", hint=_EXPECTED)
    if path.is_file():
        return _patch(path)

    from ie.adapter import is_adapter  # here: a patch has no use for it

    if is_adapter(path):
        return _adapter(path)
    if (path / "dataset.json").is_file():
        return {"kind": "dataset", "path": str(path), "bytes": _size(path), **_rest(read_dataset_info(path))}
    if (path / "editor.json").is_file():
        return _editor(path)
    if (path / "config.json").is_file():
        raise InputError(f"{path} is a model folder", hint=_EXPECTED)
    raise InputError(
        f"{path} is neither an editor nor a dataset: it has neither editor.json nor dataset.json", hint=_EXPECTED
    )


def _patch(path: Path) -> dict[str, Any]:
    from ie.header import factor_shapes, read_document

    document, tensors = read_document(path)
    shapes = factor_shapes(path, tensors)
    norms = document.get("norms")
    norms = norms if isinstance(norms, dict) else {}
    modules = {
        name: {
            "rank": rank, "norm": norms.get(name), "A": [rank, d_in], "B": [rank, d_out],
            "dtype": tensors[f"{name}.A"][0],
        }
        for name, (rank, d_in, d_out) in shapes.items()
    }  # fmt: skip
    return {
        "kind": "patch", "path": str(path), "bytes": path.stat().st_size, **_rest(document, "norms"),
        "rank": max(rank for rank, _, _ in shapes.values()), "modules": modules,
    }  # fmt: skip


def _adapter(path: Path) -> dict[str, Any]:
    """A PEFT LoRA adapter, as the patch that `ie apply-patch` takes it for."""
    from ie.adapter import read_adapter

    adapter = read_adapter(path)
    modules = {
        name: {
            "rank": lora.rank, "norm": None, "A": [lora.rank, lora.d_in], "B": [lora.rank, lora.d_out],
            "dtype": lora.dtype, "scaling": lora.scaling,
        }
        for name, lora in adapter.modules.items()
    }  # fmt: skip
    return {
        "kind": "patch", "format": "peft", "path": str(path), "bytes": _size(path), "base": {"id": adapter.base},
        "rank": max(lora.rank for lora in adapter.modules.values()), "modules": modules,
    }  # fmt: skip


def _editor(path: Path) -> dict[str, Any]:
    from ie.header import read_header

    document = read_editor_info(path)
    _, tensors = read_header(path / "editor.safetensors")
    return {
        "kind": "editor", "path": str(path), "bytes": _size(path),
        **_rest(document), "n_tensors": len(tensors), "n_values": sum(prod(shape) for _, shape in tensors.values()),
    }  # fmt: skip


def _rest(document: dict[str, Any], *shown_elsewhere: str) -> dict[str, Any]:
    """The document without the keys that `inspect` sets itself."""
    own = ("kind", "path", "bytes", *shown_elsewhere)
    return {key: value for key, value in document.items() if key not in own}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
