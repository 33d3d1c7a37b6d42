"""`ie build`: an instruction dataset from the bundled facts or from published files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .files import check_new_folder
from .options import DEFAULT_DATA, Debug, Force, Json, Quiet, Seed, Templates
from .render import reporting

__all__ = ["build"]


def build(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Dataset folder to write.")] = DEFAULT_DATA,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", "-s", metavar="TASK[:SPLIT]=FILE", help="Published file; may be repeated."),
    ] = None,
    templates: Templates = None,
    seed: Seed = 0,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="At most N records of each task.")
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Build an instruction dataset from facts and templates."""
    with reporting(json=json, quiet=quiet, debug=debug) as render:
        check_new_folder(out, "dataset.json", force=force)
        from ie.data.build import Source
        from ie.data.build import build as build_dataset

        from .tables import build_view

        sources = [Source.parse(text) for text in source or ()]
        if not sources:
            render.note("building from the bundled facts")
        result = build_dataset(out, sources, templates, seed=seed, limit=limit, force=force)
        render.result(result, *build_view(result))
