"""`ie train`: one editor for all tasks of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ie.errors import InputError

from .files import check_model, check_names, check_new, read_dataset_info, split_names
from .options import (
    DEFAULT_DATA,
    DEFAULT_EDITOR,
    DEFAULT_HOLDOUT,
    DEFAULT_MODEL,
    Data,
    Debug,
    Device,
    Dtype,
    Force,
    Json,
    Model,
    Quant,
    Quiet,
    Seed,
)
from .render import Render, reporting

if TYPE_CHECKING:
    from ie.training.settings import TrainSettings

__all__ = ["train"]


def _read_config(context: typer.Context, file: Path | None) -> Path | None:
    """Take the values of --config as defaults: a flag on the command line wins."""
    if file is None or context.resilient_parsing:
        return file
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise typer.BadParameter(f"cannot read {file}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise typer.BadParameter(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"{file} holds no mapping of flags to values")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    flags = {parameter.name for parameter in context.command.params} - {"config", "help"}
    context.obj = {key: value for key, value in values.items() if key not in flags}  # settings without a flag
    context.default_map = {
        key: ",".join(map(str, value)) if isinstance(value, list) else value
        for key, value in values.items()
        if key in flags
    }
    return file


def train(
    context: typer.Context,
    model: Model = DEFAULT_MODEL,
    data: Data = DEFAULT_DATA,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Editor folder to write.")] = DEFAULT_EDITOR,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B", help="Tasks to train on.", show_default="all")
    ] = None,
    holdout: Annotated[
        str, typer.Option("--holdout", metavar="T", help="Tasks left out, for `ie eval`; or none.")
    ] = DEFAULT_HOLDOUT,
    method: Annotated[
        Literal["instructedit", "mend"], typer.Option("--method", help="mend: the same without instructions.")
    ] = "instructedit",
    quant: Quant = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", min=1, help="Training steps.", show_default="500")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", metavar="X", min=0.01, help="Stop after so long.", show_default="no limit"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", metavar="N", min=1, help="Edits in a step.", show_default="16"),
    ] = None,
    balance: Annotated[
        bool, typer.Option("--balance/--no-balance", help="Draw tasks evenly, or by their size.")
    ] = True,
    seed: Seed = 0,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="F.yaml", is_eager=True, callback=_read_config, help="Flags from a file."),
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train one editor for all tasks of a dataset."""
    with reporting(json=json, quiet=quiet, debug=debug) as render:
        check_model(model)
        check_new(out, force=force)
        more = dict(context.obj or {})
        if more:  # settings that only --config can name: check them before anything is built
            _settings(more, f"--config {config}: ")
        left_out = _check_tasks(render, data, tasks, holdout, explicit=_given(context, "holdout"))
        values: dict[str, Any] = {
            "model": model, "data": data, "out": out, "tasks": split_names(tasks, "--tasks") or None,
            "holdout": left_out, "method": method, "quant": quant, "dtype": dtype, "device": device,
            "steps": steps, "minutes": minutes, "batch_size": batch_size, "balance": balance,
            "seed": seed, "force": force, **more,
        }  # fmt: skip
        _run(render, {key: value for key, value in values.items() if value is not None})


def _run(render: Render, values: dict[str, Any]) -> None:
    from ie.training import train as train_editor

    from .progress import TrainingProgress
    from .tables import train_view

    settings = _settings(values, "")
    with TrainingProgress(render) as progress:
        result = train_editor(settings, on_event=progress)
    render.result(result, *train_view(result))


def _settings(values: dict[str, Any], where: str) -> TrainSettings:
    """Make the settings of a run; all values that it cannot have are named in one error."""
    from pydantic import ValidationError

    from ie.training.settings import TrainSettings

    try:
        return TrainSettings(**values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        hint = "known are the flags of `ie train` and the fields of ie.training.settings.TrainSettings"
        raise InputError(f"{where}{faults}", hint=hint) from error


def _given(context: typer.Context, name: str) -> bool:
    """Say whether a value comes from the user (command line or --config), not from the default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _check_tasks(render: Render, data: Path, tasks: str | None, holdout: str, *, explicit: bool) -> tuple[str, ...]:
    """Check --tasks and --holdout against the dataset; without a default dataset, build it first.

    Returns:
        The tasks to leave out.
    """
    names = split_names(tasks, "--tasks")
    left_out = () if holdout == "none" else split_names(holdout, "--holdout")
    if data == DEFAULT_DATA and not data.exists():
        from ie.data.build import build

        render.note(f"no dataset at {data}: building the default one first")
        build(data)
    known = tuple(read_dataset_info(data)["tasks"])
    check_names(names, known, "--tasks", "task")
    if explicit:
        check_names(left_out, known, "--holdout", "task")
    both = [name for name in names if name in left_out]
    if both:
        raise InputError(
            f"{', '.join(both)} is in --tasks and held out",
            hint="a task is trained on or held out, not both: give --holdout none, or other names",
        )
    if not set(names or known) - set(left_out):
        raise InputError("no task is left to train on", hint="give other --tasks, or --holdout none")
    return tuple(name for name in left_out if name in known)
