"""`ie eval`: how well edits take, carry over, and leave the rest alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ie.errors import InputError

from .files import (
    check_model,
    check_names,
    check_new_file,
    read_dataset_info,
    read_editor_info,
    split_names,
    write_text,
)
from .options import DEFAULT_DATA, DEFAULT_EDITOR, BaseOf, Data, Debug, Device, Dtype, Force, Json, Quant, Quiet, Seed
from .render import json_text, reporting

__all__ = ["evaluate"]

METHODS = ("none", "finetune", "gradient", "ultra")


def evaluate(
    holdout: Annotated[
        str | None,
        typer.Option(
            "--holdout", metavar="T", help="Task that no editor may have seen; or none.", show_default="the editor's"
        ),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B", help="Tasks to report.", show_default="all")
    ] = None,
    data: Data = DEFAULT_DATA,
    editor: Annotated[
        list[Path] | None,
        typer.Option("--editor", metavar="DIR", help="Editor; may be repeated.", show_default=str(DEFAULT_EDITOR)),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="M,N",
            help="none, finetune, gradient, ultra: beside the editors.",
            show_default="none",
        ),
    ] = None,
    model: BaseOf = None,
    controls: Annotated[bool, typer.Option("--controls", help="Also no, wrong and random instructions.")] = False,
    generate: Annotated[bool, typer.Option("--generate/--no-generate", help="Also by greedy decoding.")] = True,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="At most N records of each task.", show_default="all"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="F.json", help="Write the report as JSON.")] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="F.md", help="Write the report as Markdown.")
    ] = None,
    quant: Quant = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Report reliability, generalization, portability and locality."""
    with reporting(json=json, quiet=quiet, debug=debug) as render:
        if model is not None:
            check_model(model)
        wanted = split_names(methods, "--methods")
        check_names(wanted, METHODS, "--methods", "method")
        editors = _editors(editor, wanted)
        known = tuple(read_dataset_info(data)["tasks"])
        names = split_names(tasks, "--tasks")
        check_names(names, known, "--tasks", "task")
        check_names([holdout] if holdout not in (None, "none") else [], known, "--holdout", "task")
        for folder in editors:
            _check_untrained(folder, read_editor_info(folder), holdout)
        for file, flag in ((out, "--out"), (markdown, "--markdown")):
            if file is not None:
                check_new_file(file, force=force, flag=flag)

        if out is not None and markdown is not None and out.resolve() == markdown.resolve():
            raise InputError("--out and --markdown need files of their own")

        from ie.evaluation import evaluate as run

        from .report import to_markdown
        from .tables import eval_view

        result = run(
            editors=editors, data=data, model=model, tasks=names or None, holdout=holdout, methods=wanted,
            controls=controls, generate=generate, limit=limit, seed=seed,
            quant=quant, dtype=dtype, device=device, on_note=render.note,
        )  # fmt: skip
        try:
            if out is not None:
                write_text(out, json_text(result))
            if markdown is not None:
                write_text(markdown, to_markdown(result))
        finally:  # a report takes minutes: a full disk must not lose it
            render.result(result, *eval_view(result))


def _editors(given: list[Path] | None, methods: tuple[str, ...]) -> tuple[Path, ...]:
    """The editors to report on: those named, else the default one if it is there or nothing else was asked for."""
    if given:
        return tuple(dict.fromkeys(given))
    return () if methods and not DEFAULT_EDITOR.exists() else (DEFAULT_EDITOR,)


def _check_untrained(folder: Path, info: dict[str, Any], holdout: str | None) -> None:
    if holdout is not None and holdout in info.get("tasks", ()):
        raise InputError(
            f"--holdout {holdout}: the editor {folder} was trained on it, so it is no hold-out",
            hint=f"train one without it: `ie train --holdout {holdout} --out DIR`",
        )
