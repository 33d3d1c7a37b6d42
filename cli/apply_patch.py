"""`ie apply-patch`: verify patches, show what they change; merge them or write a PEFT adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ie.errors import EditFailedError, InputError

from .files import check_model, check_new
from .options import BaseOf, Debug, Device, Dtype, Force, Json, Quant, Quiet
from .render import reporting

__all__ = ["apply_patch"]


def apply_patch(
    patches: Annotated[list[Path], typer.Argument(metavar="PATCH", help="Patch files, applied together.")],
    model: BaseOf = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="P", help="Prompt to answer; may be repeated.")
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option("--scale", metavar="S", help="Strength of the edit.", show_default="the patch's, 1.0"),
    ] = None,
    merge: Annotated[
        Path | None, typer.Option("--merge", metavar="DIR", help="Write a checkpoint with the edit in it.")
    ] = None,
    peft: Annotated[Path | None, typer.Option("--peft", metavar="DIR", help="Write a PEFT (LoRA) adapter.")] = None,
    quant: Quant = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Verify and preview patches; merge them, or export to PEFT."""
    with reporting(json=json, quiet=quiet, debug=debug) as render:
        _check(patches, model, prompt or [], scale)
        for folder, flag in ((merge, "--merge"), (peft, "--peft")):
            if folder is not None:
                check_new(folder, force=force, flag=flag)

        from ie.patch.apply import apply_patch as apply

        from .tables import apply_view

        result = apply(
            patches, model=model, prompts=tuple(prompt or ()), scale=scale, merge=merge, peft=peft,
            quant=quant, dtype=dtype, device=device, force=force,
        )  # fmt: skip
        render.result(result, *apply_view(result))
        took = result["took"]
        if took is False or (isinstance(took, list) and not all(took)):
            raise EditFailedError("the edit does not take on this base", hint="`ie inspect` shows what it was made for")


def _check(patches: list[Path], model: str | None, prompts: list[str], scale: float | None) -> None:
    """Refuse what can be refused without torch."""
    import math

    from ie.header import factor_shapes, read_document

    if model is not None:
        check_model(model)
    for path in patches:
        factor_shapes(path, read_document(path)[1])
    if not all(text.strip() for text in prompts):
        raise InputError("--prompt: empty, expected a text")
    if scale is not None and not math.isfinite(scale):
        raise InputError(f"--scale {scale}: expected a finite number")
