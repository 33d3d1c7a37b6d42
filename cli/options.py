"""Options that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = [
    "DEFAULT_DATA",
    "DEFAULT_EDITOR",
    "DEFAULT_HOLDOUT",
    "DEFAULT_MODEL",
    "DEFAULT_PATCH",
    "BaseOf",
    "Data",
    "Debug",
    "Device",
    "Dtype",
    "Force",
    "Json",
    "Model",
    "Quant",
    "Quiet",
    "Seed",
    "Templates",
    "examples",
]

DEFAULT_MODEL = "toy"
DEFAULT_DATA = Path("ie-data")
DEFAULT_EDITOR = Path("ie-editor")
DEFAULT_PATCH = Path("patch.safetensors")
DEFAULT_HOLDOUT = "zsre"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress on stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' logs.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is already there.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of everything random.")]
Templates = Annotated[
    Path | None, typer.Option("--templates", metavar="DIR", help="Own templates, instead of the bundled.")
]
Model = Annotated[str, typer.Option("--model", "-m", metavar="M", help="Base model: toy, a folder or a hub id.")]
Data = Annotated[Path, typer.Option("--data", metavar="DIR", help="Dataset folder, as `ie build` makes it.")]
BaseOf = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="M", help="Base model: toy, a folder or a hub id.", show_default="its base"),
]
Quant = Annotated[
    Literal["auto", "8bit", "4bit", "none"], typer.Option("--quant", help="auto: 8bit on a GPU, none on a CPU.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", metavar="D", help="auto, float32, bfloat16 or float16."),
]
Device = Annotated[str, typer.Option("--device", metavar="DEV", help="auto, cpu, cuda or cuda:N.")]


def examples(*lines: str) -> str:
    """Return the examples that stand below a command's help, kept line by line."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
