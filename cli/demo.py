"""`ie demo`: all of it on the bundled base and facts, narrated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .edit import check_took
from .files import check_new, check_new_folder
from .options import Debug, Force, Json, Quiet, Seed
from .render import reporting

__all__ = ["demo"]


def demo(
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Keep what is made here.", show_default="a temporary folder"),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", metavar="X", min=0.01, help="At most so long in training.", show_default="no limit"),
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Build, train, edit, apply and report on the bundled base."""
    with reporting(json=json, quiet=quiet, debug=debug) as render:
        if out is not None:
            check_new(out, force=force)
            check_new_folder(out / "ie-editor", "editor.json", force=force)

        from ie.demo import run

        from .progress import TrainingProgress
        from .tables import demo_view

        with TrainingProgress(render) as progress:
            result = run(out=out, minutes=minutes, seed=seed, force=force, on_note=progress.note, on_event=progress)
        render.result(result, *demo_view(result))
        check_took(result["edit"])
