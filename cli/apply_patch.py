"""`ie apply-patch`: verify patches, show what they change; stack them, merge them or write an adapter."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ie.errors import EditFailedError, InputError

from .files import check_model, check_names, check_new_file, check_new_folder
from .options import BaseOf, Debug, Device, Json, Quant, Quiet
from .render import reporting

__all__ = ["apply_patch"]


def apply_patch(
    patches: Annotated[
        list[Path], typer.Argument(metavar="PATCH", help="Patch files or LoRA adapter folders, applied together.")
    ],
    model: BaseOf = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="P", help="Prompt to answer; may be repeated.")
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option("--scale", metavar="S", help="Strength of the edit.", show_default="the patch's, 1.0"),
    ] = None,
    leave_out: Annotated[
        list[str] | None,
        typer.Option("--without", metavar="NAME", help="Take an edit out, by file name or number; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="F", help="Write all edits as one patch.")] = None,
    merge: Annotated[
        Path | None, typer.Option("--merge", metavar="DIR", help="Write a checkpoint with the edit in it.")
    ] = None,
    peft: Annotated[Path | None, typer.Option("--peft", metavar="DIR", help="Write a PEFT (LoRA) adapter.")] = None,
    check: Annotated[
        list[str] | None,
        typer.Option("--check", metavar="SERVER", help="Would vllm, sglang or llama.cpp take it? Repeatable."),
    ] = None,
    quant: Quant = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option("--dtype", metavar="D", help="To compute in, and of a merged checkpoint (auto: its own)."),
    ] = "auto",
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Overwrite; merge even if rounding loses the edit.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Verify and preview patches; stack, merge, or export to PEFT."""
    with reporting(json=json, quiet=quiet, debug=debug) as render:
        _check(patches, model, prompt or [], scale, check or [])
        if out is not None:
            check_new_file(out, force=force)
        for place, flag, marker in ((merge, "--merge", "config.json"), (peft, "--peft", "adapter_config.json")):
            if place is not None:
                check_new_folder(place, marker, force=force, flag=flag)
        places = [place.resolve() for place in (out, merge, peft) if place is not None]
        if any(one.is_relative_to(other) for one, other in permutations(places, 2)):  # a folder is replaced whole
            raise InputError("--out, --merge and --peft need places of their own, none below another")

        from ie.patch.apply import apply_patch as apply

        from .tables import apply_view

        result = apply(
            patches, model=model, prompts=tuple(prompt or ()), scale=scale, leave_out=tuple(leave_out or ()), out=out,
            merge=merge, peft=peft, servers=tuple(check or ()), quant=quant, dtype=dtype, device=device, force=force,
        )  # fmt: skip
        render.result(result, *apply_view(result))
        for one in result["disturbed"]:
            render.note(f"warning: {one['patch']} ({one['prompt']!r}) takes alone, but not beside {_company(one)}")
        if result["took"] is False:
            edits = [one for entry in result["patches"] for one in entry.get("edits", [entry])]
            asked = [one["took"] for one in edits if one["took"] is not None]
            many = f"{asked.count(False)} of {len(asked)} edits do" if len(asked) > 1 else "the edit does"
            raise EditFailedError(f"{many} not take on this base", hint="`ie inspect` shows what was asked for")


def _company(disturbed: dict[str, Any]) -> str:
    """Name those that disturb an edit."""
    names = disturbed["by"]
    if not names:
        return f"all others together (most by {disturbed['most_by']})"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check(patches: list[Path], model: str | None, prompts: list[str], scale: float | None, servers: list[str]) -> None:
    """Refuse what can be refused without torch."""
    import math

    from ie.adapter import is_adapter, read_adapter
    from ie.header import factor_shapes, read_document
    from ie.servers import SERVERS

    check_names(servers, SERVERS, "--check", "server")
    if model is not None:
        check_model(model)
    for path in patches:
        if is_adapter(path):
            read_adapter(path)
        else:
            factor_shapes(path, read_document(path)[1])
    if not all(text.strip() for text in prompts):
        raise InputError("--prompt: empty, expected a text")
    if scale is not None and not math.isfinite(scale):
        raise InputError(f"--scale {scale}: expected a finite number")
